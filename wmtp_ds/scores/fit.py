"""Whether reference scores are those that a run needs; without torch, so that `validate` can say it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wmtp_ds.errors import UserError
from wmtp_ds.models.model_fingerprint import compute_model_fingerprint, file_versions, model_outline
from wmtp_ds.scores.manifest import Input, Manifest

KEY = "models.reference.scores"


@dataclass(frozen=True)
class TokenIds:
    """What makes token ids: None for what is not known."""

    path: Path
    vocabulary: str | None = None
    fingerprint: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its scores; None for what is not known, and not compared.

    Attributes:
        folder: ``models.reference.scores``.
        data: ``dataset.train``, and its SHA-256.
        tokenizer: the policy's.
        reference: ``models.reference.path``.
        compute_dtype: what the reference would compute in.
        read_weights: whether a reference that has been copied, or touched, may be read to tell whether it is the same.
    """

    folder: Path
    data: Path | None = None
    data_sha256: str | None = None
    tokenizer: TokenIds | None = None
    reference: Path | None = None
    template: str | None = None
    max_length: int | None = None
    compute_dtype: str | None = None
    read_weights: bool = False

    def command(self) -> str:
        """The command that makes these scores."""
        options = {
            "--reference": self.reference or "FOLDER",
            "--input": self.data or "FILE",
            "--output": self.folder,
            "--tokenizer": self.tokenizer.path if self.tokenizer else None,
            "--template": self.template,
            "--max-length": self.max_length,
            "--compute-dtype": self.compute_dtype,
        }
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        return f"wmtp-ds data score {shlex.join(words)}"


@dataclass(frozen=True)
class Reason:
    """Why scores are not those that are needed: the key of the config that they do not fit."""

    key: str
    message: str


def reasons(manifest: Manifest, wanted: Wanted) -> list[Reason]:
    """Everything in which scores differ from those that a run needs."""
    return [*_of_data(manifest, wanted), *_of_tokens(manifest, wanted), *_of_model(manifest, wanted)]


def find_input(manifest: Manifest, wanted: Wanted) -> Input | None:
    """The scores of the wanted data; by its size where its SHA-256 is not known."""
    for found in manifest.inputs:
        if wanted.data_sha256 is not None:
            if found.sha256 == wanted.data_sha256:
                return found
        elif wanted.data is not None and found.size == wanted.data.stat().st_size:
            return found
    return None


def _of_data(manifest: Manifest, wanted: Wanted) -> Iterator[Reason]:
    if wanted.data is None or find_input(manifest, wanted) is not None:
        return
    names = ", ".join(found.path for found in manifest.inputs)
    same = any(Path(found.path).name == wanted.data.name for found in manifest.inputs)
    what = "the data have changed since they were scored" if same else "these data were not scored"
    yield Reason("dataset.train", f"{wanted.data}: {what} (the scores in {wanted.folder} are of {names})")


def _of_tokens(manifest: Manifest, wanted: Wanted) -> Iterator[Reason]:
    settings, scored = manifest.settings, f"the scores in {wanted.folder} were computed with"
    if wanted.max_length is not None and wanted.max_length != settings.max_length:
        yield Reason("dataset.max_length", f"is {wanted.max_length}, and {scored} {settings.max_length}")
    if wanted.template is not None and wanted.template != settings.template:
        yield Reason("dataset.template", f'is "{wanted.template}", and {scored} "{settings.template}"')
    ours, theirs = wanted.tokenizer, manifest.tokenizer
    if ours is None:
        return
    names = ("vocabulary", "fingerprint", "bos_id", "eos_id")
    if any(getattr(ours, name) not in (None, getattr(theirs, name)) for name in names):
        message = f"{ours.path} holds another tokenizer than {theirs.path} was, and {scored} that one"
        yield Reason("models.policy.tokenizer_path", message)


def _of_model(manifest: Manifest, wanted: Wanted) -> Iterator[Reason]:
    dtype = manifest.settings.compute_dtype
    if wanted.compute_dtype is not None and wanted.compute_dtype != dtype:
        message = f"the reference would compute in {wanted.compute_dtype}, and the scores in {wanted.folder} were"
        yield Reason("models.reference.dtype", f"{message} computed in {dtype}")
    # Scores stand for a model that need not be there.
    if wanted.reference is None or not wanted.reference.is_dir():
        return
    try:
        same = _is_same(manifest, wanted.reference, read_weights=wanted.read_weights)
    except (UserError, OSError) as error:
        yield Reason("models.reference.path", f"{wanted.reference} cannot be compared with what was scored: {error}")
        return
    if not same:
        message = f"{wanted.reference} holds another model than {manifest.reference.path} was when the scores in "
        yield Reason("models.reference.path", f"{message}{wanted.folder} were computed")


def _is_same(manifest: Manifest, folder: Path, *, read_weights: bool) -> bool:
    scored = manifest.reference
    if file_versions(folder) == scored.files and folder.resolve() == Path(scored.path).resolve():
        return True
    if model_outline(folder) != scored.outline:
        return False
    return not read_weights or compute_model_fingerprint(folder) == scored.fingerprint
