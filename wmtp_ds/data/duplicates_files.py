"""A data file without its duplicates, and beside it what was dropped and why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_ds.data.duplicates_findings import Findings
from wmtp_ds.data.output_file import report_path, whole_file
from wmtp_ds.errors import UserError
from wmtp_ds.files import sha256_of


def write_kept(findings: Findings, output: Path, made_from: Mapping[str, Any]) -> None:
    """Write the rows that stay, each line as it is, in the file's order, and ``OUTPUT.report.json``.

    Each name appears when all is on the disk. The report has the checksum of the output that it is about.

    Args:
        findings: of the data file.
        output: the file to write.
        made_from: the options, for the report.

    Raises:
        UserError: no row stays.
        RunError: writing failed.
    """
    if not findings.kept.any():
        raise UserError(f"{findings.index.path}: no row would be left: raise --threshold, or compare to other data")
    with whole_file(output) as partial:
        with partial.open("wb") as file:
            for i in np.flatnonzero(findings.kept).tolist():
                file.write(findings.index.read_line(i) + b"\n")
        record = {
            "made_from": {"command": "data dedup", "input": findings.index.fingerprint, **made_from},
            "sha256": sha256_of(partial),
            "report": findings.report,
            "dropped": findings.dropped(),
        }
        # The report first: beside another output it counts for nothing, as its checksum does not fit.
        with whole_file(report_path(output)) as report:
            report.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
