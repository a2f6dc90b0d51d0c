"""Checks of reference scores: whether they are whole, and of the run's data, tokenizer, reference and settings."""

import os
from pathlib import Path

from wmtp_ds.config.check_models import read_tokenizer
from wmtp_ds.config.context import Check, Context
from wmtp_ds.errors import UserError
from wmtp_ds.files import sha256_of
from wmtp_ds.models.tokenizer_file import tokenizer_fingerprint
from wmtp_ds.scores.fit import KEY, TokenIds, Wanted, find_input, reasons
from wmtp_ds.scores.manifest import MEND, read_manifest, what_is_damaged

# Of a data file that is read to tell whether it is the same; a longer one is told by its size until training starts.
_MOST_BYTES = 32 * 2**20


def check_scores(context: Context) -> None:
    """Scores fit the run, as far as can be told in no time; training looks at every byte before it starts."""
    if not (context.training and context.training.needs_reference) or (path := context.path(KEY)) is None:
        return
    wanted = _wanted(context, Path(path))
    folder, command = wanted.folder, wanted.command()
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        context.report(KEY, str(error), f"compute them: {command}")
        return
    for reason in reasons(manifest, wanted):
        mend = f"set what they were computed with, or compute them for this run: {command} --force"
        context.report(reason.key, reason.message, mend)
    scored = find_input(manifest, wanted)
    for file in scored.files() if scored else ():
        if problem := what_is_damaged(folder, file, contents=False):
            context.report(KEY, problem, MEND)
            return
    reference = context.path("models.reference.path")
    if reference is not None and not os.path.isdir(reference):
        message = f"{reference} does not exist, so nobody can tell whether the scores in {folder} are of that model"
        context.warn("models.reference.path", message, "remove the key, or put the model there to be sure")


def _wanted(context: Context, folder: Path) -> Wanted:
    data = context.path("dataset.train")
    if data is not None and not os.path.isfile(data):
        data = None  # check_dataset says so
    tokens = read_tokenizer(context, "policy", silent=True)  # check_policy says what is wrong with it
    dtype = context.get("models.reference.dtype")
    reference = context.path("models.reference.path")
    return Wanted(
        folder,
        data=Path(data) if data else None,
        data_sha256=_sha256(data) if data else None,
        tokenizer=TokenIds(tokens.path.parent, tokenizer_fingerprint(tokens.tokens)) if tokens else None,
        reference=Path(reference) if reference else None,
        template=context.get("dataset.template"),
        max_length=context.get("dataset.max_length"),
        compute_dtype="float32" if context.get("runtime.mixed_precision") is False else dtype,
    )


def _sha256(path: str) -> str | None:
    try:
        return sha256_of(Path(path)) if os.path.getsize(path) <= _MOST_BYTES else None
    except OSError:
        return None


SCORE_CHECKS: tuple[Check, ...] = (check_scores,)
