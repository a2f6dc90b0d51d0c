"""Exports: what a run hands on, in files that need neither DeepSpeed nor this package to read."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from wmtp_ds import distributed
from wmtp_ds.checkpoint_files import PARTIAL, replace_folder
from wmtp_ds.config import Resolved
from wmtp_ds.engine import Engine
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.handoff import save_value_head
from wmtp_ds.models.config_file import write_config
from wmtp_ds.models.fingerprint import store_trunk_fingerprint
from wmtp_ds.models.loading import save_weights


class Exporter:
    """Writes ``checkpoint_best/`` and ``checkpoint_final/``.

    A trained policy goes out in Hugging Face's format, with its tokenizer and the fingerprint of its trunk. A critic
    exports its value head and the fingerprint of the trunk that it belongs to, not another copy of that trunk.

    Args:
        engine: of a ``StageModel``.
        resolved: the run's config.
        tokenizer: to be saved with a policy.
        trunk_fingerprint: of the policy that training started from; a critic's trunk stays that.
    """

    def __init__(self, engine: Engine, resolved: Resolved, tokenizer: Any, trunk_fingerprint: str | None):
        self._engine = engine
        self._resolved = resolved
        self._tokenizer = tokenizer
        self._trunk_fingerprint = trunk_fingerprint
        self._root = Path(resolved.config.checkpoint.save_dir)

    def write(self, name: str, metrics: dict[str, Any]) -> Path:
        """Write an export in place of an older one of that name; every rank must call this.

        Raises:
            RunError: on every rank, if any of them cannot write; the older export stays.
        """
        final = self._root / name
        partial = self._root / f"{PARTIAL}{name}"
        failures: list[str] = []
        with _caught(failures):
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self._agree(failures, final)
        self._write_into(partial, failures)
        self._agree(failures, final)
        with _caught(failures):
            if distributed.is_main():
                (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
                (partial / "config.toml").write_text(self._resolved.toml())
                replace_folder(partial, final)
        self._agree(failures, final)
        return final

    def _agree(self, failures: list[str], final: Path) -> None:
        """Go on if no rank has failed; or else stop on all of them, with the words of those that have."""
        if said := distributed.failures_of_all(failures):
            if distributed.is_main():  # what is there of it takes room where there may be none
                shutil.rmtree(final.with_name(f"{PARTIAL}{final.name}"), ignore_errors=True)
            raise RunError(
                f"export {final} could not be written: {'; '.join(said)}. Free space or mend the disk.", everywhere=True
            )

    def _write_into(self, folder: Path, failures: list[str]) -> None:
        """Write all but what says that it is complete. What goes wrong is noted, and every rank gathers to the end."""
        model, main = self._engine.module, distributed.is_main()
        fingerprint = self._trunk_fingerprint
        if model.stage.trains_policy:
            with _caught(failures):
                save_weights(model.policy, folder, sharding=self._engine.sharding)
            with _caught(failures):
                if main and not failures:
                    dtype = getattr(torch, self._resolved.config.models.policy.dtype)
                    write_config(folder, model.policy.config, dtype)
                    _save_tokenizer(self._tokenizer, folder)
                    fingerprint = store_trunk_fingerprint(folder)
        if model.value_head is not None:
            head = self._resolved.config.value_head
            state = {name: self._engine.full_value(p).cpu() for name, p in model.value_head.named_parameters()}
            with _caught(failures):
                if main and not failures:
                    assert fingerprint is not None
                    save_value_head(
                        folder / "value_head.safetensors",
                        state,
                        hidden_size=model.policy.config.hidden_size,
                        type=head.type,
                        activation=head.activation,
                        trunk_fingerprint=fingerprint,
                    )


@contextmanager
def _caught(failures: list[str]) -> Iterator[None]:
    with distributed.caught(failures):
        try:
            yield
        except (SafetensorError, UserError) as error:  # the first is what a full disk comes as, too
            raise OSError(str(error)) from error


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # what a full disk comes as
