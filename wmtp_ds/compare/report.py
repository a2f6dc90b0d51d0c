"""A comparison as Markdown, which is what the terminal shows, too; and its files."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp_ds.compare.comparison import EVALUATED, TRAINED, WATCHED, panels
from wmtp_ds.compare.curves import draw_curves
from wmtp_ds.data.output_file import whole_file
from wmtp_ds.errors import UserError
from wmtp_ds.files import write_atomically

MARKDOWN, FIGURES, CURVES = "compare.md", "compare.json", "curves.png"


def check_folder(output: Path) -> None:
    """Make the folder of a comparison; an earlier comparison in it is replaced.

    Raises:
        UserError: it holds something else, or cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made: {error.strerror}") from None
    if names and FIGURES not in names:
        raise UserError(f"--output {output}: holds other files, and no comparison: give a folder of its own")


def write_report(told: Mapping[str, Any], output: Path) -> bool:
    """Write compare.json, compare.md, and curves.png where runs share a metric; returns whether they do.

    Args:
        told: of `wmtp_ds.compare.comparison.compare`.
        output: a folder that is there.

    Raises:
        RunError: writing failed.
    """
    metrics = panels(told)
    picture = output / CURVES
    if metrics:
        with whole_file(picture) as partial:
            draw_curves(told, metrics, partial)
    else:
        picture.unlink(missing_ok=True)  # of an earlier comparison
    write_atomically(output / FIGURES, json.dumps(told, indent=1) + "\n")
    write_atomically(output / MARKDOWN, to_markdown(told, CURVES if metrics else None))
    return bool(metrics)


def to_markdown(told: Mapping[str, Any], picture: str | None = None) -> str:
    """The report.

    Args:
        told: of `wmtp_ds.compare.comparison.compare`.
        picture: the name of the curves' file beside it; None where there is none.
    """
    arms = told["arms"]
    parts = [f"# {' | '.join(arms)}"]
    several = {arm: runs for arm, runs in arms.items() if runs != [arm]}
    parts += ["\n".join(f"{arm}: {', '.join(runs)}" for arm, runs in several.items())] if several else []
    remarks = [f"- {kind}: {_line(text)}" for kind in ("error", "warning") for text in told[f"{kind}s"]]
    parts += ["\n".join(remarks)] if remarks else []
    parts += ["## Runs", _table(["", *arms], _facts(told))]
    metrics = list(_metrics(told))
    if metrics:
        note = "The last value, and the best one with its step" + ("; of several runs mean ± std" if several else "")
        parts += ["## Metrics", f"{note}.", _table(["", *arms], metrics)]
    parts.append("## pass@k")
    parts += [_passes(told["pass_at_k"])] if told["pass_at_k"] else ["Nothing to compare."]
    parts.append("## Config")
    differences = told["config_differences"]
    if differences:
        rows = [[key, *(_value(values.get(arm)) for arm in arms)] for key, values in differences.items()]
        parts.append(_table(["", *arms], rows))
    else:
        parts.append("No value differs.")
    if picture is not None:
        parts += ["## Learning curves", f"![learning curves]({picture})"]
    return "\n\n".join(parts) + "\n"


def _facts(told: Mapping[str, Any]) -> Iterable[list[str]]:
    names = {
        "stage": "stage",
        "completed": "came to its end",
        "steps": "steps",
        "tokens": "tokens",
        "seconds": "seconds of training",
        "ranks": "ranks",
        "sequences_per_step": "sequences a step",
    }
    for key, name in names.items():
        values = [[told["runs"][run][key] for run in runs] for runs in told["arms"].values()]
        if any(value is not None for own in values for value in own):
            yield [name, *(_fact(own) for own in values)]


def _fact(values: Sequence[Any]) -> str:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return _spread(values, ",.0f")
    texts = {None: "?", True: "yes", False: "no"}
    return ", ".join(dict.fromkeys(str(texts.get(value, value)) for value in values))


def _metrics(told: Mapping[str, Any]) -> Iterable[list[str]]:
    for name in (*EVALUATED, *TRAINED, *WATCHED):
        if name not in told["metrics"]:
            continue
        ends = [[told["metrics"][name][run] for run in runs] for runs in told["arms"].values()]
        yield [f"{name}, last", *(_spread([one["final"] for one in own]) for own in ends)]
        if which := EVALUATED.get(name):
            yield [f"{name}, {which}", *(_best(own, which) for own in ends)]


def _best(ends: Sequence[Mapping[str, Any]], which: str) -> str:
    known = [one for one in ends if one[which] is not None]
    if not known:
        return ""
    steps = list(dict.fromkeys(one[f"{which}_step"] for one in known))
    return f"{_spread([one[which] for one in known])} (step {', '.join(map(str, steps))})"


def _spread(values: Sequence[Any], form: str = ".4f") -> str:
    """One number, or mean ± the sample's standard deviation of several."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return ""
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1 or not math.isfinite(mean):
        return format(mean, form)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
    return f"{mean:{form}} ± {deviation:{form}}"


def _passes(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in records:
        low, high = record["interval"]
        rows.append(
            [
                f"{record['problems']}, pass@{record['k']}",
                f"{record['first_pass']:.4f} {record['first']}",
                f"{record['second_pass']:.4f} {record['second']}",
                f"{record['difference']:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{record['better']} better, {record['worse']} worse of {record['problem_count']}",
            ]
        )
    return _table(["", "first", "second", "second − first", "95 % interval", "problems"], rows)


def _value(value: str | None) -> str:
    if value is None:
        return "(not set)"
    return value if len(value) <= 60 else f"{value[:57]}..."


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns that are as wide as their widest entry, so that it reads well as it is."""
    lines = [[_line(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[place]) for row in lines) for place in range(len(head))]
    shown = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in lines]
    return "\n".join([shown[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *shown[1:]])
