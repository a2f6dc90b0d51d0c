"""The index of a data file, and its cache."""

import hashlib
import json
import multiprocessing
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.data import index as index_module
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.errors import RunError, UserError

COLUMNS = ("offset", "line", "problem", "is_correct", "difficulty", "output_bytes")


def make_rows(count: int) -> list[dict[str, object]]:
    return [
        {
            "problem_id": f"p{i % 3}",
            "instruction": f"Problem {i % 3}: ünïcode",
            "output": f"def f():\n    return '{i}' # é€😀",
            "is_correct": i % 2 == 0,
            **({"difficulty": i % 11 + 1} if i % 4 else {}),
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, object]], between: str = "\n") -> Path:
    path.write_text(between.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def scans(monkeypatch):
    """How often the file itself was read through."""
    count = []
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda *args: count.append(1) or scan(*args))
    return count


def assert_same(left: DataIndex, right: DataIndex) -> None:
    for name in COLUMNS:
        first, second = getattr(left, name), getattr(right, name)
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    assert (left.problem_names, left.fingerprint) == (right.problem_names, right.fingerprint)


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_columns_and_rows(tmp_path, between, end):
    rows = make_rows(13)
    path = write(tmp_path / "d.jsonl", rows, between)
    with path.open("a") as handle:
        handle.write(end)
    index = build_index(path)
    assert len(index) == 13
    assert index.path == path
    assert index.problem_names == ["p0", "p1", "p2"]
    assert [index.problem_names[code] for code in index.problem] == [row["problem_id"] for row in rows]
    assert index.is_correct.tolist() == [row["is_correct"] for row in rows]
    assert index.is_correct.dtype == np.bool_
    assert index.difficulty.tolist() == [row.get("difficulty", 0) for row in rows]
    assert index.output_bytes.tolist() == [len(str(row["output"]).encode()) for row in rows]
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(lines[number - 1]) for number in index.line] == rows
    assert index.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    for i in (12, 0, 5):
        row = index.read_row(i)
        assert (row.output, row.problem_id, row.is_correct) == tuple(
            rows[i][key] for key in ("output", "problem_id", "is_correct")
        )


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=20))
def test_any_text_is_found_again(tmp_path_factory, outputs):
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    index = build_index(write(path, [make_rows(1)[0] | {"output": output} for output in outputs]))
    assert [index.read_row(i).output for i in range(len(index))] == outputs


def test_the_second_time_only_the_cache_is_read(tmp_path, scans):
    path = write(tmp_path / "d.jsonl", make_rows(50))
    first = build_index(path)
    assert (tmp_path / ".d.jsonl.index.npz").exists()
    second = build_index(path)
    assert len(scans) == 1
    assert_same(first, second)
    assert second.read_row(49).output == make_rows(50)[49]["output"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".d.jsonl.index.npz", "d.jsonl"]


