"""``wmtp-ds data import codecontests``: shards, splits, restarts, memory, and bad files."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from codecontests_parquet import SCHEMA, many, problem, write_large, write_parquet, write_shards

from wmtp_ds.cli.main import main
from wmtp_ds.data import codecontests
from wmtp_ds.data.codecontests import import_codecontests
from wmtp_ds.data.codecontests_problem import Options
from wmtp_ds.data.index import build_index
from wmtp_ds.errors import UserError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(
        tmp_path / "in",
        train_0=[problem(n) for n in range(12)],
        train_1=[problem(n) for n in range(12, 20)],
        valid=[problem(n) for n in range(100, 104)],
        test=[problem(n) for n in range(200, 203)],
    )


def test_published_splits(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    summary = import_codecontests(shards, out)
    assert {entry.name for entry in out.iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "evaluation.jsonl",
        "problems.jsonl",
        "manifest.json",
    }
    for split, numbers in (("train", range(20)), ("validation", range(100, 104)), ("evaluation", range(200, 203))):
        rows = lines(out / f"{split}.jsonl")
        assert [row["problem_id"] for row in rows] == [f"codeforces/{n}_A. Add" for n in numbers for _ in range(2)]
        assert {row["metadata"].get("evaluation_only", False) for row in rows} == {split == "evaluation"}
        assert summary[split]["rows"] == len(rows) == 2 * summary[split]["problems"]
        assert summary[split]["correct"] == summary[split]["incorrect"] == len(numbers)
        by_difficulty = {
            str(d): sum(row["difficulty"] == d for row in rows) for d in sorted({7 + n % 5 for n in numbers})
        }
        assert summary[split]["by_difficulty"] == by_difficulty
    problems = lines(out / "problems.jsonl")
    assert len({found["problem_id"] for found in problems}) == len(problems) == 27
    evaluation = {found["problem_id"] for found in problems if found["evaluation_only"]}
    assert evaluation == {row["problem_id"] for row in lines(out / "evaluation.jsonl")}
    assert not summary["reused"]
    assert summary["problems_read"] == 27
    assert summary["skipped"] == {}
    assert len(build_index(out / "train.jsonl")) == 40
    assert list(tmp_path.glob("**/.partial-*")) == []


def test_the_folder_of_the_repository_and_other_names(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    shards.rename(tmp_path / "repository" / "data")
    assert import_codecontests(tmp_path / "repository", tmp_path / "a")["validation"]["problems"] == 4
    one = write_parquet(tmp_path / "b" / "validation.parquet", [problem(1)])
    assert import_codecontests(one, tmp_path / "c")["validation"]["problems"] == 1
    plain = write_parquet(tmp_path / "d" / "0000.parquet", [problem(1)])
    assert import_codecontests(plain.parent, tmp_path / "e", validation_fraction=0)["train"]["problems"] == 1
    training = write_parquet(tmp_path / "f" / "training.parquet", [problem(1)])
    write_parquet(tmp_path / "f" / "test.parquet", [problem(1)])
    with pytest.raises(UserError, match=r"training\.parquet: which split is that"):
        import_codecontests(training.parent, tmp_path / "g")


def test_problems_are_held_out_by_their_text(tmp_path: Path) -> None:
    problems = [problem(n) for n in range(200)]
    twins = [
        {**found, "name": f"twin of {found['name']}", "description": found["description"].replace(" ", "  ")}
        for found in problems
    ]
    source = write_parquet(tmp_path / "train.parquet", [*problems, *twins])
    summary = import_codecontests(source, tmp_path / "out", validation_fraction=0.25)
    train, held = (lines(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation"))
    texts = [{" ".join(row["instruction"].split()) for row in rows} for rows in (train, held)]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 200
    assert summary["train"]["problems"] + summary["validation"]["problems"] == 400
    assert 60 <= summary["validation"]["problems"] <= 140
    other = import_codecontests(source, tmp_path / "other", Options(seed=1), validation_fraction=0.25)
    assert lines(tmp_path / "other" / "validation.jsonl") != held
    assert other["train"]["problems"] + other["validation"]["problems"] == 400
    assert 20 <= import_codecontests(source, tmp_path / "tenth")["validation"]["problems"] <= 64


def test_a_fraction_does_not_go_with_a_published_set(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--validation-fraction does not go with"):
        import_codecontests(shards, tmp_path / "out", validation_fraction=0.5)
    lonely = write_parquet(tmp_path / "train.parquet", [problem(1)])
    with pytest.raises(UserError, match=r"--validation-fraction 0\.1 leaves no (training|validation) problem"):
        import_codecontests(lonely, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "train.parquet"}


def test_skips_are_counted_and_named(tmp_path: Path) -> None:
    source = write_shards(
        tmp_path / "in",
        train=[
            problem(1),
            problem(1),
            problem(2, description=""),
            problem(3, input_file="a.txt"),
            problem(4, name=""),
            many(5, 30, 1),
            problem(100),
        ],
        valid=[problem(100)],
    )
    skipped = import_codecontests(source, tmp_path / "out")["skipped"]
    assert skipped == {
        "problems_repeated": {"count": 2, "first": ["codeforces/1_A. Add", "codeforces/100_A. Add"]},
        "problems_without_description": {"count": 1, "first": ["codeforces/2_A. Add"]},
        "problems_with_file_input": {"count": 1, "first": ["codeforces/3_A. Add"]},
        "problems_without_name": {"count": 1, "first": ["one in train-00000-of-00002-abc.parquet"]},
        "solutions_over_the_cap": {"count": 10, "first": []},
    }
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]["skipped"] == skipped
    held = lines(tmp_path / "out" / "validation.jsonl")  # what is held out is not trained on, too
    assert {row["problem_id"] for row in held} == {"codeforces/100_A. Add"}


def test_the_same_name_on_another_site_is_another_problem(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "train.parquet", [problem(1, source=site) for site in (*range(8), None)])
    import_codecontests(source, tmp_path / "out", validation_fraction=0)
    sites = [found["problem_id"].partition("/")[0] for found in lines(tmp_path / "out" / "problems.jsonl")]
    assert sites == ["unknown", "codechef", "codeforces", "hackerearth", "codejam", "atcoder", "aizu"]


def test_texts_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([problem(1), problem(2)], SCHEMA)
    texts = pa.array([b"\xff", b"fine"], pa.binary()).view(pa.string())
    table = table.set_column(SCHEMA.names.index("description"), "description", texts)
    pq.write_table(table, tmp_path / "train.parquet")
    summary = import_codecontests(tmp_path / "train.parquet", tmp_path / "out", validation_fraction=0)
    assert summary["train"]["problems"] == 1
    assert summary["skipped"]["problems_not_utf8"]["count"] == 1


# --- what is there already ---


def test_what_is_there_is_left_or_refused(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = import_codecontests(shards, out)
    before = {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()}
    assert import_codecontests(shards, out) == {**first, "reused": True}
    assert {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()} == before
    with pytest.raises(
        UserError, match=r"other options \(max_correct was 20, not 1\): give another --output, or --force"
    ):
        import_codecontests(shards, out, Options(max_correct=1))
    (out / ".train.jsonl.index.npz").write_text("a cache")
    assert import_codecontests(shards, out, Options(difficulty="rating"), force=True)["reused"] is False
    assert not (out / ".train.jsonl.index.npz").exists()
    write_shards(shards, test_1=[problem(300)])
    with pytest.raises(UserError, match="other source"):
        import_codecontests(shards, out, Options(difficulty="rating"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "out"}


# --- restarts ---

DRIVER = """
import sys, time
from pathlib import Path
from wmtp_ds.data import codecontests
codecontests._COMMIT_EVERY = 4
done = 0
def on_done(count):
    global done
    done += count
    if done > int(sys.argv[3]):
        print("stop", done, flush=True)
        time.sleep(60)
