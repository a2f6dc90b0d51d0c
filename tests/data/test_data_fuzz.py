"""Hundreds of odd data files; `tests/soak` tries thousands.

Each is an error with file and line, or every one of its rows is read: never a traceback, a hang, or a row less.
"""

import json
from pathlib import Path

import pytest
from fuzz_config import check_end
from fuzz_data import DIGITS, KINDS, Data, a_row, check_file, data_files, odd_thing, remove
from hypothesis import given
from hypothesis import strategies as st
from in_process import command, examples

from wmtp_ds.data.index import build_index

ROW = {"problem_id": "1", "instruction": "add", "output": "def f(): pass", "is_correct": True}
MBPP = {"task_id": 1, "text": "Add.", "code": "def f(x):\n    return x", "test_list": ["assert f(1) == 1"]}
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


@examples(100)
@given(data=data_files())
def test_rows(tmp_path: Path, data: Data) -> None:
    check_file(data, tmp_path / "rows.jsonl")


@examples(25)
@given(data=data_files())
def test_import_counts_every_line(tmp_path: Path, data: Data) -> None:
    file, output = tmp_path / "mine.jsonl", tmp_path / "out"
    file.write_bytes(data.content)
    options = ("--output", output, "--validation-fraction", "0", "--force", "--json")
    stopped = command("data", "import", "jsonl", "--input", file, *options)
    check_end(stopped)
    lines = [number for number, line in enumerate(data.content.split(b"\n"), 1) if line.strip()]
    skipped = command("data", "import", "jsonl", "--input", file, *options, "--on-error", "skip")
    check_end(skipped)
    if skipped.code:  # not one row
        assert stopped.code == 2
        return
    summary = json.loads(skipped.out)
    lost = sum(entry["count"] for entry in summary["skipped"].values())
    rows = sum(split["rows"] for split in summary.values() if isinstance(split, dict) and "rows" in split)
    assert rows + lost == len(lines), "a line is neither imported nor counted"
    assert (stopped.code == 2) == (lost > 0)
    for split in ("train", "evaluation"):
        if (output / f"{split}.jsonl").exists():
            check_end(command("data", "stats", output / f"{split}.jsonl"))


@examples(100)
@given(data=st.data())
def test_problem_files_of_other_formats(tmp_path: Path, data: st.DataObject) -> None:
    """MBPP and HumanEval with one value exchanged: refused by line, before anything runs."""
    name, record = data.draw(st.sampled_from([("mbpp", MBPP), ("humaneval", HUMANEVAL)]))
    key = data.draw(st.sampled_from(sorted(record)))
    value = data.draw(
        st.sampled_from(
            ["[1]", "{}", "1.5", "true", "null", '""', "[[]]", "NaN", "1e999", DIGITS, "[" * 100_000, '"\\ud800 ="']
        )
    )
    text = ", ".join(f"{json.dumps(k)}: {value if k == key else json.dumps(v)}" for k, v in record.items())
    ending = data.draw(st.sampled_from(["}", "", "}}", ', "code": "", "task_id": 5, "task_id": 6}', "}\0"]))
    good = json.dumps({**record, "task_id": "T/9"})
    place = data.draw(st.integers(0, 2))
    lines = [good.replace("T/9", f"T/{number}") for number in range(5, 7)]
    lines.insert(place, "{" + text + ending)
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(lines))
    done = command("data", "import", name, "--input", file, "--output", tmp_path / "out", "--force", seconds=30)
    check_end(done)
    assert done.code == 2
    assert f"{file}:{place + 1}: " in done.err, done.err[:500]


