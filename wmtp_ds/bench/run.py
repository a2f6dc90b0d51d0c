"""From what was typed to figures: check, make a workspace, start the ranks, read what they measured."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wmtp_ds.bench.settings import MATERIALISED, RESULT_FILE, StepSettings
from wmtp_ds.bench.sizes import REFERENCES, SIZES, MemoryNeed, check_memory
from wmtp_ds.bench.workspace import resolve, write_workspace
from wmtp_ds.config import Resolved
from wmtp_ds.config.deepspeed_file import offloads
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.launch import check_compiler, device_ids, launch_environment, ranks_command, run_ranks


def run_step(
    settings: StepSettings, chosen: Sequence[str], overrides: Sequence[str], *, compare_materialised: bool = False
) -> dict[str, Any]:
    """Measure a step in fresh processes.

    Args:
        settings: what to measure.
        chosen: ``key=value`` of the config that options name.
        overrides: further ones as typed.
        compare_materialised: measure it with materialised logits, too, in processes of its own.

    Returns:
        What ``measure.measure`` returns; compared, also the other arm's under "materialised", and under "compared" the
        ratios of time and extra memory. With ``settings.compare_scores``, under "scores" the seconds of steps with the
        reference and without it, and the memory of processes that have none.

    Raises:
        UserError: for what the user can mend: the config, the devices, a model that does not fit.
        RunError: if the ranks failed; they have said why.
    """
    figures = _run(settings, chosen, overrides)
    if settings.compare_scores:
        # What a freed engine leaves behind is no measure: processes that never had one tell what they hold.
        alone = replace(settings, divide=False, compare_scores=False, only_scores=True)
        figures["scores"]["memory"] = _run(alone, chosen, overrides)["memory"]
    if not compare_materialised:
        return figures
    materialised = _run(replace(settings, logits=MATERIALISED, divide=False, compare_scores=False), chosen, overrides)
    return figures | {"materialised": materialised, "compared": compare(figures, materialised)}


def compare(fused: dict[str, Any], materialised: dict[str, Any]) -> dict[str, float]:
    """How many times the fused step is faster, and leaner in what it takes beyond what is held between steps."""
    return {
        "time": materialised["step_seconds"] / fused["step_seconds"],
        "memory": materialised["memory"]["extra"] / max(1, fused["memory"]["extra"]),
    }


def _run(settings: StepSettings, chosen: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="wmtp-bench-") as temporary:
        workspace = Path(temporary)
        resolved = resolve(settings, workspace, chosen, overrides)
        ds_config = resolved.deepspeed(settings.ranks)
        check_compiler(settings.device, ds_config)
        ids = device_ids(settings.device, settings.ranks, os.environ)
        if not offloads(ds_config, "offload_optimizer", "offload_param"):
            check_memory(memory_need(settings, resolved), settings.device, settings.ranks, settings.size)
        write_workspace(workspace, resolved, settings)
        _check_attention(workspace, settings.attention)
        command = ranks_command(ids, "wmtp_ds.bench.rank", [str(workspace)])
        sys.stdout.flush()
        # Standard output is for the figures alone.
        code = run_ranks(command, launch_environment(settings.device, os.environ), stdout=sys.__stderr__)
        if code > 128:  # a signal
            sys.exit(code)
        result = workspace / RESULT_FILE
        if code or not result.exists():
            arm = f"the measurement with {settings.logits} logits{' and scores' if settings.only_scores else ''}"
            raise RunError(f"{arm} ended with exit code {code}; what went wrong stands above.")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def _check_attention(workspace: Path, attention: str) -> None:
    """Of all that a model is built from, only that is typed freely."""
    from wmtp_ds.models.loading import check_architecture

    try:
        check_architecture(workspace / "policy")
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"--attention {attention}: {reason}") from None


def memory_need(settings: StepSettings, resolved: Resolved) -> MemoryNeed:
    """What the model of a measurement takes, at the least."""
    from wmtp_ds.stages.base import make_stage

    config, policy = resolved.config, SIZES[settings.size].parameters
    reference = REFERENCES[settings.size].parameters if config.loads_reference else 0
    trains_policy = make_stage(settings.stage, config.training).trains_policy
    sixteen_bit = config.models.policy.dtype != "float32" and config.runtime.mixed_precision
    if trains_policy:
        return MemoryNeed(policy, reference, sixteen_bit)
    return MemoryNeed(0, policy + reference, sixteen_bit)