@pytest.mark.parametrize("change", ["size", "time", "schema"])
def test_a_cache_of_another_file_or_schema_is_made_again(tmp_path, scans, monkeypatch, change):
    path = write(tmp_path / "d.jsonl", make_rows(5))
    status = path.stat()
    build_index(path)
    rows = make_rows(6 if change == "size" else 5)
    if change != "schema":
        write(path, rows)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    if change == "schema":
        monkeypatch.setattr(index_module, "CACHE_SCHEMA", index_module.CACHE_SCHEMA + 1)
    assert len(build_index(path)) == len(rows)
    assert len(scans) == 2
    build_index(path)
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "column", "pickle", "folder"])
def test_a_damaged_cache_is_made_again(tmp_path, scans, damage):
    path = write(tmp_path / "d.jsonl", make_rows(50))
    good = build_index(path)
    cache = tmp_path / ".d.jsonl.index.npz"
    stored = bytearray(cache.read_bytes())
    if damage == "flipped":
        stored[len(stored) // 2] ^= 1
    if damage == "column":
        with np.load(cache) as arrays:
            np.savez(cache, **{name: arrays[name] for name in arrays.files if name != "line"})
    elif damage == "pickle":
        np.savez(cache, text=np.array([{}], dtype=object))
    elif damage == "folder":
        cache.unlink()
        cache.mkdir()
    else:
        cuts = {"empty": b"", "text": b"no archive", "cut": stored[: len(stored) // 2], "flipped": stored}
        cache.write_bytes(cuts[damage])
    assert_same(build_index(path), good)
    assert len(scans) == 2
    build_index(path)
    assert len(scans) == 2


def test_data_in_a_folder_that_cannot_be_written_is_cached_elsewhere(tmp_path, scans, cache_home, monkeypatch):
    path = write(tmp_path / "d.jsonl", make_rows(5))
    temporary_file = index_module.tempfile.NamedTemporaryFile

    def refuse(*args, dir, **kwargs):  # permissions do not stop root
        if Path(dir) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return temporary_file(*args, dir=dir, **kwargs)

    monkeypatch.setattr(index_module.tempfile, "NamedTemporaryFile", refuse)
    first = build_index(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.jsonl"]
    assert len(list(cache_home.rglob("*.npz"))) == 1
    assert_same(build_index(path), first)
    assert len(scans) == 1


def test_without_any_place_for_a_cache_the_index_is_made_each_time(tmp_path, scans, monkeypatch):
    path = write(tmp_path / "d.jsonl", make_rows(5))

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module.np, "savez", refuse)
    assert len(build_index(path)) == len(build_index(path)) == 5
    assert len(scans) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.jsonl"]


def _index_often(path: Path, results: "multiprocessing.SimpleQueue[object]") -> None:
    cache = path.parent / f".{path.name}.index.npz"
    for _ in range(15):
        index = build_index(path)
        results.put((len(index), index.fingerprint, index.offset.tolist() == sorted(set(index.offset.tolist()))))
        cache.unlink(missing_ok=True)


def test_several_processes_may_index_at_once(tmp_path):
    path = write(tmp_path / "d.jsonl", make_rows(40))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_index_often, args=(path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {results.get() for _ in range(45)}
    for worker in workers:
        worker.join()
    assert found == {(40, hashlib.sha256(path.read_bytes()).hexdigest(), True)}
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert {entry.name for entry in tmp_path.iterdir()} <= {"d.jsonl", ".d.jsonl.index.npz"}


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"])
def test_a_file_without_rows_is_an_error(tmp_path, text):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"d\.jsonl: the data file has no rows"):
        build_index(path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such data file: .*dataset\.train.*wmtp-ds data sample"):
        build_index(tmp_path / "none.jsonl")


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        build_index(tmp_path)


def test_a_path_below_a_file_is_an_error(tmp_path):
    path = write(tmp_path / "d.jsonl", make_rows(1))
    with pytest.raises(UserError, match="cannot read the data file: Not a directory"):
        build_index(path / "x.jsonl")


def test_a_malformed_line_is_named_and_nothing_is_cached(tmp_path):
    path = write(tmp_path / "d.jsonl", make_rows(4), "\n\n")
    with path.open("a") as handle:
        handle.write('\n{"problem_id": "p"}\n')
    with pytest.raises(UserError, match=r'd\.jsonl:8: "instruction" is missing'):
        build_index(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_file_that_grows_meanwhile_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", make_rows(4))
    scan = index_module._scan

    def scan_and_grow(handle, where):
        found = scan(handle, where)
        with path.open("a") as more:
            more.write("\n")
        return found

    monkeypatch.setattr(index_module, "_scan", scan_and_grow)
    with pytest.raises(UserError, match="is still being written"):
        build_index(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize("change", ["label", "order", "cut"])
def test_a_row_that_has_changed_is_a_run_error(tmp_path, change):
    rows = make_rows(4)
    path = write(tmp_path / "d.jsonl", rows)
    index = build_index(path)
    if change == "label":  # "false" became "true ": as long as before
        changed = path.read_text().replace('"is_correct": false', '"is_correct": true ')
        with path.open("r+") as handle:
            handle.write(changed)
    elif change == "order":
        with path.open("r+") as handle:
            handle.write("\n".join(reversed(path.read_text().split("\n"))))
    else:
        os.truncate(path, 40)
    with pytest.raises(RunError, match=r"d\.jsonl:4: the file has changed while it was in use"):
        index.read_row(3)


def test_a_replaced_file_does_not_disturb_a_running_reader(tmp_path):
    path = write(tmp_path / "d.jsonl", make_rows(4))
    index = build_index(path)
    write(tmp_path / "new.jsonl", list(reversed(make_rows(9))))
    os.replace(tmp_path / "new.jsonl", path)
    assert index.read_row(3).output == make_rows(4)[3]["output"]


def test_descriptors_are_given_back(tmp_path):
    path = write(tmp_path / "d.jsonl", make_rows(4))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        build_index(path).read_row(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_the_columns_alone(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = 3000
    with path.open("w") as handle:
        for row in make_rows(rows):
            handle.write(json.dumps(row | {"metadata": {"text": "x" * 3000}}) + "\n")
    tracemalloc.start()
    build_index(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 9e6
    assert peak < 1.5e6
