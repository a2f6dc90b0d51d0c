"""`wmtp-ds evaluate` from beginning to end, on a model that knows two of three answers."""

import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wmtp_ds.cli.main import main
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import UserError
from wmtp_ds.evaluate import evaluation as evaluation_module
from wmtp_ds.evaluate import samples as samples_module
from wmtp_ds.evaluate.samples import stream_of
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


def test_whatever_decides_samples_makes_another_evaluation(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--problems", problems_file, "--max-new-tokens", 3, "--n-samples", 2, "--temperature", 0.7)
    figures(capsys, solver, *options, "--output", "out")
    other: dict[str, object] = {
        "--seed": 1, "--temperature": 0.8, "--top-p": 0.9, "--n-samples": 3, "--prompt": "plain",
        "--decode": "self-speculative",
    }  # fmt: skip
    for option, value in other.items():
        code, _, err = call(capsys, solver, *options, option, value, "--output", "out")
        assert (code, "out: holds another evaluation" in err) == (2, True), option
    assert figures(capsys, solver, *options, "--batch-size", 1, "--output", "out")["reused"]


@pytest.mark.parametrize("decode", ["plain", "self-speculative"])
def test_samples_are_those_of_the_seed(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str], decode: str
) -> None:
    def texts(seed: int, temperature: float, top_p: float) -> list[str]:
        sampled = ("--n-samples", 4, "--seed", seed, "--temperature", temperature, "--top-p", top_p)
        output = f"{seed}-{temperature}-{top_p}"
        options = ("--problems", problems_file, *SHORT, *sampled, "--decode", decode, "--output", output)
        figures(capsys, solver, *options)
        lines = Path(output, "results.jsonl").read_text().splitlines()
        return [sample["program"] for line in lines for sample in json.loads(line)["samples"]]

    found = texts(0, 2.0, 1.0)
    assert len(set(found)) == len(found), "a model that knows three solutions varies them"
    assert not set(found) & set(texts(1, 2.0, 1.0))
    # The likeliest token alone: three solutions, four times each.
    assert len(set(texts(0, 2.0, 1e-6))) == len(set(texts(0, 0.01, 1.0))) == 3


def test_no_two_samples_share_their_random_numbers() -> None:
    ids = ["1", "11", "1/1", "1\n1", "", "0"]
    streams = [stream_of(problem_id, number) for problem_id in ids for number in range(120)]
    assert len(set(streams)) == len(streams)


def test_what_was_cut_short_is_not_dropped_for_another_evaluation(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ("--problems", problems_file, "--output", "out")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_module, "judge", stop)
        assert call(capsys, solver, *options, *SHORT)[0] == 130
    journal = Path("out/.partial-samples-0.journal")
    drawn = journal.read_bytes()
    assert drawn.count(b"\n") == 1 + 3
    code, _, err = call(capsys, solver, *options, "--max-new-tokens", 7)
    assert code == 2
    assert "out: holds another evaluation that was cut short" in err
    assert journal.read_bytes() == drawn
    told = figures(capsys, solver, *options, "--max-new-tokens", 7, "--force")
    assert told["figures"]["cut_off"] == 1.0


def test_other_references_are_another_evaluation(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They decide exact match and predictions."""
    rows = problems_file.read_text()
    Path("rows.jsonl").write_text(rows)
    figures(capsys, solver, "--problems", "rows.jsonl", *SHORT, "--output", "out")
    Path("rows.jsonl").write_text(rows.replace("return -x", "return 0 - x"))
    code, _, err = call(capsys, solver, "--problems", "rows.jsonl", *SHORT, "--output", "out")
    assert code == 2
    assert "out: holds another evaluation" in err


def test_a_model_that_is_replaced_meanwhile(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that still trains replaces its best export."""
    shutil.copytree(solver, "model")

    def replace(*_: object, **__: object) -> dict[str, float]:
        save_weights(load_policy(Path("model")), Path("model"))
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_module, "predict", replace)
        code, _, err = call(capsys, "model", "--problems", problems_file, *SHORT, "--output", "out")
    assert code == 1
    assert "model was replaced while it was evaluated" in err
    assert not Path("out/summary.json").exists()
    assert not list(Path("out").glob(".partial*"))
    assert figures(capsys, "model", "--problems", problems_file, *SHORT, "--output", "out")["figures"]["samples"] == 3


def test_one_command_at_a_time_in_a_folder(
    solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes while the first runs programs, and has drawn all samples."""
    said = []
    judge = evaluation_module.judge

    def meanwhile(*arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(evaluation_module, "judge", judge)
        said.append(call(capsys, solver, "--problems", problems_file, *SHORT, "--output", "out"))
        return judge(*arguments, **keywords)

    monkeypatch.setattr(evaluation_module, "judge", meanwhile)
    told = figures(capsys, solver, "--problems", problems_file, *SHORT, "--output", "out")
    assert told["figures"]["samples"] == 3
    [(code, _, err)] = said
    assert code == 2
    assert "out: another process evaluates into it" in err


def test_folders_of_others(solver: Path, problems_file: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tracking would move a run's metrics.jsonl away."""
    Path("run").mkdir()
    for name in ("config.toml", "metrics.jsonl", "tracking.json"):
        Path("run", name).write_text("{}")
    code, _, err = call(capsys, solver, "--problems", problems_file, *SHORT, "--output", "run")
    assert code == 2
    assert "run: holds other files (config.toml)" in err
    assert len(list(Path("run").iterdir())) == 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("these weights are damaged"), 2, "these weights are damaged"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --batch-size or --processes"),
    ],
)
def test_errors_while_samples_are_drawn(
    processes: int, error: Exception, code: int, said: str, solver: Path, problems_file: Path, here: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    context = multiprocessing.get_context("fork")  # its processes know what is patched here
    monkeypatch.setattr(evaluation_module, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(evaluation_module, "load_model", fail)
    found, _, err = call(capsys, solver, "--problems", problems_file, *SHORT, "--processes", processes)
    assert found == code
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("lives", "code"), [(False, 1), (True, 7)])
def test_a_process_ends_with_its_parent(lives: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go on drawing, and hold its journal. A parent may have died while the process began."""
    parent = os.getpid() if lives else 1
    monkeypatch.setattr(evaluation_module, "die_with_parent", lambda: os._exit(7) if lives else None)
    context = multiprocessing.get_context("fork")
    arguments = (None, None, [], 0, context.Queue(), parent)
    process = context.Process(target=evaluation_module._draw_part, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == code


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
        (("--prompt", "completion"), "3 of 3 problems have none (double): take --prompt alpaca"),
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
    shutil.copytree(solver, "text")
    fields = json.loads(Path("text/config.json").read_text())
    Path("text/config.json").write_text(json.dumps(fields | {"n_future_tokens": "4"}))
    for decode in ("plain", "self-speculative"):
        assert "text/config.json: n_future_tokens is '4'" in said("text", "--decode", decode)
