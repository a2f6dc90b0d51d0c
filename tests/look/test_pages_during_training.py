"""What a page of an evaluation shows, against plain torch; and that looking costs the training nothing."""

import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmtp_ds import distributed
from wmtp_ds.config import load_config
from wmtp_ds.look.during_training import WeightPages, chosen_rows
from wmtp_ds.models.loading import load_policy
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.run_data import RunData, open_data
from wmtp_ds.scores.manifest import Settings
from wmtp_ds.scores.scoring import Scoring
from wmtp_ds.scores.use import use_scores
from wmtp_ds.scores.worker import Work
from wmtp_ds.stages.base import StageModel, make_stage

BETA, ROWS = 0.2, 3
MORE = {"verifiable": [f"training.beta={BETA}", "training.gamma=0.95", 'experiment.critic_checkpoint="none"']}
CPU = torch.device("cpu")


class PlainEngine:
    """What the pages use of an engine, around a module that is not sharded; counts the passes."""

    def __init__(self, module: StageModel):
        self.module, self.passes = module, 0

    @contextmanager
    def without_gradient(self, *, evaluate: bool = False) -> Iterator[None]:
        self.module.train(not evaluate)
        with torch.no_grad():
            yield
        self.module.train()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.passes += 1
        return self.module(*arguments, **keywords)


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


@pytest.fixture
def opened(here: Path) -> Callable[..., tuple[RunData, PlainEngine]]:
    def make(stage: str, *more: str) -> tuple[RunData, PlainEngine]:
        overrides = [f"training.batch_size={ROWS}", *MORE.get(stage, []), *more]
        resolved = load_config(here / f"stage_configs/local/{stage}.toml", overrides, checks=False)
        config = resolved.config
        torch.manual_seed(3)
        head = ValueHead(64, "mlp") if config.training.has_value_head else None
        if head is not None:
            torch.nn.init.normal_(head.output.weight, std=0.5)
        policy = load_policy(here / "storage/models/micro-policy")
        return open_data(resolved, 1), PlainEngine(StageModel(policy, head, make_stage(stage, config.training)))

    return make


def expected_weights(engine: PlainEngine, data: RunData, places: np.ndarray) -> list[tuple[torch.Tensor, bool]]:
    """``clip(exp(δ/β))`` of each row's decisions, and whether it is right."""
    found = []
    for place in places:
        row = data.validation.read_row(int(place))
        batch = data.validation_collator([row], [0])
        begin = int(batch.decisions[0].nonzero()[0])
        with torch.no_grad():
            values = engine.module.value_head(engine.module.policy.trunk(batch.input_ids))[0, begin:-1, 0]
        td = torch.cat([0.95 * values[1:], torch.tensor([float(row.is_correct)])]) - values
        found.append(((td / BETA).exp().clamp(0.1, 5.0), row.is_correct))
    return found


def test_a_page_shows_one_solution_and_a_histogram_of_more(opened: Callable[..., Any], tmp_path: Path) -> None:
    data, engine = opened("verifiable")
    pages = WeightPages(data, tmp_path, CPU)
    assert pages.write(engine, None, 7)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["step_00000007.html", "step_00000007.json", "weights"]
    record = json.loads((pages.folder / "step_00000007.json").read_text())
    looked = expected_weights(engine, data, chosen_rows(data, 42)[:ROWS])
    everything = torch.cat([weights for weights, _ in looked]).double().numpy()
    assert (record["step"], record["column"], record["solutions"]) == (7, "weight", ROWS)
    assert record["tokens"] == len(everything)
    assert {right for _, right in looked} == {True, False}
    edges = np.array(record["edges"])
    assert (edges[0], edges[-1]) == pytest.approx((everything.min(), everything.max()), rel=1e-4)
    for kind, right in (("correct", True), ("incorrect", False)):
        values = torch.cat([weights for weights, correct in looked if correct is right]).numpy()
        # A value that lies on an edge to rounding may be counted on either side of it.
        near = int((np.abs(values[:, None] - edges[1:-1]) < 1e-5).any(1).sum())
        assert np.abs(np.histogram(values, edges)[0] - record[kind]).sum() <= 2 * near + 2
        assert sum(record[kind]) == len(values)
    page = (pages.folder / "step_00000007.html").read_text()
    assert len(page) < 60_000
    assert page.count("<pre class=") == 1
    tips = [float(found) for found in re.findall(r'data-tip="[^"]*weight: ([\d.]+)', page)]
    assert tips == pytest.approx(looked[0][0].tolist(), abs=1e-3)
    shown = data.validation.read_row(int(chosen_rows(data, 42)[0])).output
    text = re.sub(r"<[^>]*>", "", re.findall(r"<pre.*?</pre>", page, re.DOTALL)[0])
    assert text.replace("↵", "").removesuffix("□") == shown.replace("<", "&lt;").replace(">", "&gt;")


