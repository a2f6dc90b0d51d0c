"""Gives a run's batches the reference's losses that were computed beforehand, once it is sure that they are right."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError
from wmtp_ds.run_data import RunData
from wmtp_ds.scores.fit import KEY, TokenIds, Wanted, find_input, reasons
from wmtp_ds.scores.manifest import MEND, Input, Manifest, read_manifest, what_is_damaged
from wmtp_ds.scores.reader import ReferenceScores

logger = logging.getLogger("wmtp_ds")


def use_scores(resolved: Resolved, data: RunData) -> None:
    """Let batches of training rows carry the reference's losses, if ``models.reference.scores`` names them.

    Called on every rank before the process group forms; one rank of each machine reads every byte of them.

    Raises:
        UserError: they are damaged, or not of this run's data, tokenizer, reference or settings; says why.
    """
    config = resolved.config
    reference = config.models.reference
    if not config.training.needs_reference or reference is None or reference.scores is None:
        return
    folder = Path(reference.scores)
    encoder, tokenizer = data.collator.encoder, Path(config.models.policy.tokenizer_path)
    # One rank of each machine: reading gigabytes takes a moment.
    thorough = os.environ.get("LOCAL_RANK", "0") == "0"
    wanted = Wanted(
        folder,
        data=data.train.path,
        data_sha256=data.train.fingerprint,
        tokenizer=TokenIds(tokenizer, None, encoder.fingerprint, encoder.bos_id, encoder.eos_id),
        reference=None if reference.path is None else Path(reference.path),
        template=config.dataset.template,
        max_length=config.dataset.max_length,
        compute_dtype=config.reference_dtype,
        read_weights=thorough,
    )
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        raise UserError(f"{KEY}: {error}\n  To make them: {wanted.command()}") from None
    if found := reasons(manifest, wanted):
        lines = "".join(f"\n  {reason.key}: {reason.message}" for reason in found)
        raise UserError(f"{KEY}: the scores in {folder} are not those of this run:{lines}\n  {_again(wanted)}")
    scored = find_input(manifest, wanted)
    assert scored is not None, "its absence is a reason"
    if thorough:
        logger.info("checking the reference scores in %s", folder)
    scores = _open(folder, manifest, scored, thorough)
    missing = scores.unscored(data.train_rows())
    if len(missing):
        where = data.train.where(int(missing[0]))
        raise UserError(
            f"{KEY}: the run draws {len(missing)} rows that were not scored, first {where}: the scores in {folder} are "
            "of correct rows alone (--correct-only). Set data_sampling.correct_ratio = 1.0 and balance_correct = true, "
            f"or score all rows: {wanted.command()} --force"
        )
    data.scores = data.collator.reference = scores
    # Of the validation data, too, if they were scored: the pages of each evaluation need them, and nothing else does.
    held_out = replace(wanted, data=data.validation.path, data_sha256=data.validation.fingerprint)
    if (shown := find_input(manifest, held_out)) is not None:
        of_validation = _open(folder, manifest, shown, thorough)
        if not len(of_validation.unscored(data.validation_rows)):
            data.validation_collator.reference = of_validation


def _open(folder: Path, manifest: Manifest, scored: Input, thorough: bool) -> ReferenceScores:
    for file in scored.files():
        if problem := what_is_damaged(folder, file, contents=thorough):
            raise UserError(f"{KEY}: {problem}: {MEND}")
    return ReferenceScores(folder, manifest, scored)


def _again(wanted: Wanted) -> str:
    return f"Set what they were computed with, or compute them for this run: {wanted.command()} --force"
