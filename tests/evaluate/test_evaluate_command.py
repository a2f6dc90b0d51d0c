"""`wmtp-ds evaluate` from beginning to end, on a model that knows two of three answers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp_ds.cli.main import main
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.evaluate import samples as samples_module
from wmtp_ds.models.loading import load_policy, load_tokenizer, save_weights


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, arguments)])
    code = ended.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return dict(json.loads(out))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ("--max-new-tokens", 40)


def test_greedy_pass_at_1(solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, solver, "--problems", problems_file, *SHORT, "--output", "out")
    told = found["figures"]
    assert told["pass@1"] == pytest.approx(2 / 3)
    assert told["verdicts"] == {"passed": 2, "wrong": 1}
    assert told["exact_match"] == pytest.approx(2 / 3)
    assert told["cut_off"] == 0.0
    assert told["tokens_per_pass"] == 1.0
    low, high = told["pass@1_interval"]
    assert 0.0 <= low < 2 / 3 < high == 1.0
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [(line["problem_id"], line["correct"], line["pass@1"]) for line in lines] == [
        ("double", 1, 1.0),
        ("last", 1, 1.0),
        ("negate", 0, 0.0),
    ]
    assert lines[2]["samples"][0]["program"] == "def negate(x):\n    return x\n"
    assert "negate(1) gave 1, not -1" in lines[2]["samples"][0]["evidence"]
    assert not list(Path("out").glob(".partial*"))


def test_drafting_changes_nothing_but_the_passes(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for decode in ("plain", "self-speculative"):
        figures(capsys, solver, "--problems", problems_file, *SHORT, "--output", decode, "--decode", decode)
    plain, drafted = (
        [json.loads(line) for line in Path(decode, "results.jsonl").read_text().splitlines()]
        for decode in ("plain", "self-speculative")
    )
    assert plain == drafted
    told = json.loads(Path("self-speculative/summary.json").read_text())["figures"]
    assert 2.0 < told["tokens_per_pass"] <= 4.0  # all four heads know the solutions


def test_predictions_against_plain_torch(
    solver: Path,
    problems_file: Path,
    solved_problems: list[tuple[str, str, str, list[str], bool]],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = figures(capsys, solver, "--problems", problems_file, *SHORT)["figures"]["prediction"]
    policy, encoder = load_policy(solver), TextEncoder(load_tokenizer(solver))
    references = {name: output for name, _, output, _, is_correct in solved_problems if is_correct}
    references["negate"] = "def negate(x):\n    return -x\n"
    total, hits, count = 0.0, 0, 0
    for name, instruction, _, _, _ in solved_problems:
        row = Row(problem_id=name, instruction=instruction, output="-", is_correct=True)
        prompt, solution = encoder([get_template("alpaca")(row), references[name]])
        tokens = torch.tensor([[encoder.bos_id, *prompt, *solution, encoder.eos_id]])
        with torch.no_grad():
            logits = policy.lm_head(policy.head_states(policy.trunk(tokens))[1])[0]
        for place in range(tokens.shape[1] - 2):
            if place + 2 > len(prompt):
                total -= float(logits[place].log_softmax(-1)[tokens[0, place + 2]])
                hits += int(logits[place].argmax() == tokens[0, place + 2])
                count += 1
    assert told["loss_head_2"] == pytest.approx(total / count, rel=1e-4)
    assert told["perplexity_head_2"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert told["token_accuracy_head_2"] == pytest.approx(hits / count)
    assert told["token_accuracy_head_1"] > 0.9


def test_an_evaluation_that_was_cut_short_goes_on(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--problems", problems_file, *SHORT, "--n-samples", 4, "--k", "1,4", "--batch-size", 2)
    whole = figures(capsys, solver, *options, "--output", "whole")
    drawn: list[str] = []
    sample = samples_module.Prompter.sample

    def counted(self: Any, problem: Any, number: int, completion: Any) -> Any:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(problem.problem_id)
        return sample(self, problem, number, completion)

    monkeypatch.setattr(samples_module.Prompter, "sample", counted)
    assert call(capsys, solver, *options, "--output", "cut")[0] == 130
    assert len(drawn) == 5
    monkeypatch.setattr(samples_module.Prompter, "sample", sample)
    # With another number of processes, which share out what is missing.
    resumed = figures(capsys, solver, *options, "--output", "cut", "--processes", 2)
    assert Path("cut/results.jsonl").read_text() == Path("whole/results.jsonl").read_text()
    for found in (whole, resumed):
        del found["figures"]["seconds_per_sample"]
    assert resumed == whole
    again = figures(capsys, solver, *options, "--output", "cut")
    assert again["reused"]
    assert again["figures"]["pass@4"] == whole["figures"]["pass@4"]


def test_another_evaluation_in_the_folder(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures(capsys, solver, "--problems", problems_file, *SHORT, "--output", "out")
    code, _, err = call(capsys, solver, "--problems", problems_file, "--max-new-tokens", 7, "--output", "out")
    assert code == 2
    assert "out: holds another evaluation" in err
    told = figures(capsys, solver, "--problems", problems_file, "--max-new-tokens", 7, "--output", "out", "--force")
    assert told["figures"]["cut_off"] == 1.0


def test_two_runs_are_compared_on_the_problems_that_both_were_asked(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What evaluate leaves is what compare reads; one model knows two answers of three, the other none."""
    for name in ("knows", "guesses"):
        export = here / "checkpoints" / name / "checkpoint_best"
        shutil.copytree(solver, export)
        (export / "metrics.json").write_text('{"step": 3}')
        config = f'[experiment]\nname = "{name}"\nstage = "baseline"\n'
        (export / "config.toml").write_text(config)
        (export.parent / "config.toml").write_text(config)
    policy = load_policy(solver)
    torch.nn.init.normal_(policy.lm_head.weight)
    save_weights(policy, here / "checkpoints/guesses/checkpoint_best")
    for name in ("knows", "guesses"):
        figures(capsys, f"checkpoints/{name}", "--problems", problems_file, *SHORT)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "checkpoints/guesses", "checkpoints/knows", "--json"])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    [record] = json.loads(out)["pass_at_k"]
    assert (record["first"], record["second"], record["k"]) == ("guesses", "knows", 1)
    assert (record["first_pass"], record["second_pass"]) == (0.0, pytest.approx(2 / 3))
    assert (record["better"], record["worse"], record["problem_count"]) == (2, 0, 3)
    assert record["interval"] == [0.0, 1.0]  # of three problems


