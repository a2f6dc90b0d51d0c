"""Rows for evaluation only are not trained on, unless the config says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.config import ConfigError, load_config
from wmtp_ds.data.evaluation_only import is_evaluation_only, refuse_evaluation_rows
from wmtp_ds.data.rows import parse_row
from wmtp_ds.errors import UserError
from wmtp_ds.run_data import open_data

OFF = ("mlflow.tracking_uri=",)


def write(path: Path, marks: list[Any], source: str | None = "humaneval") -> Path:
    rows = [
        {
            "problem_id": str(number // 2),
            "instruction": "Add.",
            "output": f"x = {number}",
            "is_correct": number % 2 == 0,
            "metadata": ({} if mark is None else {"evaluation_only": mark}) | ({"source": source} if source else {}),
        }
        for number, mark in enumerate(marks)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("mark", "wanted"), [(True, True), (False, False), (None, False), ("true", False), (1, False)])
def test_the_mark(mark: Any, wanted: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [None, mark])
    assert is_evaluation_only(parse_row(path.read_bytes().splitlines()[1], path, 2)) is wanted
    if wanted:
        with pytest.raises(UserError, match=r"a\.jsonl:2: problem 0 \(humaneval\) is for evaluation only"):
            refuse_evaluation_rows(path)
    else:
        refuse_evaluation_rows(path)


def test_a_mark_far_down_and_a_key_with_escapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [None] * 500 + [True], source=None)
    with pytest.raises(UserError, match=r"a\.jsonl:501: problem 250 is for evaluation only"):
        refuse_evaluation_rows(path)
    path.write_text("\n" + path.read_text().replace("evaluation_only", "evaluation\\u005fonly"))
    with pytest.raises(UserError, match=r"a\.jsonl:502"):
        refuse_evaluation_rows(path)


def test_the_words_alone_are_no_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [None] * 2, source='"evaluation_only": true')
    refuse_evaluation_rows(path)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    path = write(tmp_path / "train.jsonl", [None] * 30 + [True] * 10)
    return path, (*OFF, f"dataset.train={path}", "data_sampling.n_samples=8", f"checkpoint.save_dir={tmp_path / 'c'}")


def test_training_is_refused_before_it_starts(
    data: tuple[Path, tuple[str, ...]], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    path, overrides = data
    config = Path("stage_configs/local/baseline.toml")
    resolved = load_config(config, overrides)  # the first rows are fine
    with pytest.raises(UserError, match=r"train\.jsonl:31: .* set dataset\.allow_evaluation_data = true") as error:
        open_data(resolved, 1)
    assert error.value.exit_code == 2
    assert len(open_data(load_config(config, (*overrides, "dataset.allow_evaluation_data=true")), 1).train) == 40
    to_validate = (*OFF, f"dataset.validation={path}", overrides[-1])
    assert len(open_data(load_config(config, to_validate), 1).validation) == 40


def test_validate_refuses_what_the_first_rows_show(
    data: tuple[Path, tuple[str, ...]], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    path, overrides = data
    write(path, [None, True, True, True])
    config = Path("stage_configs/local/baseline.toml")
    with pytest.raises(ConfigError) as error:
        load_config(config, (*overrides, "training.batch_size=1"))
    [problem] = error.value.problems
    assert problem.key == "dataset.train"
    assert problem.message == f"{path}:2: problem 0 (humaneval) is for evaluation only"
    assert problem.mend == "name training data, or set dataset.allow_evaluation_data = true to train on it all the same"
    load_config(config, (*overrides, "dataset.allow_evaluation_data=true"))
    load_config(config, (*OFF, f"dataset.validation={path}", overrides[-1]))
