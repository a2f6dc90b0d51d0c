"""``wmtp-ds data import mbpp``: the format with its CRLF and tabs, the labels, the split, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.data import mbpp
from wmtp_ds.data.mbpp import import_mbpp, quantile_edges, read_mbpp
from wmtp_ds.data.rows import parse_row
from wmtp_ds.errors import UserError


def _task(task_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "text": f"Write a function to add {task_id} to a number.",
        "code": f"def add(x):\r\n\ty = {task_id}  # one\r\n\tif x == 0 :\r\n\t\treturn y\r\n\treturn (x+y)\r\n",
        "test_list": [f"assert add({x}) == {x + task_id}" for x in (0, 1, 7)],
        "test_setup_code": "",
        "challenge_test_list": [],
        **changes,
    }


def _write(path: Path, *tasks: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        parse_row(line, path, number)
    return [json.loads(line) for line in path.read_text().splitlines()]


NODE = _task(
    5,
    text="Write a function to get a node's value.",
    code="class Node:\r\n\tdef __init__(self, x):\r\n\t\tself.x = x\r\ndef value(n):\r\n\treturn n.x + 0",
    test_list=["assert value(root) == 3", "assert value(Node(4)) == 4"],
    test_setup_code="root = Node(1) \r\nroot.x = 3",
)
FAILING = _task(6, text="Write a function to fail.", code="def add(x):\r\n\treturn x")
BROKEN = _task(7, text="Write a function that is Python 2.", code="def add(x):\r\n\tprint x")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mbpp")
    _write(folder / "in" / "train.jsonl", _task(1), _task(2), NODE, FAILING, BROKEN)
    _write(folder / "in" / "validation.jsonl", _task(11), _task(12))
    return folder / "out", import_mbpp(folder / "in", folder / "out", mutants=3)


def test_references_are_correct_and_mutants_that_fail_incorrect(imported: tuple[Path, dict[str, Any]]) -> None:
    output, summary = imported
    rows = _rows(output / "train.jsonl")
    correct = [row for row in rows if row["is_correct"]]
    assert [row["problem_id"] for row in correct] == ["mbpp-1", "mbpp-2", "mbpp-5"]
    first = correct[0]
    assert first["instruction"] == "Write a function to add 1 to a number."
    assert first["input"] == "Your code should pass this test:\nassert add(0) == 1"
    assert first["output"] == "def add(x):\n    y = 1\n    if x == 0:\n        return y\n    return x + y"
    assert first["metadata"]["tests"] == ["assert add(0) == 1", "assert add(1) == 2", "assert add(7) == 8"]
    assert [row["problem_id"] for row in rows if not row["is_correct"]].count("mbpp-1") == 3
    assert correct[2]["metadata"]["test_setup"] == "root = Node(1) \nroot.x = 3"
    assert "\r" not in (output / "train.jsonl").read_text()
    told = summary["train"]
    assert told["references"] == 5
    assert [text.split(": ")[:2] for text in told["references_failed"]] == [
        ["mbpp-7", "not Python"],
        ["mbpp-6", "wrong"],
    ]
    assert told["problems_left_out"] == 2
    assert told["mutants"] == told["mutants_failed"] + told["mutants_survived_and_dropped"]
    assert told["incorrect"] == told["mutants_failed"] - told["mutants_failed_but_not_needed"]


def test_a_mutant_that_survives_is_in_no_row(imported: tuple[Path, dict[str, Any]]) -> None:
    """``if x == 0`` is not needed, so what breaks only that survives."""
    output, summary = imported
    assert summary["train"]["mutants_survived_and_dropped"] > 0
    for row in _rows(output / "train.jsonl"):
        assert row["is_correct"] is (row["metadata"]["mutation"] is None)


def test_a_folder_gives_both_files(imported: tuple[Path, dict[str, Any]]) -> None:
    output, summary = imported
    rows = _rows(output / "validation.jsonl")
    assert {row["problem_id"] for row in rows} == {"mbpp-11", "mbpp-12"}
    assert summary["validation"]["references_failed"] == []


def test_the_same_input_is_reused_and_gives_the_same_bytes(
    imported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, summary = imported
    assert import_mbpp(output.parent / "in", output, mutants=3) == {**summary, "reused": True}
    import_mbpp(output.parent / "in", tmp_path, mutants=3)
    for name in ("train.jsonl", "validation.jsonl", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_difficulties_are_eleven_quantiles_of_length(tmp_path: Path) -> None:
    tasks = [
        _task(n, code="def add(x):\n" + "".join(f"    a{k} = 1\n" for k in range(n)) + f"    return x + {n}")
        for n in range(1, 34)
    ]
    import_mbpp(_write(tmp_path / "a.jsonl", *tasks), tmp_path / "out", validation_fraction=0.01, mutants=0)
    rows = _rows(tmp_path / "out" / "train.jsonl") + _rows(tmp_path / "out" / "validation.jsonl")
    rows.sort(key=lambda row: len(row["output"]))
    found = [row["difficulty"] for row in rows]
    assert found == sorted(found)
    assert all(2 <= found.count(difficulty) <= 4 for difficulty in range(1, 12))


def test_edges_of_few_lengths() -> None:
    assert quantile_edges([5]) == [5.0] * 10
    assert quantile_edges([1, 1, 1]) == [1.0] * 10


def test_one_file_is_split_by_text(tmp_path: Path) -> None:
    twin = _task(30, text=_task(3)["text"], code=_task(3)["code"], test_list=_task(3)["test_list"])
    source = _write(tmp_path / "a.jsonl", *(_task(n) for n in range(1, 10)), twin)
    for seed in range(4):
        import_mbpp(source, tmp_path / str(seed), validation_fraction=0.3, mutants=0, seed=seed)
        train = _rows(tmp_path / str(seed) / "train.jsonl")
        held = _rows(tmp_path / str(seed) / "validation.jsonl")
        assert not {row["instruction"] for row in train} & {row["instruction"] for row in held}
        assert len({row["instruction"] for row in held}) == 3
        assert len(train) + len(held) == 10


def test_training_problems_that_are_validation_problems_are_left_out(tmp_path: Path) -> None:
    train = _write(tmp_path / "a.jsonl", _task(1), _task(2), _task(3))
    held = _write(tmp_path / "b.jsonl", _task(9, text=_task(2)["text"]))
    summary = import_mbpp(train, tmp_path / "out", validation=held, mutants=0)
    assert summary["training_problems_shared_with_validation"] == 1
    assert [row["problem_id"] for row in _rows(tmp_path / "out" / "train.jsonl")] == ["mbpp-1", "mbpp-3"]


def test_the_sanitised_format_is_read(tmp_path: Path) -> None:
    task = _task(1, prompt="Add one.", test_imports=["import math"], test_list=["assert add(math.gcd(4, 6)) == 3"])
    del task["text"], task["test_setup_code"], task["challenge_test_list"]
    [found] = read_mbpp(_write(tmp_path / "a.jsonl", task))
    assert (found.text, found.tests.setup) == ("Add one.", "import math")


BAD: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "a.jsonl:2: not JSON"),
    "no object": ("[1]", "a.jsonl:2: must be a JSON object"),
    "no text": (json.dumps(_task(2, text="")), '"text" must be a text that is not empty'),
    "no code": (json.dumps(_task(2, code=None)), '"code" must be a text'),
    "no id": (json.dumps({**_task(2), "task_id": True}), '"task_id" must be a number'),
    "same id": (json.dumps(_task(1)), "task_id 1 is already on line 1"),
    "tests are no list": (json.dumps(_task(2, test_list="assert 1")), '"test_list" must be a list of texts'),
    "no tests": (json.dumps(_task(2, test_list=[])), '"test_list": there are no tests'),
    "a test is no Python": (json.dumps(_task(2, test_list=["assert ("])), "test 1 is not Python"),
    "a test asserts nothing": (json.dumps(_task(2, test_list=["add(1)"])), "test 1 asserts nothing"),
    "setup is no text": (json.dumps(_task(2, test_setup_code=5)), '"test_setup_code" must be a text'),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _task(1))
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(UserError) as error:
        import_mbpp(source, tmp_path / "out")
    assert message in str(error.value)
    assert "a.jsonl:2: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_files_and_options(tmp_path: Path) -> None:
    good = _write(tmp_path / "a.jsonl", _task(1), _task(2))
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task_id": "\xe9"}\n')
    (tmp_path / "folder").mkdir()
    for source, options, message in [
        (tmp_path / "none.jsonl", {}, "does not exist"),
        (tmp_path / "empty.jsonl", {}, "has no problems"),
        (tmp_path / "latin.jsonl", {}, "latin.jsonl:1: not UTF-8"),
        (tmp_path / "folder", {}, "folder: has no train.jsonl: give --input a folder with train.jsonl and valid"),
        (tmp_path / "folder", {"validation": good}, "do not go with a folder"),
        (good, {"validation": good, "validation_fraction": 0.5}, "exclude each other"),
        (good, {"validation": good}, "every training problem is a validation problem"),
        (good, {"validation": tmp_path / "folder"}, "is a folder"),
        (_write(tmp_path / "one.jsonl", _task(1)), {}, "one problem cannot be split"),
    ]:
        with pytest.raises(UserError, match=message):
            import_mbpp(source, out, **options)
    assert not out.exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_a_reference_that_passes_is_an_error(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "validation"):
        _write(tmp_path / "in" / f"{name}.jsonl", FAILING if name == split else _task(1))
    with pytest.raises(SystemExit) as end:
        main(["data", "import", "mbpp", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {split}: none of 1 reference solutions passes its tests" in said
    assert "First: mbpp-6: wrong: test 1 of 3: add(0) gave 0, not 6" in said
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "a.jsonl", *(_task(n) for n in range(1, 6)), FAILING)
    command = ["data", "import", "mbpp", "--input", str(source), "--output", str(tmp_path / "out"), "--mutants", "2"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--validation-fraction", "0.2"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'}" in out
    assert "survived and were dropped" in out
    assert "failed: mbpp-6: wrong: test 1 of 3: add(0) gave 0, not 6" in out
    with pytest.raises(SystemExit) as end:
        main([*command, "--json"])
    assert end.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["train"]["problems_read"] + summary["validation"]["problems_read"] == 6
    with pytest.raises(SystemExit) as end:
        main(["data", "import", "mbpp", "--input", str(tmp_path / "no"), "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- the folder ---


def test_problems_carry_their_tests_once(imported: tuple[Path, dict[str, Any]]) -> None:
    output, _ = imported
    problems = [json.loads(line) for line in (output / "problems.jsonl").read_text().splitlines()]
    assert [found["problem_id"] for found in problems] == ["mbpp-1", "mbpp-2", "mbpp-5", "mbpp-11", "mbpp-12"]
    rows = _rows(output / "train.jsonl") + _rows(output / "validation.jsonl")
    for found in problems:
        of_problem = [row for row in rows if row["problem_id"] == found["problem_id"]]
        for row in of_problem:
            assert row["metadata"]["tests"] == found["tests"]["asserts"]
            assert row["metadata"].get("test_setup", "") == found["tests"]["setup"]
            assert {key: row[key] for key in ("instruction", "input", "difficulty")} == {
                key: found[key] for key in ("instruction", "input", "difficulty")
            }
        assert of_problem
        assert found["tests"]["kind"] == "function"
        assert found["limits"] == {"seconds": 1.0, "memory_mb": 512}
        assert (found["language"], found["evaluation_only"], found["source"]) == ("python", False, "mbpp")
    manifest = json.loads((output / "manifest.json").read_text())
    assert {name: told["rows"] for name, told in manifest["files"].items()} == {
        "problems.jsonl": 5,
        "train.jsonl": len(_rows(output / "train.jsonl")),
        "validation.jsonl": len(_rows(output / "validation.jsonl")),
    }


@pytest.mark.parametrize("after", [2, 4, 6])
def test_an_interrupted_import_goes_on_and_ends_the_same(
    after: int, imported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, summary = imported
    monkeypatch.setattr(mbpp, "_COMMIT_EVERY", 2)
    run = 0

    def stop(count: int) -> None:
        nonlocal run
        run += count
        if run > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_mbpp(output.parent / "in", tmp_path / "out", mutants=3, on_done=stop)
    assert not (tmp_path / "out").exists()
    counted: list[int] = []
    again = import_mbpp(output.parent / "in", tmp_path / "out", mutants=3, on_done=counted.append)
    assert counted[0] >= after - 1
    assert sum(counted) == 7
    failed = sorted(again["train"].pop("references_failed"))
    assert failed == sorted(summary["train"]["references_failed"])
    assert again == {**summary, "train": {k: v for k, v in summary["train"].items() if k != "references_failed"}}
    for name in ("train.jsonl", "validation.jsonl", "problems.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (output / name).read_bytes()


def test_other_options_replace_only_with_force(imported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source = imported[0].parent / "in"
    import_mbpp(source, tmp_path / "out", mutants=1)
    with pytest.raises(UserError, match=r"mutants was 1, not 0\): give another --output, or --force"):
        import_mbpp(source, tmp_path / "out", mutants=0)
    assert import_mbpp(source, tmp_path / "out", mutants=0, force=True)["train"]["incorrect"] == 0
