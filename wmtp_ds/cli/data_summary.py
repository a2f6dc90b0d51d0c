"""What the commands that write data sets say at their end."""

import time
from pathlib import Path
from typing import Any

import click

SPLITS = ("train", "validation", "evaluation")


def completed(summary: dict[str, Any], output: Path, began: float, *, ran_code: bool) -> dict[str, Any]:
    """The summary as ``--json`` prints it: with the output, the seconds it took, and the sandbox if one was used."""
    from wmtp_ds.data.sandbox import sandbox_kind

    told = {"output": str(output), **summary, "seconds": round(time.monotonic() - began, 1)}
    return {**told, "sandbox": sandbox_kind()} if ran_code and not summary["reused"] else told


def tell_files(summary: dict[str, Any], output: Path, began: float, *, ran_code: bool) -> None:
    """Print what was written where, and how many rows each file has."""
    from wmtp_ds.data.sandbox import sandbox_kind

    if summary["reused"]:
        click.echo(f"{output} holds this data already; left as it is")
    else:
        ran = f"; code ran in the sandbox '{sandbox_kind()}'" if ran_code else ""
        click.echo(f"wrote {output} in {time.monotonic() - began:.0f} s{ran}")
    for name in SPLITS:
        if name not in summary:
            continue
        found = summary[name]
        click.echo(
            f"  {name + '.jsonl':<17}{found['rows']:>6} rows of {found['problems']} problems: "
            f"{found['correct']} correct, {found['incorrect']} incorrect"
        )
        spread = "  ".join(f"{difficulty}: {count}" for difficulty, count in found["by_difficulty"].items())
        click.echo(f"{'':>19}by difficulty  {spread}")


def tell_runs(found: dict[str, Any]) -> None:
    """Print what came of running references and mutants."""
    failed = len(found["references_failed"])
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found["mutant_verdicts"].items())
    click.echo(
        f"  references: {found['references'] - failed} of {found['references']} pass their tests\n"
        f"  mutants: {found['mutants']} run ({verdicts or 'none'}); {found['mutants_survived_and_dropped']} survived "
        f"and were dropped, {found['mutants_failed_but_not_needed']} failed but were not needed"
    )
    for line in found["references_failed"][:10]:
        click.echo(f"  failed: {line}")
    if failed > 10:
        click.echo(f"  and {failed - 10} more, listed in manifest.json")


def tell_skipped(summary: dict[str, Any]) -> None:
    """Print what was read and not imported, and why."""
    for reason, entry in summary["skipped"].items():
        click.echo(f"  skipped: {entry['count']:>6} {reason.replace('_', ' ')}")
    if any(entry["first"] for entry in summary["skipped"].values()):
        click.echo("  which they are: manifest.json")
