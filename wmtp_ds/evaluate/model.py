"""Any model to evaluate: an export or a checkpoint of ours, or a next-token model in Hugging Face format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from wmtp_ds.checkpoint_export import export_beside
from wmtp_ds.checkpoint_files import complete_checkpoints, is_complete, step_of
from wmtp_ds.errors import UserError
from wmtp_ds.models.causal import load_causal
from wmtp_ds.models.config_file import read_config_fields
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.run_summary import BEST, FINAL, read_summary
from wmtp_ds.tracking_state import TrackingState

# A policy of ours, or a next-token model of another architecture.
Model = MTPLlamaForCausalLM | PreTrainedModel
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a model's files are.

    Attributes:
        folder: with config.json, weights and tokenizer.
        run: of the run that it comes from; None for others.
    """

    folder: Path
    run: Path | None = None

    @property
    def name(self) -> str:
        """Of the run, and the step where it is that of a checkpoint; or of the folder."""
        if self.run is None or self.folder.name in (BEST, FINAL):
            return (self.run or self.folder).resolve().name
        return f"{self.run.resolve().name}-{self.folder.name.removeprefix('exported_')}"

    @property
    def tracked_run(self) -> str | None:
        """The MLflow id of the run that it comes from."""
        run_id = None if self.run is None else read_summary(self.run).get("mlflow_run_id")
        if isinstance(run_id, str):
            return run_id
        # run.json says it once the run has ended.
        state = self.tracking
        return None if state is None else state.run_id

    @property
    def tracking(self) -> TrackingState | None:
        """What the run that it comes from remembers of its tracking."""
        if self.run is None:
            return None
        try:
            return TrackingState.load(self.run)
        except (OSError, UserError):  # a run without tracking, or a damaged file: nothing that an evaluation needs
            return None


def find_model(path: Path) -> Place:
    """What a path names: a model's folder; a checkpoint; or a run's folder.

    Of a run the best export is taken, or else the final one, or else its newest checkpoint. Checkpoints are put
    together from their shards, once.

    Raises:
        UserError: there is nothing of the kind; says what there is instead.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a model's folder, or a run's")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the model's folder")
    if step_of(path.name) is not None or is_complete(path):
        return _of_checkpoint(path)
    if not (path / "config.json").exists() and not (path / "params.json").exists():
        exports = [path / name for name in (BEST, FINAL) if (path / name / "config.json").exists()]
        if exports:
            return Place(exports[0], path)
        if (path / BEST / "value_head.safetensors").exists() or (path / "value_head.safetensors").exists():
            raise UserError(f"{path} holds a value head alone (a critic's): there is no policy in it to evaluate")
        if complete_checkpoints(path):
            return _of_checkpoint(complete_checkpoints(path)[-1])
        raise UserError(f"{path} holds no model: neither config.json, nor an export ({BEST}, {FINAL})")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is in Meta's layout: wmtp-ds model import {path} DEST, and evaluate that")
    run = path.parent if path.name in (BEST, FINAL) else None
    return Place(path, run)


def _of_checkpoint(checkpoint: Path) -> Place:
    """Raises UserError if it is not whole, or a critic's, which has no policy of its own."""
    place = Place(export_beside(checkpoint), checkpoint.parent)
    if not (place.folder / "config.json").exists():
        raise UserError(f"{checkpoint} holds a value head alone (a critic's): there is no policy in it to evaluate")
    return place


def check_heads(place: Place) -> None:
    """There are extra heads to draft with.

    Raises:
        UserError: there are none, or config.json says nonsense of them.
    """
    if heads_of(read_config_fields(place.folder), place.folder) < 2:
        raise UserError(
            f"--decode self-speculative drafts with extra heads, and {place.folder} has none: take --decode plain, or "
            "a model that was trained to predict several tokens"
        )


def heads_of(fields: Mapping[str, Any], folder: Path) -> int:
    """How many tokens a model predicts, by its config.json; 1 where that says nothing.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    heads = fields.get("n_future_tokens")
    if heads is None:
        return 1
    if type(heads) is not int or heads < 1:
        raise UserError(f"{folder / 'config.json'}: n_future_tokens is {heads!r}: write a whole number of at least 1")
    return heads


def load_model(place: Place, *, device: torch.device, dtype: str | None = None) -> tuple[Model, Any]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        place: of :func:`find_model`.
        device: where to put it.
        dtype: of the weights; None: as they are stored on a GPU, and float32 on a CPU.

    Raises:
        UserError: it cannot be loaded.
    """
    fields = read_config_fields(place.folder)
    stored = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    wanted = DTYPES[dtype or (stored if device.type == "cuda" and stored in DTYPES else "float32")]
    if fields.get("model_type") == "llama":
        policy = load_policy(place.folder, dtype=wanted, n_future_tokens=heads_of(fields, place.folder))
        # Rows of different lengths need a mask, which not every implementation takes.
        policy.config._attn_implementation = "sdpa"
        model: Model = policy
    else:
        model = load_causal(place.folder, dtype=wanted)
    torch.nn.Module.to(model, device)
    return model.eval(), load_tokenizer(place.folder)