def test_it_is_the_same_solution_every_time_and_what_has_changed_is_seen(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    data, engine = opened("verifiable")
    pages = WeightPages(data, tmp_path, CPU)
    assert pages.write(engine, None, 1)
    assert pages.write(engine, None, 2)
    with torch.no_grad():
        engine.module.value_head.output.weight.mul_(-2)
    assert pages.write(engine, None, 3)
    assert WeightPages(data, tmp_path, CPU).write(engine, None, 4)

    def shown(step: int) -> tuple[list[str], dict[str, Any]]:
        page = (pages.folder / f"step_{step:08d}.html").read_text()
        record = json.loads((pages.folder / f"step_{step:08d}.json").read_text())
        return re.findall(r"validation\.jsonl:\d+", page), record | {"step": 0}

    assert shown(1) == shown(2)
    assert shown(3) == shown(4)
    assert shown(1)[0] == shown(3)[0]
    assert shown(1)[1] != shown(3)[1]


def test_a_micro_batch_is_what_it_is_in_training(opened: Callable[..., Any], here: Path, tmp_path: Path) -> None:
    """Rho-1 selects within a micro-batch: the share of its tokens that weigh 1 is k_percent, rounded up."""
    data, engine = opened("rho1", "training.k_percent=0.3", 'training.selection_scope="batch"')
    reference = ReferenceModel(load_policy(here / "storage/models/micro-reference", n_future_tokens=1)).eval()
    pages = WeightPages(data, tmp_path, CPU)
    assert pages.write(engine, torch.no_grad()(reference), 1)
    record = json.loads((pages.folder / "step_00000001.json").read_text())
    assert record["correct"][-1] == math.ceil(0.3 * record["tokens"])
    assert sum(record["incorrect"]) == 0
    assert "reference loss" in (pages.folder / "step_00000001.html").read_text()


@pytest.mark.parametrize("files", [("train",), ("train", "validation")], ids=" ".join)
def test_reference_losses_that_were_computed_beforehand(
    files: tuple[str, ...], opened: Callable[..., Any], here: Path, tmp_path: Path
) -> None:
    """With those of the validation data the page is the model's own; without them there is none."""
    reference = here / "storage/models/micro-reference"
    inputs = tuple(here / f"storage/data/sample/{name}.jsonl" for name in files)
    settings = Settings(
        template="alpaca", max_length=256, compute_dtype="float32", dtype="float32", correct_only=False,
        shard_tokens=2**20,
    )  # fmt: skip
    work = Work(inputs, tmp_path / "scores", reference, reference, settings, batch_size=4, device="cpu", cache_dir=None)
    Scoring(work).run()
    data, engine = opened("rho1", f'models.reference.scores="{tmp_path / "scores"}"')
    use_scores(data.resolved, data)
    pages = WeightPages(data, tmp_path / "scored", CPU)
    (tmp_path / "scored").mkdir()
    assert pages.write(engine, None, 1) == (len(files) == 2)
    if len(files) == 1:
        assert ("were not computed" in pages.silent, engine.passes) == (True, 0)
        return
    live, engine = opened("rho1")
    model = ReferenceModel(load_policy(reference, n_future_tokens=1)).eval()
    (tmp_path / "live").mkdir()
    assert WeightPages(live, tmp_path / "live", CPU).write(engine, torch.no_grad()(model), 1)
    counts = [json.loads((tmp_path / name / "weights/step_00000001.json").read_text()) for name in ("scored", "live")]
    assert counts[0] == counts[1]


def test_a_critic_shows_its_values(opened: Callable[..., Any], tmp_path: Path) -> None:
    data, engine = opened("critic")
    pages = WeightPages(data, tmp_path, CPU)
    assert pages.write(engine, None, 1)
    assert json.loads((pages.folder / "step_00000001.json").read_text())["column"] == "value"


def test_uniform_weights_are_looked_at_once(opened: Callable[..., Any], tmp_path: Path) -> None:
    data, engine = opened("baseline")
    pages = WeightPages(data, tmp_path, CPU)
    assert [pages.write(engine, None, step) for step in (1, 2)] == [False, False]
    assert (pages.silent, engine.passes) == ("uniform: every token weighs 1", 1)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_does_not_say_what_it_weighs(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, engine = opened("baseline")
    monkeypatch.setattr(type(engine.module.stage), "look", lambda *_: {})
    pages = WeightPages(data, tmp_path, CPU)
    assert [pages.write(engine, None, step) for step in (1, 2)] == [False, False]
    assert ("neither weight nor value" in pages.silent, engine.passes) == (True, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_make_no_page(opened: Callable[..., Any], tmp_path: Path, bad: float) -> None:
    data, engine = opened("critic", 'value_head.activation="none"')
    engine.module.value_head.activation = "none"
    with torch.no_grad():
        engine.module.value_head.output.bias.fill_(bad)
    assert not WeightPages(data, tmp_path, CPU).write(engine, None, 1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_once_and_stops_nothing(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, engine = opened("critic")
    pages = WeightPages(data, tmp_path, CPU)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with caplog.at_level(logging.WARNING):
        assert [pages.write(engine, None, step) for step in (1, 2)] == [False, False]
    assert caplog.text.count("training goes on without pages") == 1
    monkeypatch.undo()
    assert pages.write(engine, None, 3)


def test_no_random_number_is_drawn_and_the_mode_is_as_before(opened: Callable[..., Any], tmp_path: Path) -> None:
    data, engine = opened("verifiable", 'training.td_normalize="zscore"')
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    assert WeightPages(data, tmp_path, CPU).write(engine, None, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert engine.module.training
    for parameter, old in zip(engine.module.parameters(), weights, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


def test_a_rank_without_rows_takes_part(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be fewer validation rows than ranks read at once; what rank 0 gathers is then its own."""
    data, engine = opened("verifiable")
    monkeypatch.setattr(distributed, "rank", lambda: 5)
    monkeypatch.setattr(distributed, "gather_arrays", lambda own: torch.cat([own, torch.tensor([[1.5, 1.0]]).double()]))
    pages = WeightPages(data, tmp_path, CPU)
    assert not pages._batch.decisions.any()
    assert pages.write(engine, None, 1)
    assert engine.passes == 1
    assert not list(tmp_path.iterdir()), "rank 0 alone writes"


def test_rows_are_drawn_by_the_seed_and_the_first_is_short(opened: Callable[..., Any]) -> None:
    data, _ = opened("verifiable")
    drawn = {seed: chosen_rows(data, seed).tolist() for seed in range(20)}
    assert all(sorted(rows) == data.validation_rows.tolist() for rows in drawn.values())
    assert len({tuple(rows) for rows in drawn.values()}) > 10
    assert len({rows[0] for rows in drawn.values()}) > 3
    data.validation.output_bytes[:] = 5000
    data.validation.output_bytes[data.validation_rows[5]] = 4000
    assert {int(chosen_rows(data, seed)[0]) for seed in range(5)} == {int(data.validation_rows[5])}
    data.validation.output_bytes[data.validation_rows[2]] = 900
    assert {int(chosen_rows(data, seed)[0]) for seed in range(5)} == {int(data.validation_rows[2])}
