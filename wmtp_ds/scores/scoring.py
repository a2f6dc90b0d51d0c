"""Computes what a reference model says of every token of data files, once: restartable, by several processes.

Rows are cut into pieces of about as many tokens; each piece becomes one file, written whole, and is then entered in a
journal with its checksum. The same command goes on where a kill has left it. The manifest comes last.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from wmtp_ds import __version__
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.label_file_journal import Journal, begun_from
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import nearest_folder, replace_file, sha256_of
from wmtp_ds.models.loading import check_architecture, load_tokenizer
from wmtp_ds.models.model_fingerprint import compute_model_fingerprint, file_versions, model_outline
from wmtp_ds.models.tokenizer_file import read_vocabulary, tokenizer_fingerprint
from wmtp_ds.out_of_memory import is_out_of_memory
from wmtp_ds.rank import share_cores
from wmtp_ds.scores.manifest import (
    JOURNAL,
    MANIFEST,
    Input,
    Manifest,
    Reference,
    Shard,
    StoredFile,
    TokenizerFacts,
    read_manifest,
    what_is_damaged,
)
from wmtp_ds.scores.reader import row_checksum
from wmtp_ds.scores.worker import Data, Piece, Scorer, Work, device_of
from wmtp_ds.signals import die_with_parent

SHARD_TOKENS = 2**20
_CHUNK = 512  # rows whose tokens are counted together
_OURS = ("input", ".partial-", MANIFEST, f".{MANIFEST}")  # how names in the folder begin
_SPARE = 2**20  # bytes beside the scores: manifest and journal


class Scoring:
    """One scoring, from what was typed to the manifest.

    Args:
        work: what is scored, with what, and how.
        processes: that score side by side, each with a copy of the reference.

    Raises:
        UserError: a file or a model is not what it should be.
    """

    def __init__(self, work: Work, processes: int = 1):
        self.work, self.processes = work, processes
        self._indexes = [build_index(source) for source in work.inputs]
        self._check_inputs()
        tokenizer = load_tokenizer(work.tokenizer)
        self.facts = Manifest(
            version=__version__,
            device=work.device,
            reference=_reference(work.reference),
            tokenizer=_tokenizer(work, TextEncoder(tokenizer)),
            settings=work.settings,
            inputs=(),
        )
        self._data = [Data(work, source, tokenizer) for source in work.inputs]

    def _check_inputs(self) -> None:
        seen: dict[str, Path] = {}
        for source, index in zip(self.work.inputs, self._indexes, strict=True):
            if other := seen.get(index.fingerprint):
                raise UserError(f"--input {source}: has the content of {other}: name it once")
            seen[index.fingerprint] = source

    def run(
        self,
        *,
        force: bool = False,
        on_start: Callable[[int], None] = lambda total: None,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> tuple[Manifest, bool]:
        """Score what is not scored yet.

        Args:
            force: replace scores of something else.
            on_start: called with the number of rows.
            on_done: called with how many are done since the last call; with those of an earlier run, too.

        Returns:
            The manifest, and whether all was there already.

        Raises:
            UserError: the folder holds other things, the disk is too small, or a loss is not finite.
            RunError: writing failed, a process has died, or the memory is too small.
        """
        output = self.work.output
        earlier = self._earlier(force)
        plans = self._plans()
        on_start(sum(map(len, self._indexes)))
        try:
            output.mkdir(parents=True, exist_ok=True)
            with Journal(output / MANIFEST, self._made_from(), _is_shard) as journal:
                manifest, all_there = self._score(journal, plans, earlier, on_done)
                journal.remove()
        except OSError as error:
            raise RunError(
                f"{output}: writing failed: {error.strerror or error}. Mend that; the same command goes on"
            ) from None
        return manifest, all_there

    def _score(
        self, journal: Journal, plans: Sequence["_Plan"], earlier: dict[str, Shard], on_done: Callable[[int], None]
    ) -> tuple[Manifest, bool]:
        output = self.work.output
        done = earlier | {entry["name"]: Shard.model_validate(entry) for entry in journal}
        pieces = {piece.name: piece for plan in plans for piece in plan.pieces}
        done = {
            name: shard
            for name, shard in done.items()
            if (piece := pieces.get(name)) is not None
            and (shard.rows, shard.tokens) == (piece.rows, piece.tokens)
            and what_is_damaged(output, shard, contents=True) is None
        }
        missing = [piece for piece in pieces.values() if piece.name not in done]
        self._check_disk(plans, done)
        if missing:
            (output / MANIFEST).unlink(missing_ok=True)
        for shard in done.values():
            on_done(shard.rows)
        for shard in self._new(missing, on_done):
            journal.append(shard.model_dump(mode="json"))
            done[shard.name] = shard
        inputs = tuple(plan.finished(self.work, self._indexes[plan.number], done) for plan in plans)
        manifest = self.facts.model_copy(update={"inputs": inputs})
        known = {file.name for found in inputs for file in found.files()}
        for stray in output.glob("input*.npy"):  # of scores that were replaced
            if stray.name not in known:
                stray.unlink()
        manifest.write(output)
        return manifest, not missing

    def _made_from(self) -> dict[str, Any]:
        return _made_from(self.facts, [index.fingerprint for index in self._indexes])

    def _earlier(self, force: bool) -> dict[str, Shard]:
        """Scores of a finished scoring of just this, by name; some of them may be damaged."""
        output = self.work.output
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file: name a folder")
        names = [path.name for path in output.iterdir()] if output.exists() else []
        if foreign := sorted(name for name in names if not name.startswith(_OURS)):
            raise UserError(f"--output {output}: holds other files ({foreign[0]}): name a folder for the scores alone")
        earlier: dict[str, Shard] = {}
        made_from = self._made_from()
        if JOURNAL in names:
            begun = begun_from(output / JOURNAL)
            same = begun is None or begun == made_from
        elif MANIFEST in names:
            try:
                found = read_manifest(output)
            except UserError as error:
                if force:
                    return {}
                raise UserError(
                    f"--output {error}: give another --output, or --force to make the scores anew"
                ) from None
            same = _made_from(found, [scored.sha256 for scored in found.inputs]) == made_from
            earlier = {shard.name: shard for scored in found.inputs for shard in scored.shards}
        else:
            return {}
        if same:
            return earlier
        if force:
            return {}
        raise UserError(
            f"--output {output}: holds scores of another model, other data or other settings: give another --output, "
            "or --force to replace them"
        )

    def _plans(self) -> list["_Plan"]:
        """What is to be done for each input.

        Raises:
            UserError: there is nothing to be scored.
        """
        plans = [self._plan(number, data) for number, data in enumerate(self._data)]
        for plan, source in zip(plans, self.work.inputs, strict=True):
            if not plan.scored:
                which = "correct row" if self.work.settings.correct_only else "row"
                limit = self.work.settings.max_length
                raise UserError(f"--input {source}: no solution of a {which} fits into --max-length {limit} tokens")
        return plans

    def _plan(self, number: int, data: Data) -> "_Plan":
        """Count tokens, and cut the rows into pieces."""
        rows = len(data.index)
        counts, checksums = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for start in range(0, rows, _CHUNK):
            chunk = range(start, min(start + _CHUNK, rows))
            for row, (tokens, count) in zip(chunk, data.read(chunk), strict=True):
                counts[row], checksums[row] = count, row_checksum(tokens)
        ends = counts.cumsum()
        numbers = (ends - counts) // self.work.settings.shard_tokens  # a piece of each row
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        pieces = [
            Piece(
                f"input{number}-{place:05d}.npy", number, int(first), int(after - first), int(counts[first:after].sum())
            )
            for place, (first, after) in enumerate(zip(firsts, [*firsts[1:], rows], strict=True))
        ]
        return _Plan(number, np.stack([ends, checksums], 1), int((counts > 0).sum()), pieces)

    def _check_disk(self, plans: Sequence["_Plan"], done: dict[str, Shard]) -> None:
        size = np.dtype(self.work.settings.dtype).itemsize
        missing = sum(piece.tokens for plan in plans for piece in plan.pieces if piece.name not in done)
        needed = missing * size + sum(plan.index.nbytes for plan in plans) + _SPARE
        free = shutil.disk_usage(nearest_folder(self.work.output)).free
        if needed > free:
            narrower = " or take --dtype float16," if size == 4 else ""
            raise UserError(
                f"--output {self.work.output}: the scores take {needed / 2**30:.2f} GiB more, and "
                f"{free / 2**30:.2f} GiB are free there: make room,{narrower} or name a folder on another disk"
            )

    def _new(self, pieces: Sequence[Piece], on_done: Callable[[int], None]) -> Iterator[Shard]:
        """Score pieces, in whatever order they come."""
        if not pieces:
            return
        try:
            if self.processes == 1:
                scorer = Scorer(self.work, device_of(self.work.device, 0))
                for piece in pieces:
                    yield scorer.write(piece, on_done)
            else:
                yield from self._in_processes(pieces, on_done)
        except BrokenProcessPool:
            raise RunError(
                "a process that computes scores has been ended. Where that was for want of memory, lower --batch-size "
                "or --processes; the same command goes on"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = self.work.batch_size
            raise RunError(
                f"out of memory with {size} rows of up to {self.work.settings.max_length} tokens a pass: lower "
                "--batch-size (or --processes on a CPU); the same command goes on"
            ) from None

    def _in_processes(self, pieces: Sequence[Piece], on_done: Callable[[int], None]) -> Iterator[Shard]:
        context = multiprocessing.get_context("spawn")
        count = min(self.processes, len(pieces))
        pool = ProcessPoolExecutor(count, context, _begin, (self.work, context.Value("i", 0), count, os.getpid()))
        try:
            waiting: dict[Future[Shard], Piece] = {pool.submit(_write, piece): piece for piece in pieces}
            for future in as_completed(waiting):
                yield future.result()
                on_done(waiting[future].rows)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One input's rows: where each one's scores end and its checksum ``[rows, 2]``, and the pieces."""

    number: int
    index: np.ndarray
    scored: int
    pieces: list[Piece]

    def finished(self, work: Work, data: DataIndex, shards: dict[str, Shard]) -> Input:
        """What the manifest says of it; writes the file of its rows."""
        path = work.output / f"input{self.number}-rows.npy"
        partial = path.with_name(f".partial-{path.name}")
        with partial.open("wb") as stream:
            np.save(stream, self.index, allow_pickle=False)
        replace_file(partial, path)
        return Input(
            path=str(data.path),
            sha256=data.fingerprint,
            size=data.path.stat().st_size,
            rows=len(data),
            scored=self.scored,
            tokens=int(self.index[-1, 0]),
            index=StoredFile(name=path.name, size=path.stat().st_size, sha256=sha256_of(path)),
            shards=tuple(shards[piece.name] for piece in self.pieces),
        )


