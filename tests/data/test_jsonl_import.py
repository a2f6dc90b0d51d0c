"""``wmtp-ds data import jsonl``: splits, what is wrong with a line, restarts, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.data import jsonl_import
from wmtp_ds.data.index import build_index
from wmtp_ds.data.jsonl_import import import_jsonl
from wmtp_ds.data.jsonl_mapping import FieldMapping, parse_mapping
from wmtp_ds.errors import UserError

TESTS = ["assert f(1) == 2"]


def record(number: int, **changes: Any) -> dict[str, Any]:
    """Three solutions of each problem."""
    return {
        "problem_id": number // 3,
        "instruction": f"Add {number // 3}.",
        "output": f"def f(x):\n    return x + {number}",
        "is_correct": number % 3 == 0,
        "tests": TESTS,
        **changes,
    }


def write(path: Path, *found: dict[str, Any] | bytes) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in found)
    )
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_rows_and_problems_of_both_splits(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(record(n) for n in range(120)))
    summary = import_jsonl(source, tmp_path / "out", validation_fraction=0.25)
    train, held = (lines(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation"))
    assert sorted(int(row["output"].rpartition(" ")[2]) for row in train + held) == list(range(120))
    assert not {row["problem_id"] for row in train} & {row["problem_id"] for row in held}
    assert summary["train"]["problems"] + summary["validation"]["problems"] == 40
    assert 3 <= summary["validation"]["problems"] <= 18
    assert summary["lines_read"] == 120
    problems = lines(tmp_path / "out" / "problems.jsonl")
    assert [found["problem_id"] for found in problems] == [str(n) for n in range(40)]
    assert problems[3] == {
        "problem_id": "3",
        "instruction": "Add 3.",
        "tests": {"kind": "function", "asserts": TESTS, "setup": ""},
        "language": "python",
        "evaluation_only": False,
        "source": "jsonl",
    }
    assert len(build_index(tmp_path / "out" / "train.jsonl")) == len(train)
    other = import_jsonl(source, tmp_path / "other", validation_fraction=0.25, seed=1)
    assert lines(tmp_path / "other" / "validation.jsonl") != held
    assert other["lines_read"] == 120


def test_no_split_and_no_tests(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", record(0, tests=None), b"", b"  ", record(1, tests=None))
    summary = import_jsonl(source, tmp_path / "out", validation_fraction=0)
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"train.jsonl", "manifest.json"}
    assert summary["train"]["problems"] == 1
    assert summary["lines_read"] == 4


def test_rows_to_evaluate_on_are_kept_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(record(n) for n in range(6)))
    mapping = parse_mapping([], ["metadata.evaluation_only=true", "metadata.source=mine"], [])
    assert import_jsonl(source, tmp_path / "out", mapping)["evaluation"]["rows"] == 6
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert {(found["evaluation_only"], found["source"]) for found in lines(tmp_path / "out" / "problems.jsonl")} == {
        (True, "mine")
    }


BAD: dict[str, tuple[dict[str, Any] | bytes, str, str]] = {
    "no UTF-8": (b'{"problem_id": "\xff"}', "lines_malformed", "not UTF-8 text"),
    "no JSON": (b"{", "lines_malformed", "not JSON"),
    "no object": (b"[]", "lines_malformed", "must be a JSON object"),
    "NaN": (b'{"difficulty": NaN}', "lines_malformed", "NaN is not JSON"),
    "a key twice": (b'{"output": "a", "output": "b"}', "lines_malformed", "occurs twice"),
    "byte order mark": (b"\xef\xbb\xbf{}", "lines_malformed", "byte order mark"),
    "no output": (record(9, output=""), "rows_without_output", '"output" must be a text'),
    "half a surrogate": (record(9, output="\ud800"), "rows_unfit", '"output" holds half a surrogate pair'),
    "no label": (record(9, is_correct=None), "rows_unfit", '"is_correct" is missing'),
    "the same solution": (record(0, output=record(0)["output"] + " \n"), "rows_repeated", "the solution of line 1"),
    "the same problem": (
        record(3, problem_id=0),
        "problems_in_conflict",
        "problem 0 has another instruction, input or",
    ),
    "other tests": (record(1, tests=["assert f(1) == 3"]), "problems_in_conflict", "tests than on line 1"),
    "another input": (record(1, input="x"), "problems_in_conflict", "than on line 1"),
    "tests that assert nothing": (record(9, tests=["f(1)"]), "rows_unfit", '"tests" test 1 asserts nothing'),
}


@pytest.mark.parametrize(("line", "reason", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_stops_or_is_skipped(
    line: dict[str, Any] | bytes, reason: str, message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", record(0), line, record(2))
    with pytest.raises(UserError) as error:
        import_jsonl(source, tmp_path / "out", validation_fraction=0)
    assert str(error.value).startswith(f"{source}:2: ")
    assert message in str(error.value)
    assert "--on-error skip" in str(error.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl"}
    summary = import_jsonl(source, tmp_path / "out", validation_fraction=0, on_error="skip")
    assert summary["train"]["rows"] == 2
    [(found, entry)] = summary["skipped"].items()
    assert (found, entry["count"]) == (reason, 1)
    [named] = entry["first"]
    assert named.startswith("line 2: ")
    assert message in named
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]["skipped"] == summary["skipped"]


def test_the_same_solution_of_another_problem_is_another_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", record(0), record(3, output=record(0)["output"]))
    assert import_jsonl(source, tmp_path / "out", validation_fraction=0)["train"]["rows"] == 2


def test_a_path_that_is_on_no_line_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(record(n) for n in range(3)))
    with pytest.raises(UserError, match=r"--map difficulty=dificulty: no line of .* has dificulty"):
        import_jsonl(source, tmp_path / "out", FieldMapping({"difficulty": "dificulty"}), validation_fraction=0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl"}
    source = write(tmp_path / "a.jsonl", record(0), record(1, level=3), record(2))
    import_jsonl(source, tmp_path / "out", FieldMapping({"difficulty": "level"}), validation_fraction=0)
    assert [row.get("difficulty") for row in lines(tmp_path / "out" / "train.jsonl")] == [None, 3, None]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        import_jsonl(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="is a folder"):
        import_jsonl(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="gives no rows: it is empty"):
        import_jsonl(write(tmp_path / "a.jsonl"), tmp_path / "out")
    with pytest.raises(UserError, match=r"--validation-fraction 0\.99 leaves no training problem"):
        import_jsonl(write(tmp_path / "b.jsonl", record(0)), tmp_path / "out", validation_fraction=0.99)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [3, 10, 28, 59])
def test_an_interrupted_import_goes_on_and_ends_the_same(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only the first part has counts: repeated rows, problems in conflict, paths that were found."""
    found: list[dict[str, Any] | bytes] = [record(n) for n in range(55)]
    found[2] = record(2, level=4)
    found += [record(0), record(3, problem_id=0), b"{", b"", record(56)]
    source = write(tmp_path / "a.jsonl", *found)
    mapping = FieldMapping({"difficulty": "level"})
    options: dict[str, Any] = {"on_error": "skip", "validation_fraction": 0.3}
    whole = import_jsonl(source, tmp_path / "whole", mapping, **options)
    monkeypatch.setattr(jsonl_import, "_COMMIT_EVERY", 4)
    for at in (after // 2, after - after // 2):  # twice
        read = 0

        def stop(count: int, at: int = at) -> None:
            nonlocal read
            read += count > 0
            if read > at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_jsonl(source, tmp_path / "out", mapping, on_done=stop, **options)
    counted: list[int] = []
    assert import_jsonl(source, tmp_path / "out", mapping, on_done=counted.append, **options) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sum(counted) == source.stat().st_size
    assert len(counted) <= 61 - (after - 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"task": {"text": f"Add {n}."}, "code": f"x + {n}", "ok": "yes" if n % 2 else "no"} for n in range(60)]
    source = write(tmp_path / "mine.jsonl", *rows, b"{")
    command = ["data", "import", "jsonl", "--input", str(source), "--output", str(tmp_path / "out")]
    options = [
        "--map",
        "instruction=task.text",
        "--map",
        "output=code",
        "--map",
        "is_correct=ok",
        "--set",
        "difficulty=2",
    ]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*command, *options, *more])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    code, _, err = run()
    assert code == 2
    assert f'error: {source}:1: "problem_id" must be a text or a whole number; --id-from instruction makes one' in err
    code, _, err = run("--id-from", "instruction")
    assert (code, "mine.jsonl:61: not JSON" in err) == (2, True)
    code, out, _ = run("--id-from", "instruction", "--on-error", "skip")
    assert code == 0
    assert "skipped:      1 lines malformed" in out
    assert "which they are: manifest.json" in out
    code, out, _ = run("--id-from", "instruction", "--on-error", "skip", "--json")
    summary = json.loads(out)
    assert summary["reused"] is True
    assert summary["train"]["by_difficulty"] == {"2": summary["train"]["rows"]}
    code, _, err = run("--id-from", "instruction")
    assert (code, "on_error was 'skip', not 'stop'" in err) == (2, True)
    code, _, err = run("--map", "outputt=x")
    assert (code, "did you mean output?" in err) == (2, True)
