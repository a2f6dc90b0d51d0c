"""The figures of a measurement as a table, JSON and CSV."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wmtp_ds.errors import UserError

NOT_MEASURED = "not measured"
_GIB = 2**30
_LABELS = {"loss": "loss (unembedding)"}


def outside_share(figures: dict[str, Any]) -> float:
    """The share of the step outside forward, backward and optimizer."""
    return float(sum(part["share"] for part in figures["parts"] if part["phase"] == "outside"))


def table(figures: dict[str, Any]) -> str:
    """What ``wmtp-ds bench step`` prints."""
    return "\n".join(
        [*_head(figures), "", *_rates(figures), "", *_parts(figures), *_comparison(figures), *_scores(figures)]
    )


def _head(figures: dict[str, Any]) -> Iterator[str]:
    work, ranks = figures["work"], figures["ranks"]
    machine = figures["device_name"]
    if figures["device"] == "cpu":
        machine = f"{figures['cores']} cores"
    yield (
        f"{figures['stage']}, {figures['size']} ({figures['parameters'] / 1e6:,.1f} million parameters), "
        f"{figures['dtype']}, {ranks} rank{'s' if ranks > 1 else ''} on {machine}, logits {figures['logits']}"
    )
    learned, positions = work["next_targets"] / work["positions"], work["positions"]
    yield (
        f"{figures['batch_size']} x {figures['sequence_length']} tokens a micro-batch, {figures['accumulation']} of "
        f"them a step and rank: {learned:.1%} solution, {work['tokens'] / positions - learned:.1%} prompt, "
        f"{1 - work['tokens'] / positions:.1%} padding"
    )
    checkpointing = "recomputed" if figures["gradient_checkpointing"] else "kept"
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    yield f"attention {figures['attention']}, activations {checkpointing}, {versions}"


def _rates(figures: dict[str, Any]) -> Iterator[str]:
    each, memory = figures["step_seconds_each"], figures["memory"]
    yield f"step         {_seconds(figures['step_seconds'])}  (median of {len(each)}, {_range(each)})"
    yield f"tokens/s     {figures['tokens_per_second']:,.0f}  (padding not counted)"
    for name, key in (("MFU", "mfu"), ("MFU nominal", "nominal_mfu")):
        share = NOT_MEASURED if figures[key] is None else f"{figures[key]:.1%}"
        note = "padding, prompts' logits and full attention counted"
        if key == "mfu":
            peak = "" if figures["peak_tflops"] is None else f"of {figures['peak_tflops']:.4g} TFLOP/s a rank; "
            note = f"{peak}{figures['peak_tflops_origin']}"
        yield f"{name:12} {share}  ({note})"
    yield (
        f"memory       {memory['extra'] / _GIB:.3f} GiB extra at the step's peak  "
        f"({memory['at_rest'] / _GIB:.3f} GiB between steps, of the rank that needs most)"
    )


def _parts(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{'where the time goes':30} {'time':>10} {'share':>8}"
    phases = list(dict.fromkeys(part["phase"] for part in figures["parts"]))
    for phase in phases:
        parts = [part for part in figures["parts"] if part["phase"] == phase]
        yield _line(phase, sum(part["seconds"] for part in parts), sum(part["share"] for part in parts))
        for part in parts:
            yield _line("  " + _LABELS.get(part["part"], part["part"]), part["seconds"], part["share"])
    yield _line("step", figures["step_seconds"], sum(part["share"] for part in figures["parts"]))
    yield f"outside forward, backward and optimizer: {outside_share(figures):.2%} of the step"
    slower = figures["instrumented_step_seconds"] / figures["step_seconds"] - 1
    yield f"parts are shares of a second pass with timers in it ({slower:+.1%}), applied to the step's own time"


def _comparison(figures: dict[str, Any]) -> Iterator[str]:
    ratios = figures.get("compared")
    if ratios is None:
        return
    other = figures["materialised"]
    yield ""
    yield (
        f"with all logits in memory: {_seconds(other['step_seconds'])} a step, "
        f"{other['memory']['extra'] / _GIB:.3f} GiB extra"
    )
    yield f"this step is {ratios['time']:.2f}x as fast and takes 1/{ratios['memory']:.1f} of the extra memory"


def _scores(figures: dict[str, Any]) -> Iterator[str]:
    found = figures.get("scores")
    if found is None:
        return
    live, cached = found["live_seconds"], found["scores_seconds"]
    before, after = ({name: held / _GIB for name, held in one["memory"].items()} for one in (figures, found))
    yield ""
    yield (
        f"with models.reference.scores: {_seconds(cached)} a step, and {_seconds(live)} with the reference "
        f"({cached / live:.1%}; {len(found['live_seconds_each'])} steps each, in turn)"
    )
    yield (
        f"between steps it holds {after['at_rest']:.3f} GiB instead of {before['at_rest']:.3f}, at the step's peak "
        f"{after['peak']:.3f} instead of {before['peak']:.3f}"
    )


def _line(name: str, seconds: float, share: float) -> str:
    return f"{name:30} {_seconds(seconds):>10} {share:8.2%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _range(values: list[float]) -> str:
    return f"{_seconds(min(values))} to {_seconds(max(values))}"


def make_folder(folder: Path) -> None:
    """Make the folder for the files, before anything is measured.

    Raises:
        UserError: if that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(20, "is a file")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made: {error.strerror}") from None


def write(figures: dict[str, Any], folder: Path) -> None:
    """Write ``step-<stage>-<size>.json``, all figures, and ``.csv``, the parts.

    Raises:
        UserError: if they cannot be written.
    """
    name = f"step-{figures['stage']}-{figures['size']}"
    try:
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["stage", "size", "phase", "part", "seconds", "share"])
            for part in figures["parts"]:
                row = [part["phase"], part["part"], f"{part['seconds']:.9f}", f"{part['share']:.6f}"]
                writer.writerow([figures["stage"], figures["size"], *row])
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None
