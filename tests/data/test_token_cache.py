"""Tokens are made once and kept: the same to the bit as without, whatever happens to the folder or the processes."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wmtp_ds.data import token_cache
from wmtp_ds.data.batches import Collator, TextEncoder, eligible_rows
from wmtp_ds.data.index import build_index
from wmtp_ds.data.loader import load_batch, load_windows
from wmtp_ds.data.sampling import SamplePlan
from wmtp_ds.data.templates import alpaca, plain
from wmtp_ds.data.token_cache import FORMAT, HEADER, open_token_cache
from wmtp_ds.errors import RunError

ROWS = 40
PIECES = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def tokenizer(*, lowercase: bool = False, pieces: list[str] | None = None):
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces or PIECES)}, []))
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write(path: Path, letter: str = "x", rows: int = ROWS) -> None:
    with path.open("w") as handle:
        for i in range(rows):
            row = {"problem_id": "p", "instruction": f"Do {i} é", "output": letter * (i + 1), "is_correct": i % 2 == 0}
            handle.write(json.dumps(row) + "\n")


@pytest.fixture
def index(tmp_path):
    write(tmp_path / "d.jsonl")
    return build_index(tmp_path / "d.jsonl")


@pytest.fixture
def encoder():
    return TextEncoder(tokenizer())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, caplog):
    monkeypatch.setattr(token_cache, "_CHUNK", 16)
    monkeypatch.setattr(token_cache, "_POLL_SECONDS", 0.005)
    caplog.set_level(logging.INFO, "wmtp_ds")


def folders(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


def said(caplog, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def expected(index, encoder, template=plain):
    rows = [index.read_row(i) for i in range(len(index))]
    return [(encoder([template(row)])[0], encoder([row.output])[0]) for row in rows]


def content(cache, rows=None):
    found = cache.read(np.arange(ROWS) if rows is None else np.array(rows, np.int64))
    return [(prompt.tolist(), solution.tolist()) for prompt, solution in found]


@pytest.fixture
def cache(index, encoder, tmp_path):
    return open_token_cache(index, encoder, plain, tmp_path / "cache")


# --- what it holds ---


def test_it_holds_what_the_tokenizer_says(cache, index, encoder):
    assert content(cache) == expected(index, encoder)
    assert content(cache, [39, 0, 0, 7]) == [expected(index, encoder)[i] for i in (39, 0, 0, 7)]
    assert content(cache, []) == []
    prompts, solutions = cache.lengths()
    assert [*zip(prompts, solutions, strict=True)] == [(len(p), len(s)) for p, s in expected(index, encoder)]
    some = np.array([0, 5, 39])
    assert [part.tolist() for part in cache.lengths(some)] == [prompts[some].tolist(), solutions[some].tolist()]


def test_it_is_made_once(cache, index, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "encode_rows", None)
    again = open_token_cache(index, encoder, plain, tmp_path / "cache")
    assert content(again) == content(cache)
    [folder] = folders(tmp_path / "cache")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    header = json.loads((folder / HEADER).read_text())
    assert (header["rows"], header["format"], header["data"]) == (ROWS, FORMAT, index.fingerprint)
    assert np.load(folder / "tokens.npy").shape == (header["tokens"],)
    assert np.load(folder / "tokens.npy").dtype == np.uint16


def test_wide_vocabularies(index, tmp_path):
    pieces = [*PIECES, *(f"unused{i}" for i in range(2**16))]
    pieces.remove("x")
    encoder = TextEncoder(tokenizer(pieces=[*pieces, "x"]))
    cache = open_token_cache(index, encoder, plain, tmp_path / "cache")
    assert content(cache) == expected(index, encoder)
    assert content(cache)[3][1] == [len(pieces)] * 4
    assert np.load(folders(tmp_path / "cache")[0] / "tokens.npy").dtype == np.uint32


def test_other_data_tokenizer_template_or_format_is_another_cache(cache, index, encoder, tmp_path, monkeypatch):
    where = tmp_path / "cache"
    assert len(folders(where)) == 1
    write(tmp_path / "other.jsonl", "y")
    other = build_index(tmp_path / "other.jsonl")
    assert content(open_token_cache(other, encoder, plain, where)) == expected(other, encoder)
    lower = TextEncoder(tokenizer(lowercase=True))
    assert content(open_token_cache(index, lower, plain, where)) == expected(index, lower)
    assert content(open_token_cache(index, encoder, alpaca, where)) == expected(index, encoder, alpaca)
    assert len(folders(where)) == 4
    monkeypatch.setattr(token_cache, "FORMAT", FORMAT + 1)
    open_token_cache(index, encoder, plain, where)
    monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name: "0.0.1")
    open_token_cache(index, encoder, plain, where)
    assert len(folders(where)) == 6


def test_the_same_content_elsewhere_is_the_same_cache(cache, encoder, tmp_path, monkeypatch):
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "d.jsonl", tmp_path / "copy/e.jsonl")
    monkeypatch.setattr(token_cache, "encode_rows", None)
    assert content(open_token_cache(build_index(tmp_path / "copy/e.jsonl"), encoder, plain, tmp_path / "cache"))


def test_no_folder_no_cache(index, encoder):
    assert open_token_cache(index, encoder, plain, None) is None


def test_it_is_made_a_few_rows_at_a_time(index, encoder, tmp_path, monkeypatch):
    largest = []
    whole = token_cache.encode_rows
    monkeypatch.setattr(token_cache, "encode_rows", lambda e, t, rows: largest.append(len(rows)) or whole(e, t, rows))
    assert open_token_cache(index, encoder, plain, tmp_path / "cache") is not None
    assert largest == [16, 16, 8]


# --- what a run sees ---


@pytest.mark.parametrize("max_length", [20, 64])
def test_batches_are_the_same_to_the_bit(cache, index, max_length):
    def batches(cache):
        made = Collator(tokenizer(), plain, max_length)
        plan = SamplePlan(index, np.random.default_rng(0).integers(0, ROWS, 36), 12, ROWS, ((0, 36),), ())
        options = {"rank": 1, "world_size": 2, "batch_size": 3, "accumulation": 2}
        windows = load_windows(index, plan, made, **options, cache=cache)
        found = [[vars(batch) for batch in window] for window in windows]
        return found, (made.truncated, made.skipped)

    (with_cache, counts), (without, same_counts) = batches(cache), batches(None)
    assert counts == same_counts
    assert len(with_cache) == 3
    for window, other in zip(with_cache, without, strict=True):
        for batch, twin in zip(window, other, strict=True):
            assert batch.keys() == twin.keys()
            assert batch.pop("reference") is twin.pop("reference") is None
            for name, tensor in batch.items():
                assert tensor.dtype == twin[name].dtype
                assert torch.equal(tensor, twin[name]), name


@pytest.mark.parametrize("max_length", [2, 9, 10, 30, 41, 42, 43])
def test_the_same_rows_are_eligible(cache, index, max_length):
    with_cache, left_out = eligible_rows(index, tokenizer(), max_length, cache)
    without, same = eligible_rows(index, tokenizer(), max_length)
    assert with_cache.tolist() == without.tolist() == [i + 1 <= max_length - 2 for i in range(ROWS)]
    assert left_out == same == int((~without).sum())


def test_a_batch_of_no_rows(cache, index):
    batch = load_batch(index, Collator(tokenizer(), plain, 30), np.array([], np.int64), cache)
    assert batch.input_ids.tolist() == [[0]]
    assert not batch.supervised.any()


# --- damage ---

DAMAGES = {
    "no header": lambda folder: (folder / HEADER).unlink(),
    "header cut": lambda folder: (folder / HEADER).write_text((folder / HEADER).read_text()[:50]),
    "header of another kind": lambda folder: (folder / HEADER).write_text("[]"),
    "tokens cut": lambda folder: os.truncate(folder / "tokens.npy", 200),
    "tokens of another file": lambda folder: (folder / "tokens.npy").open("ab").write(b"more"),
    "tokens missing": lambda folder: (folder / "tokens.npy").unlink(),
    "ends changed": lambda folder: flip(folder / "ends.npy", -3),
    "checksums changed": lambda folder: flip(folder / "checksums.npy", -3),
    "array header changed": lambda folder: flip(folder / "ends.npy", 20),
    "a file in the folder's place": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_again(cache, index, encoder, tmp_path, caplog, damage):
    [folder] = folders(tmp_path / "cache")
    damage(folder)
    again = open_token_cache(index, encoder, plain, tmp_path / "cache")
    assert content(again) == expected(index, encoder)
    [note] = said(caplog)
    assert note.startswith(f"{folder}: damaged token cache, made again")
    assert folders(tmp_path / "cache") == [folder]
    assert {path.name for path in folder.iterdir()} == {HEADER, "tokens.npy", "ends.npy", "checksums.npy"}
    caplog.clear()
    assert content(open_token_cache(index, encoder, plain, tmp_path / "cache")) == content(again)
    assert not said(caplog)


def test_a_damaged_row_is_tokenised_again(cache, index, encoder, tmp_path, caplog):
    """A disk that lies: found when the row is read, by a run that has the cache open."""
    [folder] = folders(tmp_path / "cache")
    begin = int(np.load(folder / "ends.npy")[6, 1])
    size = np.load(folder / "tokens.npy", mmap_mode="r").offset
    with (folder / "tokens.npy").open("r+b") as file:
        file.seek(size + 2 * begin)
        file.write(b"\x07")
    opened = open_token_cache(index, encoder, plain, tmp_path / "cache")
    assert not said(caplog)
    assert content(opened) == expected(index, encoder)
    assert content(opened) == expected(index, encoder)
    [note] = said(caplog)
    assert "damaged at row 7" in note
    again = open_token_cache(index, encoder, plain, tmp_path / "cache")
    caplog.clear()
    assert content(again) == expected(index, encoder)
    assert not said(caplog)


def test_a_row_that_cannot_be_made_again_is_an_error(cache, index, tmp_path):
    [folder] = folders(tmp_path / "cache")
    data = np.load(folder / "tokens.npy", mmap_mode="r+")
    data[:] = 5
    data.flush()
    write(index.path, "z", 10)
    with pytest.raises(RunError, match="has changed while it was in use"):
        cache.read(np.array([30]))


# --- no place to keep it ---


def test_a_full_disk_is_a_warning(index, encoder, tmp_path, caplog, monkeypatch):
    append, calls = token_cache._ArrayFile.append, []

    def fail(self, values):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, values)

    monkeypatch.setattr(token_cache._ArrayFile, "append", fail)
    assert open_token_cache(index, encoder, plain, tmp_path / "cache") is None
    [note] = said(caplog)
    assert "No space left on device" in note
    assert "dataset.cache_dir" in note
    assert not folders(tmp_path / "cache")


def test_what_fails_when_a_file_is_closed_counts_too(index, encoder, tmp_path, caplog, monkeypatch):
    def fail(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache._ArrayFile, "close", fail)
    assert open_token_cache(index, encoder, plain, tmp_path / "cache") is None
    assert "No space left on device" in said(caplog)[0]
    assert not folders(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_a_warning(index, encoder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert open_token_cache(index, encoder, plain, tmp_path / "cache") is None
    [note] = said(caplog)
    assert "no tokens can be kept there" in note


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_warning(index, encoder, tmp_path, caplog):
    (tmp_path / "cache").mkdir(mode=0o555)
    assert open_token_cache(index, encoder, plain, tmp_path / "cache") is None
    assert "Permission denied" in said(caplog)[0]


def test_a_ready_cache_in_a_read_only_folder_is_used(cache, index, encoder, tmp_path, caplog, monkeypatch):
    opened = os.open

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    def read_only(path, flags, *args, **options):
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR) else opened(path, flags, *args, **options)

    monkeypatch.setattr(token_cache.os, "open", read_only)
    monkeypatch.setattr(token_cache.tempfile, "mkdtemp", refuse)
    caplog.clear()
    assert content(open_token_cache(index, encoder, plain, tmp_path / "cache")) == content(cache)
    assert not said(caplog)
    assert open_token_cache(index, encoder, alpaca, tmp_path / "cache") is None
    assert "Permission denied" in said(caplog)[0]


def test_without_locks_it_works_all_the_same(index, encoder, tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(token_cache.fcntl, "flock", none)
    (tmp_path / "cache").mkdir()
    cache = open_token_cache(index, encoder, plain, tmp_path / "cache")
    assert content(cache) == expected(index, encoder)


# --- several processes ---


def build(path: str, where: str, started, tokenised, pause: float, results) -> None:
    """What a rank does; ``tokenised`` counts the rows that any of them tokenised."""
    whole = token_cache.encode_rows

    def slow(encoder, template, rows):
        time.sleep(pause)
        with tokenised.get_lock():
            tokenised.value += len(rows)
        return whole(encoder, template, rows)

    token_cache.encode_rows, token_cache._CHUNK, token_cache._POLL_SECONDS = slow, 16, 0.005
    index, encoder = build_index(path), TextEncoder(tokenizer())
    started.wait()
    cache = open_token_cache(index, encoder, plain, Path(where))
    results.put(None if cache is None else cache.lengths()[1].tolist())


def test_several_at_once_make_one(index, tmp_path):
    context = multiprocessing.get_context("fork")
    started, tokenised, results = context.Event(), context.Value("i"), context.Queue()
    arguments = (str(index.path), str(tmp_path / "cache"), started, tokenised, 0.02, results)
    processes = [context.Process(target=build, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    started.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [list(range(1, ROWS + 1))] * 4
    assert tokenised.value == ROWS
    assert len(folders(tmp_path / "cache")) == 1


def test_a_process_killed_in_the_middle_leaves_no_cache(index, encoder, tmp_path):
    where = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    started, tokenised, results = context.Event(), context.Value("i"), context.Queue()
    process = context.Process(target=build, args=(str(index.path), str(where), started, tokenised, 0.2, results))
    process.start()
    started.set()
    deadline = time.monotonic() + 30
    while tokenised.value == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    [left] = folders(where)
    assert left.name.startswith(token_cache.PARTIAL)
    cache = open_token_cache(index, encoder, plain, where)
    assert content(cache) == expected(index, encoder)
    assert folders(where) == [cache.folder]


def test_who_waited_for_one_that_failed_does_not_try_the_same(index, encoder, tmp_path, caplog):
    """On a full disk eight ranks would otherwise tokenise everything in vain, one after another."""
    where = tmp_path / "cache"
    where.mkdir()
    folder = token_cache._Lock(where / ".lock-x", index.path)
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import sys
            from pathlib import Path
            from wmtp_ds.data.token_cache import _Lock
            with _Lock(Path({str(where / ".lock-x")!r}), Path("d")) as lock:
                print(lock.held, lock.failed_meanwhile, flush=True)
                sys.stdin.readline()
                lock.mark_failed()
        """)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "True False\n"
    threading.Timer(0.3, lambda: holder.communicate("\n")).start()
    with folder as lock:
        assert lock.held
        assert lock.failed_meanwhile
    assert any("waiting for another process" in text for text in said(caplog, logging.INFO))
    with token_cache._Lock(where / ".lock-x", index.path) as later:  # the disk may have room by now
        assert not later.failed_meanwhile
    holder.wait(30)