codecontests.import_codecontests(Path(sys.argv[1]), Path(sys.argv[2]), on_done=on_done)
"""


@pytest.mark.parametrize("after", [2, 9, 17, 30])
def test_a_killed_import_goes_on_and_ends_the_same(after: int, tmp_path: Path) -> None:
    repeated = [problem(3), problem(100)]
    source = write_shards(
        tmp_path / "in",
        train_0=[many(n, 25, 3) for n in range(12)],
        train_1=[problem(n) for n in range(12, 20)] + repeated,
        valid=[problem(n) for n in range(100, 106)],
        test=[problem(n) for n in range(200, 203)],
    )
    import_codecontests(source, tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(out), str(after)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("stop")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    partial = tmp_path / ".partial-out"
    assert partial.is_dir()
    with (partial / "train.jsonl").open("ab") as file:  # what was under way when it was killed
        file.write(b'{"problem_id": "half a li')
    counted: list[int] = []
    summary = import_codecontests(source, out, on_done=counted.append)
    assert sum(counted) == 31
    if after >= 9:
        assert counted[0] >= 4
        assert len(counted) <= 31 - 4 + 1
    assert contents(out) == contents(tmp_path / "whole")
    assert summary["reused"] is False
    assert not partial.exists()


def test_what_another_command_left_is_not_gone_on_with(shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(codecontests, "_COMMIT_EVERY", 2)
    _interrupt(shards, tmp_path / "out", 9)
    import_codecontests(shards, tmp_path / "out", Options(max_correct=0))
    import_codecontests(shards, tmp_path / "whole", Options(max_correct=0))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["journal", "shortened", "folder"])
def test_a_damaged_journal_is_a_fresh_start(damage: str, shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(codecontests, "_COMMIT_EVERY", 2)
    partial = _interrupt(shards, tmp_path / "out", 9)
    if damage == "journal":
        (partial / ".journal.json").write_text("{")
    elif damage == "shortened":
        os.truncate(partial / "train.jsonl", 5)
    else:
        (partial / "strange").mkdir()
    import_codecontests(shards, tmp_path / "out")
    import_codecontests(shards, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _interrupt(source: Path, out: Path, after: int) -> Path:
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_codecontests(source, out, on_done=stop)
    assert not out.exists()
    partial = out.with_name(f".partial-{out.name}")
    assert partial.is_dir()
    return partial


def test_two_at_once(shards: Path, tmp_path: Path) -> None:
    def again(count: int) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            import_codecontests(shards, tmp_path / "out")

    assert import_codecontests(shards, tmp_path / "out", on_start=again)["train"]["rows"] == 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(codecontests, "_COMMIT_EVERY", 8)
    source = write_parquet(tmp_path / "train.parquet", [problem(n) for n in range(200)])
    import_codecontests(source, tmp_path / "whole")
    command = ["data", "import", "codecontests", "--input", str(source), "--output", str(small_disk / "out")]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1
    assert f"error: {small_disk / 'out'}: writing failed: the disk is full" in capsys.readouterr().err
    assert {entry.name for entry in small_disk.iterdir()} == {".partial-out"}
    subprocess.run(["mount", "-o", "remount,size=9M", str(small_disk)], check=True)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    assert "reading problems: 50 of 200" not in capsys.readouterr().err  # it began behind that
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


# --- memory ---

MEASURE = """
import re, sys
from pathlib import Path
from wmtp_ds.data.codecontests import import_codecontests
import_codecontests(Path(sys.argv[1]), Path(sys.argv[2]), validation_fraction=0)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_mib(source: Path, out: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(out)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Six times the problems in row groups of the same size, and then ten times in a single one."""
    small = write_large(tmp_path / "small.parquet", 60, 64 << 10, group=60)
    large = write_large(tmp_path / "large.parquet", 360, 64 << 10, group=60)
    single = write_large(tmp_path / "single.parquet", 600, 64 << 10, group=600)
    base = peak_mib(small, tmp_path / "a")
    assert large.stat().st_size > 20 << 20
    assert peak_mib(large, tmp_path / "b") < base + 16
    assert peak_mib(single, tmp_path / "c") < base + 48


# --- bad input ---


def _without(*names: str) -> pa.Schema:
    return pa.schema([field for field in SCHEMA if field.name not in names])


def _typed(name: str, kind: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) if field.name == name else field for field in SCHEMA])


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [problem(1)], schema=_without("solutions", "time_limit"))
    with pytest.raises(UserError) as error:
        import_codecontests(path, tmp_path / "out")
    found = ", ".join(name for name in SCHEMA.names if name not in ("solutions", "time_limit"))
    assert str(error.value) == (
        f"{path}: is not CodeContests as published: columns missing: solutions, time_limit; found: {found}"
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {"train.parquet"}


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("difficulty", pa.string(), {"difficulty": "A"}),
        ("description", pa.int64(), {"description": 1}),
        ("solutions", pa.list_(pa.string()), {"solutions": ["a"]}),
        (
            "solutions",
            pa.struct([("language", pa.list_(pa.string())), ("solution", pa.list_(pa.string()))]),
            {"solutions": None},
        ),
        ("public_tests", pa.struct([("input", pa.list_(pa.string()))]), {"public_tests": None}),
        ("time_limit", pa.float64(), {"time_limit": 1.0}),
    ],
)
def test_columns_of_other_types_are_named(name: str, kind: pa.DataType, rows: dict[str, Any], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [problem(1, **rows)], schema=_typed(name, kind))
    with pytest.raises(
        UserError,
        match=rf"train\.parquet: .*column {name} must be a .*, not {re.escape(str(kind).partition(chr(60))[0])}",
    ):
        import_codecontests(path, tmp_path / "out")


def test_large_strings_and_more_columns_are_read(tmp_path: Path) -> None:
    schema = _typed("description", pa.large_string()).append(pa.field("more", pa.int64()))
    path = write_parquet(tmp_path / "train.parquet", [problem(1)], schema=schema)
    assert import_codecontests(path, tmp_path / "out", validation_fraction=0)["train"]["rows"] == 2


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _spoil(path: Path) -> None:
    """The footer is whole, what it points to is not."""
    data = bytearray(path.read_bytes())
    data[len(data) // 8 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is no readable Parquet file"),
        (lambda path: path.write_bytes(b""), "is no readable Parquet file"),
        (lambda path: path.write_text("name,description\n"), "is no readable Parquet file"),
        (_spoil, "is damaged at problem"),
    ],
)
def test_damaged_files(damage: Callable[[Path], None], message: str, shards: Path, tmp_path: Path) -> None:
    path = write_parquet(shards / "train-00002-of-00002-abc.parquet", [many(n, 30, 30) for n in range(300, 340)])
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        import_codecontests(shards, tmp_path / "out")
    assert str(path) in str(error.value)
    assert "download it again" in str(error.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in"}


def test_no_files_and_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no \*\.parquet"):
        import_codecontests(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="none: does not exist"):
        import_codecontests(tmp_path / "none", tmp_path / "out")
    nothing = write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="gives no rows: it is empty"):
        import_codecontests(nothing, tmp_path / "out")
    useless = write_parquet(tmp_path / "useless.parquet", [problem(1, input_file="x")])
    with pytest.raises(UserError, match="gives no rows: 1 problems with file input"):
        import_codecontests(useless, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".partial-out").exists()


# --- the command ---


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(shards, train_1=[problem(0), *(many(n, 30, 30) for n in range(12, 15))])
    command = ["data", "import", "codecontests", "--input", str(shards), "--output", str(tmp_path / "out")]
    options = ["--language", "python3", "--difficulty", "rating", "--max-correct", "4", "--max-incorrect", "2"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*command, *options, *more])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    code, out, err = run("--min-tests", "2", "--max-tests", "3", "--seed", "5")
    assert code == 0
    assert f"wrote {tmp_path / 'out'} in" in out
    assert "train.jsonl          42 rows of 15 problems: 24 correct, 18 incorrect" in out
    assert "skipped:      1 problems repeated" in out
    assert "reading problems: 23 of 23 problems" in err
    assert max(len(found["tests"]["cases"]) for found in lines(tmp_path / "out" / "problems.jsonl")) == 3
    code, out, _ = run("--min-tests", "2", "--max-tests", "3", "--seed", "5", "--json")
    assert code == 0
    assert json.loads(out)["reused"] is True
    code, _, err = run()
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'out'}: holds data made with other options (min_tests was 2, not 1, ")
    code, out, _ = run("--force")
    assert code == 0