def _reference(folder: Path) -> Reference:
    if not folder.is_dir():
        raise UserError(f"--reference: {folder} does not exist: name the folder of the reference model")
    check_architecture(folder, n_future_tokens=1)
    return Reference(
        path=str(folder.resolve()),
        fingerprint=compute_model_fingerprint(folder),
        outline=model_outline(folder),
        files=file_versions(folder),
    )


def _tokenizer(work: Work, encoder: TextEncoder) -> TokenizerFacts:
    """What makes the token ids, once it is sure that the reference means the same by them."""
    vocabulary = read_vocabulary(work.tokenizer / "tokenizer.json")
    own = work.reference / "tokenizer.json"
    if own.is_file() and own.parent != work.tokenizer and (theirs := read_vocabulary(own)) != vocabulary:
        first = next(i for i in sorted(theirs.keys() | vocabulary.keys()) if theirs.get(i) != vocabulary.get(i))
        raise UserError(
            f"--tokenizer {work.tokenizer}: is not the reference's: token {first} is {vocabulary.get(first)!r} there "
            f"and {theirs.get(first)!r} in {own}: a reference must share the policy's tokenizer"
        )
    size = check_architecture(work.reference, n_future_tokens=1).vocab_size
    if (highest := max(vocabulary)) >= size:
        raise UserError(
            f"--reference {work.reference}: embeds {size} tokens, and the tokenizer in {work.tokenizer} has one of id "
            f"{highest}: name the tokenizer that belongs to the model"
        )
    return TokenizerFacts(
        path=str(work.tokenizer),
        fingerprint=encoder.fingerprint,
        vocabulary=tokenizer_fingerprint(vocabulary),
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
    )


def _made_from(facts: Manifest, inputs: list[str]) -> dict[str, Any]:
    """All that decides scores but for their last bits: batch sizes and devices are no part of it."""
    told = facts.model_dump(mode="json")
    return {name: told[name] for name in ("kind", "format", "settings")} | {
        "reference": facts.reference.fingerprint,
        "tokenizer": [facts.tokenizer.fingerprint, facts.tokenizer.bos_id, facts.tokenizer.eos_id],
        "inputs": inputs,
    }


def _is_shard(entry: dict[str, Any]) -> bool:
    with contextlib.suppress(ValidationError):
        Shard.model_validate(entry)
        return True
    return False


_scorer: Scorer  # of a process of the pool


def _begin(work: Work, number: Any, processes: int, parent: int) -> None:
    """Make a process ready to score."""
    global _scorer
    die_with_parent()
    if os.getppid() != parent:  # it has died while this process began, and would be waited for in vain
        os._exit(1)
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    if work.device == "cpu":
        share_cores(processes)
    _scorer = Scorer(work, device_of(work.device, own))


def _write(piece: Piece) -> Shard:
    return _scorer.write(piece)