BAD_METADATA = {
    "beyond all numbers": ('{"a": 1e999}', "beyond all numbers"),
    "half a pair": ('{"a": "\\ud800"}', "half a surrogate pair"),
    "a key twice, late": ("{" + ", ".join(f'"k{i % 50_000}": 1' for i in range(50_001)) + "}", "occurs twice"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_could_not_be_written_again(tmp_path: Path, name: str) -> None:
    value, says = BAD_METADATA[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:-1] + f', "metadata": {value}}}\n')
    done = command("data", "stats", file)
    check_end(done, f"{file}:2: ", says)
    assert done.code == 2


@pytest.mark.parametrize("line", ['{"verdict": 5}', '{"other": 1}', "[1]", "[" * 100_000, "{", '{"untested": []}'])
def test_a_journal_that_was_written_to(tmp_path: Path, line: str) -> None:
    """What is no entry counts for nothing: the row is done again."""
    from wmtp_ds.data.label_file import _is_entry
    from wmtp_ds.data.label_file_journal import Journal

    with Journal(tmp_path / "out.jsonl", {"a": 1}, _is_entry) as journal:
        journal.append({"untested": "no tests"})
    with journal.path.open("a") as stream:
        stream.write(line + "\n")
    with Journal(tmp_path / "out.jsonl", {"a": 1}, _is_entry) as journal:
        assert journal.entries == 1


# --- what is no file, in the place of one ---


@pytest.mark.parametrize("kind", KINDS)
def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROW) + "\n")
    place = tmp_path / "odd"
    with odd_thing(kind, place) as odd:
        commands = [
            ("data", "stats", odd),
            ("data", "dedup", odd),
            ("data", "dedup", good, "--split", odd),
            ("data", "dedup", good, "--against", odd),
            ("data", "label", "--input", odd, "--output", "labelled.jsonl"),
            *(("data", "import", name, "--input", odd, "--output", "out") for name in ("jsonl", "mbpp", "humaneval")),
            ("data", "import", "codecontests", "--input", odd, "--output", "out"),
        ]
        if kind not in ("empty", "newlines"):  # no problems are no error
            commands.append(("data", "label", "--input", good, "--output", "labelled.jsonl", "--problems", odd))
        for arguments in commands:
            done = command(*arguments)
            check_end(done)
            assert done.code == 2, (arguments, done)
            assert str(odd) in done.err, (arguments, done.err)
    remove(place)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["good.jsonl"]


def test_a_line_without_end(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    with file.open("wb") as stream:
        stream.write(json.dumps(ROW).encode() + b"\n")
        stream.truncate(80 * 2**20)  # a hole: nothing but zero bytes
    for arguments in (("stats", file), ("import", "jsonl", "--input", file, "--output", tmp_path / "out")):
        done = command("data", *arguments)
        check_end(done, f"{file}:2: ")
        assert done.code == 2


# --- files that change while they are read ---


@pytest.mark.parametrize("change", ["grows", "shrinks", "is replaced"])
def test_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Rows that are read are those of one file: what changed in between is an error, in every pass of a command."""
    from wmtp_ds.data import rows

    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({**ROW, "output": f"x = {number}"}) + "\n" for number in range(6)]
    real = rows.parse_row
    state = {"calls": 0, "at": 0}

    def parse_row(line: bytes, path: Path, number: int) -> object:
        state["calls"] += 1
        if state["calls"] == state["at"]:
            if change == "is replaced":
                other = tmp_path / "other"
                other.write_text("".join(lines[:3]))
                other.replace(file)
            else:
                more = json.dumps({**ROW, "output": "x = 99"}) + "\n"
                file.write_text("".join([*lines, more] if change == "grows" else lines[:4]))
        return real(line, path, number)

    for module in ("index", "label_file", "jsonl_import"):
        monkeypatch.setattr(f"wmtp_ds.data.{module}.parse_row", parse_row)
    label = ("data", "label", "--input", file, "--output", tmp_path / "labelled.jsonl", "--untested", "keep")
    imports = ("data", "import", "jsonl", "--input", file, "--output", tmp_path / "out", "--validation-fraction", "0")
    for arguments in (("data", "stats", file), label, imports):
        if change == "is replaced" and arguments[1] == "stats":
            continue  # it goes on with the file that it has open, and nobody else's
        state.update(calls=0, at=2)
        file.write_text("".join(lines))
        done = command(*arguments, seconds=30)
        assert done.code in (1, 2), (arguments, done)
        assert "still being written" in done.err or "has changed" in done.err, done.err
        assert not (tmp_path / "labelled.jsonl").exists()
        assert not (tmp_path / "out").exists()


@examples(30)
@given(row=a_row())
def test_what_is_labelled_is_a_data_file_again(tmp_path: Path, row: dict[str, object]) -> None:
    """Whatever a row holds, the labelled file holds it, too, and can be read."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({**row, "metadata": {**row.get("metadata", {}), "language": "cpp"}}) + "\n")
    done = command("data", "label", "--input", source, "--output", output, "--force")
    assert done.code == 0, done.err
    assert json.loads(output.read_text()) == json.loads(source.read_text())
    assert len(build_index(output)) == 1
