"""``wmtp-ds data``: sample data, and data from elsewhere, with labels earned by running."""

import click

from wmtp_ds.cli.lazy import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "sample": ("wmtp_ds.cli.data_sample:sample", "Generate problems that can be verified, with solutions."),
    "import": ("wmtp_ds.cli.data_import:import_", "Import CodeContests, MBPP, HumanEval, or JSONL of your own."),
    "label": ("wmtp_ds.cli.data_label:label", "Label rows by running their solutions against their tests."),
    "stats": ("wmtp_ds.cli.data_stats:stats", "Counts, lengths, and what each curriculum phase will learn from."),
    "score": ("wmtp_ds.cli.data_score:score", "Compute a reference model's losses of the data, once, for rho1."),
    "dedup": ("wmtp_ds.cli.data_dedup:dedup", "Find duplicates, contradictions and contamination; drop them."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, epilog="Example: wmtp-ds data sample --output storage/data/sample")
def data() -> None:
    """Make and import training data."""
