"""Which problems an import holds out for validation, where its source does not say."""

import hashlib
from pathlib import Path

from wmtp_ds.data.import_folder import ImportFolder
from wmtp_ds.errors import UserError

DEFAULT_FRACTION = 0.1


def held_out(text: str, share: float, seed: int) -> bool:
    """Whether a problem is held out: by its text, so that the same text is on one side only.

    Args:
        text: what the problem says; white space does not matter.
        share: the share of problems to hold out, in [0, 1).
        seed: other seeds hold out others.
    """
    digest = hashlib.sha256(f"split-{seed}-{' '.join(text.split())}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_splits(folder: ImportFolder, source: Path, share: float) -> None:
    """Check that there are rows, and on both sides of a split that was asked for.

    Raises:
        UserError: there are not.
    """
    if not folder.splits:
        reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in folder.skipped.items())
        raise UserError(f"{source}: gives no rows: {reasons.replace('_', ' ') or 'it is empty'}")
    sides = folder.splits.keys() & {"train", "validation"}
    if share and len(sides) == 1:
        lacking = "validation" if "train" in sides else "training"
        raise UserError(
            f"{source}: --validation-fraction {share:g} leaves no {lacking} problem: give another fraction, another "
            "--seed, or 0 to hold none out"
        )
