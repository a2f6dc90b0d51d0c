"""A checkpoint to resume from as an export: what a run would have written had it ended there.

The shards of all ranks are put together by DeepSpeed's universal conversion, which is kept beside the checkpoint; from
there parameters are read one at a time, so memory is that of one file of weights.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wmtp_ds.checkpoint_files import (
    MADE_FROM,
    MANIFEST,
    PARTIAL,
    export_place,
    export_there,
    read_manifest,
    replace_folder,
    verify_manifest,
)
from wmtp_ds.config import load_config
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import one_at_a_time, sha256_of
from wmtp_ds.handoff import save_value_head
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.fingerprint import read_trunk_fingerprint, store_trunk_fingerprint
from wmtp_ds.models.loading import check_architecture, load_tokenizer, save_weights
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.stages.base import make_stage
from wmtp_ds.universal import convert

logger = logging.getLogger(__name__)
_VALUE_HEAD = "value_head."
_LOCKED = "config.toml"  # of a checkpoint, while it is exported; its manifest is, while it is converted


def export_checkpoint(checkpoint: Path, final: Path, *, force: bool = False) -> Path:
    """Write what ``checkpoint_final`` would be: a policy with its tokenizer, or a critic's value head.

    Args:
        checkpoint: ``step_…``, whole.
        final: a folder; it does not exist, or is empty, or may be replaced.
        force: replace an export that is there.

    Raises:
        UserError: the checkpoint is not whole, the model that it was trained from is gone, or ``final`` is taken.
        RunError: it cannot be converted or written.
    """
    with one_at_a_time(checkpoint / _LOCKED):
        return _export(checkpoint, final, force=force)


def _export(checkpoint: Path, final: Path, *, force: bool) -> Path:
    problem = verify_manifest(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} is not whole: {problem}. wmtp-ds checkpoint list shows others.")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        if not final.is_dir() or not (final / "metrics.json").is_file():
            raise UserError(f"{final} is there, and it is no export: name another destination.")
        if not force:
            raise UserError(f"{final} is there already: name another destination, or replace it with --force.")
    # As the run had it: variables that are set today are of other runs.
    resolved = load_config(checkpoint / "config.toml", checks=False, environ={})
    policy_folder = Path(resolved.config.models.policy.path)
    if not (policy_folder / "config.json").is_file():
        raise UserError(f"{policy_folder} is gone, the model that {checkpoint} was trained from: run this beside it.")
    parameters = convert(checkpoint) / "zero"
    partial = final.with_name(f"{PARTIAL}{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = resolved.config
        fingerprint = read_trunk_fingerprint(policy_folder)
        if make_stage(config.experiment.stage, config.training).trains_policy:
            dtype = getattr(torch, config.models.policy.dtype)
            with torch.device("meta"):
                policy = MTPLlamaForCausalLM(check_architecture(policy_folder))
            save_weights(policy, partial, value_of=_reader(parameters, "policy.", policy, dtype))
            write_config(partial, policy.config, dtype)
            load_tokenizer(config.models.policy.tokenizer_path or policy_folder).save_pretrained(partial)
            fingerprint = store_trunk_fingerprint(partial)
        if any(parameters.glob(f"{_VALUE_HEAD}*")):
            hidden_size = check_architecture(policy_folder).hidden_size
            with torch.device("meta"):
                head = ValueHead(hidden_size, config.value_head.type)
            read = _reader(parameters, _VALUE_HEAD, head, torch.float32)
            save_value_head(
                partial / "value_head.safetensors",
                {name: read(parameter) for name, parameter in head.named_parameters()},
                hidden_size=hidden_size,
                type=config.value_head.type,
                activation=config.value_head.activation,
                trunk_fingerprint=str(fingerprint),
            )
        facts = {
            "step": read_manifest(checkpoint).get("step"),
            "stage": config.experiment.stage,
            MADE_FROM: sha256_of(checkpoint / MANIFEST),
        }
        (partial / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.copy(checkpoint / "config.toml", partial / "config.toml")
        replace_folder(partial, final)
    except OSError as error:
        raise RunError(f"{final} could not be written: {error}. Free space or mend the disk.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def export_beside(checkpoint: Path) -> Path:
    """The export of a checkpoint that tools read: ``exported_step_…`` beside it, made when it is first asked for.

    Raises:
        UserError, RunError: as `export_checkpoint` does.
    """
    if (there := export_there(checkpoint)) is not None:
        return there
    with one_at_a_time(checkpoint / _LOCKED):
        if (there := export_there(checkpoint)) is not None:  # by now: another process was at it
            return there
        final = export_place(checkpoint)
        logger.info("%s is put together from the shards of its ranks, once, as %s", checkpoint, final)
        return _export(checkpoint, final, force=True)


def _reader(folder: Path, prefix: str, module: nn.Module, dtype: torch.dtype) -> Callable[[nn.Parameter], Tensor]:
    """What to store for a parameter of a module without memory: its converted value."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def read(parameter: nn.Parameter) -> Tensor:
        file = folder / f"{prefix}{names[id(parameter)]}" / "fp32.pt"
        value: Tensor = torch.load(file, map_location="cpu", weights_only=True)
        # What ranks cannot share evenly ends with places of no parameter.
        return value.flatten()[: parameter.numel()].reshape(parameter.shape).to(dtype)

    return read
