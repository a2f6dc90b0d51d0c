"""Reference scores of one data file, memory-mapped: rows are looked up as batches are made of them."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmtp_ds.data.groups import Rows
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.scores.manifest import Input, Manifest

Losses = npt.NDArray[np.float32]


def row_checksum(tokens: npt.NDArray[np.integer]) -> int:
    """CRC-32 of a sequence's token ids: what tells that scores are of just these."""
    return zlib.crc32(np.ascontiguousarray(tokens, "<i4").data)


class ReferenceScores:
    """The scores of a data file's rows. Safe to use from several threads at once.

    Args:
        folder: of the scores.
        manifest: its manifest.
        scored: the data file among its inputs.

    Raises:
        UserError: a file is missing, or is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, scored: Input):
        self.folder, self.manifest, self._scored = folder, manifest, scored
        index = _map(folder / scored.index.name, "int64", (scored.rows, 2))
        self._ends_R, self._checksums_R = np.array(index[:, 0]), np.array(index[:, 1])
        dtype = manifest.settings.dtype
        # All at once: a folder that is written anew meanwhile is not mixed with this one.
        self._shards = [_map(folder / shard.name, dtype, (shard.tokens,)) for shard in scored.shards]
        self._last_rows = np.cumsum([shard.rows for shard in scored.shards])
        self._begins = np.cumsum([0, *(shard.tokens for shard in scored.shards)])
        whole = len(self._ends_R) > 0 and self._last_rows[-1] == scored.rows and self._begins[-1] == scored.tokens
        lengths = np.diff(self._ends_R, prepend=0)
        if not whole or self._ends_R[-1] != scored.tokens or (lengths < 0).any():
            raise UserError(f"{folder} is damaged: its files have not the rows and tokens of its manifest")
        self._lengths_R = lengths

    def unscored(self, row_ids: Rows) -> Rows:
        """Those of the rows that have no scores: too long ones, and wrong ones where only correct ones were scored."""
        missing: Rows = row_ids[self._lengths_R[row_ids] == 0]
        return missing

    def __call__(self, row: int, tokens: npt.NDArray[np.integer], supervised: int) -> Losses:
        """The reference's cross-entropy of a row's supervised tokens.

        Args:
            row: its number in the data file.
            tokens: the token ids of its whole sequence.
            supervised: how many of the last of them are supervised.

        Returns:
            float32 [supervised].

        Raises:
            RunError: other tokens were scored.
        """
        end, length = int(self._ends_R[row]), int(self._lengths_R[row])
        if not supervised:
            return np.zeros(0, np.float32)
        if length != supervised or self._checksums_R[row] != row_checksum(tokens):
            raise RunError(
                f"{self.folder}: row {row} of {self._scored.path} has other tokens than those that were scored: make "
                "the scores again (wmtp-ds data score --force)"
            )
        shard = int(np.searchsorted(self._last_rows, row, side="right"))
        begin = end - length - int(self._begins[shard])
        losses: Losses = self._shards[shard][begin : begin + length].astype(np.float32)
        return losses

    @property
    def tags(self) -> dict[str, str]:
        """For the tracked run: that these scores were used, and of which model they are."""
        settings = self.manifest.settings
        return {
            "reference_scores": f"{self.folder} ({settings.dtype}, computed in {settings.compute_dtype})",
            "reference_fingerprint": self.manifest.reference.fingerprint,
        }


def _map(path: Path, dtype: str, shape: Iterable[int]) -> npt.NDArray[np.generic]:
    """An array in a file, which is not read into memory."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # a damaged header makes of numpy what it likes
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != tuple(shape):
        raise UserError(f"{path} is damaged: it is not the {dtype} array of {list(shape)} that the manifest says")
    # A plain array over the map: np.memmap's own slices cost more than what is in them.
    return found.view(np.ndarray)
