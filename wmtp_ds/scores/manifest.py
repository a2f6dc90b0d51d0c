"""A folder of reference scores, as its manifest tells it. Imports neither torch nor numpy.

In the folder, for each input file of number ``i``:

- ``input<i>-rows.npy``: int64 [rows, 2]; where each row's scores end in the input's, and a CRC-32 of its token ids;
- ``input<i>-<shard>.npy``: float16 or float32 [tokens]; the reference's cross-entropy in nats of each supervised token
  (the solution and its end token) of consecutive rows, one row after another;
- ``manifest.json``: what they were made from, and size and SHA-256 of each file. It is written last: a folder without
  it is not finished.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from wmtp_ds.errors import UserError
from wmtp_ds.files import read_text, sha256_of, write_atomically
from wmtp_ds.models.model_fingerprint import FileVersion

FORMAT: Literal[1] = 1  # raise it whenever the files or their meaning change
MANIFEST = "manifest.json"
JOURNAL = f".partial-{MANIFEST}.journal"  # of a scoring that has not come to its end
CONTINUE = "run the same wmtp-ds data score again: it goes on where it was"
MEND = "run the wmtp-ds data score that made it again: it mends what is damaged"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StoredFile(_Part):
    """A file of the folder."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+\.npy$")]  # none outside the folder
    size: Count
    sha256: Sha256


class Shard(StoredFile):
    """Scores of ``rows`` consecutive rows: ``tokens`` of them, that add up to ``loss``."""

    rows: Count
    tokens: Count
    loss: float


class Input(_Part):
    """A data file: which it was, and where its scores are. ``scored`` of its rows have scores."""

    path: str
    sha256: Sha256
    size: Count
    rows: Count
    scored: Count
    tokens: Count
    index: StoredFile
    shards: tuple[Shard, ...]

    def files(self) -> tuple[StoredFile, ...]:
        """All files with this input's scores."""
        return (self.index, *self.shards)


class Reference(_Part):
    """The model: its fingerprint, what its headers say, and which files that was."""

    path: str
    fingerprint: Sha256
    outline: Sha256
    files: tuple[FileVersion, ...]


class TokenizerFacts(_Part):
    """What made token ids of the data: all of the tokenizer, its vocabulary alone, and the ids that it adds."""

    path: str
    fingerprint: Sha256
    vocabulary: Sha256
    bos_id: int
    eos_id: int


class Settings(_Part):
    """What else decides the scores."""

    template: str
    max_length: Count
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    dtype: Literal["float16", "float32"]
    correct_only: bool
    shard_tokens: Count


class Manifest(_Part):
    """What a folder holds."""

    kind: Literal["reference scores"] = "reference scores"
    format: Literal[1] = FORMAT
    version: str
    device: str
    reference: Reference
    tokenizer: TokenizerFacts
    settings: Settings
    inputs: tuple[Input, ...]

    def checksum(self) -> str:
        """SHA-256 (hex) of all that it says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """From here on the folder is finished."""
        text = json.dumps(self.model_dump(mode="json") | {"checksum": self.checksum()}, indent=1)
        write_atomically(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: there is none, the scoring has not come to its end, or it is damaged.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of reference scores" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}")
    if (folder / JOURNAL).exists():
        raise UserError(f"{folder} is half written: {CONTINUE}")
    try:
        stored = json.loads(read_text(folder / MANIFEST))
        checksum = stored.pop("checksum")
        if (number := stored.get("format")) != FORMAT:
            raise ValueError(f"its format is {number!r}, and this version reads {FORMAT}")
        manifest = Manifest.model_validate_json(json.dumps(stored))
        if manifest.checksum() != checksum:
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no reference scores: {MANIFEST} is missing") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / MANIFEST} is damaged: {where}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from None
    return manifest


def what_is_damaged(folder: Path, file: StoredFile, *, contents: bool) -> str | None:
    """What is wrong with a file of the folder, compared with its manifest; None if nothing is.

    Args:
        folder: where it is.
        file: as the manifest has it.
        contents: False compares sizes alone, which takes no time.
    """
    path = folder / file.name
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != file.size:
            return f"{path} is damaged: it has {size} bytes instead of {file.size}"
        if contents and sha256_of(path) != file.sha256:
            return f"{path} is damaged: its SHA-256 differs"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None
