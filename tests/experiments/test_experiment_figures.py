"""What the experiments compute from runs, against other ways to say it."""

import json
import random
from difflib import SequenceMatcher
from pathlib import Path

import corpora
import corruption
import critic_quality
import heads
import numpy as np
import preference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from intervals import Mean, difference, over_seeds
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from wmtp_ds.config import load_config
from wmtp_ds.data.rows import Row
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.look.columns import Solution, Token
from wmtp_ds.models.loading import load_policy
from wmtp_ds.models.micro import make_micro_models


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_intervals_are_students(values: list[float]) -> None:
    found = over_seeds(values)
    assert found.mean == pytest.approx(np.mean(values))
    if np.ptp(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_differences_are_paired_by_seed() -> None:
    hard, easy = [1.0, 5.0, 9.0], [0.5, 4.5, 8.5]
    assert difference(easy, hard) == Mean(-0.5, pytest.approx(0.0, abs=1e-12))
    assert over_seeds([3.0]) == Mean(3.0, None)
    assert over_seeds([3.0]).text(1) == "3.0"
    assert Mean(0.12345, 0.01).text(3) == "0.123 ± 0.010"


def test_steps_to_a_loss_lie_between_evaluations() -> None:
    steps, losses = [10, 20, 30], [5.0, 3.0, 2.0]
    assert corruption.steps_to(steps, losses, 4.0) == 15
    assert corruption.steps_to(steps, losses, 2.25) == pytest.approx(27.5)
    assert corruption.steps_to(steps, losses, 2.0) == 30
    assert corruption.steps_to(steps, losses, 6.0) == 10
    assert corruption.steps_to(steps, losses, 1.9) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_calibration_from_its_definition(pairs: list[tuple[float, bool]]) -> None:
    values, labels = np.array([value for value, _ in pairs]), np.array([label for _, label in pairs])
    error = 0.0
    for number in range(10):
        inside = [
            pair for pair in pairs if number / 10 <= pair[0] < (number + 1) / 10 or (number == 9 and pair[0] == 1)
        ]
        if inside:
            gap = np.mean([value for value, _ in inside]) - np.mean([label for _, label in inside])
            error += len(inside) / len(pairs) * abs(gap)
    # A value on the border of two bins may fall into either, by rounding.
    if not any(0 < abs(value * 10 - round(value * 10)) < 1e-9 for value, _ in pairs):
        assert critic_quality.calibration_error(values, labels) == pytest.approx(error)
    assert sum(count for count, _, _ in critic_quality.reliability(values, labels)) == len(pairs)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> corpora.Files:
    """Forty problems with a right and a wrong solution."""
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    for name, problems in (("train", range(40)), ("validation", range(40, 50))):
        lines = []
        for number in problems:
            body = " + ".join(rng.choice("abcdefgh") for _ in range(30))
            for is_correct in (True, False):
                lines.append(
                    {
                        "problem_id": str(number),
                        "instruction": f"Add {number}.",
                        "input": "",
                        "output": f"def f(x):\n    return {body}{'' if is_correct else ' - 1'}\n",
                        "is_correct": is_correct,
                        "difficulty": 1 + number % 3,
                    }
                )
        corpora.write_rows(folder / f"{name}.jsonl", lines)
    return corpora.Files(folder / "train.jsonl", folder / "validation.jsonl")


@pytest.fixture(scope="module")
def models(rows: corpora.Files, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Policies with one, two and four heads."""
    root = tmp_path_factory.mktemp("models")
    for count in heads.HEADS:
        make_micro_models(
            data=rows.train, policy=root / str(count), reference=root / "unused", template="plain", vocab_size=300,
            n_future_tokens=count, trunk_layers=2,
        )  # fmt: skip
    return {count: root / str(count) for count in heads.HEADS}


def test_halves_share_no_problem(rows: corpora.Files) -> None:
    for correct_only in (False, True):
        first, second = corpora.halves(rows, correct_only=correct_only)
        one, other = (corpora.read_rows(files.train) for files in (first, second))
        ids = [{row["problem_id"] for row in part} for part in (one, other)]
        assert not ids[0] & ids[1]
        assert ids[0] | ids[1] == {str(number) for number in range(40)}
        assert min(map(len, ids)) > 10
        right = all(row["is_correct"] for row in (*one, *other, *corpora.read_rows(second.validation)))
        assert right == correct_only
        assert len(one) + len(other) == (40 if correct_only else 80)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_as_many_tokens_are_corrupted_as_it_says(
    share: float, rows: corpora.Files, models: dict[int, Path], tmp_path: Path
) -> None:
    copy = corpora.Files(tmp_path / "train.jsonl", rows.validation)
    copy.train.write_text(rows.train.read_text())
    tokenizer = corpora.tokenizer_of(models[4])
    found = corpora.corrupted(copy, tokenizer, share)
    assert found.validation == rows.validation
    encoder = TextEncoder(tokenizer)
    kept = total = 0
    for clean, spoilt in zip(corpora.read_rows(copy.train), corpora.read_rows(found.train), strict=True):
        assert clean | {"output": "", "metadata": {}} == spoilt | {"output": "", "metadata": {}}
        before, after = ([text[a:b] for a, b in encoder.spans(text)] for text in (clean["output"], spoilt["output"]))
        kept += sum(block.size for block in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks())
        total += len(before)
    assert kept / total == pytest.approx(1 - share, abs=0.08)
    assert corpora.intact(found, tokenizer) == pytest.approx(1 - share, abs=0.08)
    assert corpora.intact(copy, tokenizer) == 1.0
    for row in corpora.read_rows(found.train):
        assert all(row["output"][begin:end] for begin, end in row["metadata"]["spoilt"])
    again = found.train.read_text()
    assert corpora.corrupted(copy, tokenizer, share).train.read_text() == again
    assert corpora.corrupted(copy, tokenizer, 0.0) == copy


def test_compute_of_heads_is_what_torch_counts(models: dict[int, Path]) -> None:
    """Matrix products with weights, by torch's own counter: two operations each."""
    for count, folder in models.items():
        policy = load_policy(folder, n_future_tokens=count).eval()
        length = 16
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            states = policy.head_states(policy.trunk(torch.ones(1, length, dtype=torch.int64)))
            policy.lm_head(states)
        counted = counter.get_flop_counts()["Global"]
        products = sum(
            count for name, count in counted.items() if "attention" not in str(name) and "bmm" not in str(name)
        )
        assert heads.cost_per_token(folder) == products / length / 2
        blocks = heads.cost_per_token(folder, 0.0)
        assert heads.cost_per_token(folder, 0.5) == (blocks + heads.cost_per_token(folder)) / 2


def test_tables_are_those_of_the_results() -> None:
    """README.md beside the experiments shows what results.json says."""
    import run

    repository = Path(run.__file__).resolve().parents[1]
    readme = (repository / "experiments/README.md").read_text()
    for file in sorted((repository / "experiments/results").glob("*/results.json")):
        results = json.loads(file.read_text())
        name = file.parent.name.removesuffix(f"-{results['size']}")
        study = run.load(name)
        table = study.table(results)
        assert (file.parent / "table.md").read_text() == table + "\n"
        mend = f"run: python experiments/run.py {name} --size {results['size']} --show"
        assert table in readme, mend
        assert run.with_results(readme, file.parent.name, study.TITLE, table, results) == readme, mend
        assert len(results["seeds"]) >= 5
        assert (file.parent / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_of_one_problem_and_nearest() -> None:
    rows = [
        {"problem_id": "a", "is_correct": True}, {"problem_id": "a", "is_correct": True},
        {"problem_id": "a", "is_correct": False}, {"problem_id": "b", "is_correct": False},
        {"problem_id": "b", "is_correct": True}, {"problem_id": "c", "is_correct": False},
    ]  # fmt: skip
    solutions = [[1, 2, 3, 4], [9, 8, 7, 6], [9, 8, 5, 6], [1, 1], [2, 2], [3]]
    assert preference.pairs(rows, solutions) == [(1, 2), (4, 3)]
    assert preference.first_difference([9, 8, 7, 6], [9, 8, 5, 6]) == 2
    assert preference.first_difference([1, 2], [1, 2, 3]) == 2


def test_edits_are_what_a_wrong_solution_has_otherwise(models: dict[int, Path]) -> None:
    tokenizer = corpora.tokenizer_of(models[4])
    texts = ["return a + b - c\n", "return a + b + c\n", "return a + b\n", "while c < d:\n"]
    rows = [
        {"problem_id": problem, "instruction": "i", "input": "", "output": text, "is_correct": right}
        for problem, text, right in (
            ("p", texts[3], True), ("p", texts[0], True), ("p", texts[1], False), ("p", texts[2], False),
            ("q", texts[1], False),
        )
    ]  # fmt: skip
    found = preference.edits(rows, tokenizer)
    tokens = [[*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id] for row in rows]
    assert [len(own) for own in found] == [len(own) for own in tokens]
    assert not any(found[0] + found[1] + found[4]), "right ones, and one whose problem has no right one"
    kept = [token for token, edited in zip(tokens[2], found[2], strict=True) if not edited]
    assert tokenizer.decode([token for token, edited in zip(tokens[2], found[2], strict=True) if edited]).strip() == "+"
    assert len(kept) == len(tokens[2]) - sum(found[2])
    # Something is missing: the token after that is marked.
    assert 1 <= sum(found[3]) <= 2
    assert found[3].index(True) >= len(tokens[3]) - 3


def test_preference_is_the_models_own(rows: corpora.Files, models: dict[int, Path]) -> None:
    """By transformers' cross-entropy of each sequence alone, from the first token on that is another one."""
    found = preference.preference(models[4], rows.validation, "cpu")
    plain = LlamaForCausalLM.from_pretrained(models[4], trust_remote_code=False).eval()
    tokenizer = corpora.tokenizer_of(models[4])
    odds = []
    for right, wrong in zip(*[iter(corpora.read_rows(rows.validation))] * 2, strict=True):
        ends = []
        a, b = ([*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id] for row in (right, wrong))
        first = next(place for place, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
        for row, solution in ((right, a), (wrong, b)):
            prompt = [tokenizer.bos_token_id, *tokenizer(f"{row['instruction']}\n\n").input_ids]
            labels = torch.tensor([[-100] * (len(prompt) + first) + solution[first:]])
            with torch.no_grad():
                loss = plain(torch.tensor([prompt + solution]), labels=labels).loss
            ends.append(-loss.item() * (len(solution) - first))
        odds.append(ends[0] - ends[1])
    assert found["log odds"] == pytest.approx(np.mean(odds), rel=1e-3, abs=1e-4)
    assert found["share"] == np.mean([one > 0 for one in odds])
    assert found["pairs"] == 10


def test_nobody_can_know_an_edit_before_it_is_made() -> None:
    def solution(problem: str, texts: str, is_correct: bool) -> Solution:
        row = Row(problem_id=problem, instruction="i", output=texts, is_correct=is_correct)
        return Solution(row, 1, [Token(text, "name", {}) for text in texts])

    found = critic_quality.ceiling(
        [solution("p", "abcdefghij.", True), solution("p", "abcdeXghij.", False), solution("p", "abcdefghiX.", False)]
    )
    # Eleven tokens: at place p the value has read 10 p of them; the edits are the sixth and the tenth.
    assert found == [0.5] * 6 + [0.75] * 4 + [1.0]


@pytest.mark.parametrize("size", ["small", "large"])
def test_all_stages_read_the_same_rows_as_often(size: str) -> None:
    repository = Path(corpora.__file__).resolve().parents[1]
    overrides = ["models.policy.path=x", "dataset.train=a", "dataset.validation=b", "data_sampling.correct_ratio=0.5"]
    tables = []
    for stage in ("baseline", "critic", "verifiable", "rho1"):
        config = load_config(repository / f"experiments/{size}/{stage}.toml", overrides, checks=False).config
        assert not config.early_stopping.enabled
        alike = ("n_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "scheduler")
        alike += ("max_grad_norm", "warmup_ratio", "optimizer", "betas")
        sampling = config.data_sampling.model_dump(exclude={"curriculum_schedule", "difficulty_bins"})
        assert not sampling["curriculum_learning"]  # by which alone these two are read
        tables.append((config.dataset, sampling, [getattr(config.training, name) for name in alike]))
    assert all(table == tables[0] for table in tables)