# --- what is said meanwhile ---


def test_progress_is_told_where_it_takes_long(index, encoder, tmp_path, caplog, monkeypatch):
    clock = [0.0]

    def tick():
        clock[0] += 2.0
        return clock[0]

    monkeypatch.setattr(token_cache.time, "monotonic", tick)
    open_token_cache(index, encoder, plain, tmp_path / "cache")
    lines = [text for text in said(caplog, logging.INFO) if "token" in text]
    assert lines[0] == f"tokenising {index.path}, once: 32 of 40 rows, 1 s left"
    assert lines[-1].startswith(f"tokenised {index.path}: 40 rows in")


def test_the_tokenizers_threads_are_used_and_then_left_as_they_were(index, tmp_path, monkeypatch):
    seen = []
    whole = token_cache.encode_rows
    monkeypatch.setattr(
        token_cache,
        "encode_rows",
        lambda *a: seen.append(os.environ.get("TOKENIZERS_PARALLELISM")) or whole(*a),
    )
    for before in ("false", None):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        open_token_cache(index, TextEncoder(tokenizer()), plain, tmp_path / f"cache-{before}")
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert set(seen) == {"true"}


def test_templates_are_told_apart():
    found = [token_cache._fingerprint_of_template(t) for t in (plain, alpaca, lambda row: plain(row) + " ")]
    assert len(set(found)) == 3