def test_what_people_see(solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, solver, "--problems", problems_file, *SHORT, "--limit", 2)
    assert code == 0
    assert "pass@1                 1.0000" in out
    assert "head 4 on references" in out
    assert Path("evaluations/policy/rows.jsonl/results.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--k", "5", "--n-samples", "3"), "--k 5 needs at least 5 samples"),
        (("--k", "0"), "give whole numbers of at least 1"),
        (("--k", "1;2"), "give whole numbers of at least 1"),
        (("--n-samples", "3", "--temperature", "0"), "3 times the same sample"),
        (("--temperature", "nan"), "nan"),
        (("--top-p", "0"), "0"),
    ],
)
def test_options_that_make_no_sense(
    arguments: tuple[str, ...], said: str, solver: Path, problems_file: Path, here: Path, capsys: Any
) -> None:
    code, _, err = call(capsys, solver, "--problems", problems_file, *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_models_that_cannot_be_evaluated(solver: Path, problems_file: Path, here: Path, capsys: Any) -> None:
    def said(model: object, *more: object) -> str:
        code, _, err = call(capsys, model, "--problems", problems_file, *more)
        assert code == 2
        assert "Traceback" not in err
        return str(err)

    assert "nowhere does not exist" in said("nowhere")
    Path("file").touch()
    assert "file is a file" in said("file")
    Path("empty").mkdir()
    assert "empty holds no model" in said("empty")
    Path("critic").mkdir()
    Path("critic/value_head.safetensors").touch()
    assert "holds a value head alone (a critic's)" in said("critic")
    Path("meta").mkdir()
    Path("meta/params.json").write_text("{}")
    assert "wmtp-ds model import meta DEST" in said("meta")
    Path("run/step_00000003").mkdir(parents=True)
    assert "run/step_00000003 is not whole" in said("run/step_00000003")
    reference = solver.parent / "reference"
    assert "reference has none: take --decode plain" in said(reference, "--decode", "self-speculative")
