"""Operations of a step: counted by hand, by torch's own counter, and from the tensors of a real model."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from wmtp_ds.bench import materialised
from wmtp_ds.bench.operations import Operations, Trains, Work, mfu, needed, nominal, peak_of
from wmtp_ds.bench.sizes import REFERENCES, SIZES, MemoryNeed, Shape, check_memory
from wmtp_ds.config.training import training_class
from wmtp_ds.data.batches import Batch
from wmtp_ds.errors import UserError
from wmtp_ds.models import reference as reference_module
from wmtp_ds.models.micro import make_micro_models
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.stages import base, rho1
from wmtp_ds.stages.base import StageModel, Totals, make_stage

SMALL = Shape(24, 40, 3, 6, 2, vocab_size=72, n_future_tokens=4)
OTHER = Shape(16, 24, 2, 2, 2, vocab_size=72, n_future_tokens=1)
REQUIRED = {
    "baseline": {},
    "critic": {},
    "verifiable": {"beta": 0.9, "value_coef": 0.5, "weight_clip_min": 0.1, "weight_clip_max": 5.0},
    "rho1": {"temperature": 1.0, "k_percent": 0.5},
}
# Prompt and solution of each sequence; the last three positions of the second are padding.
LENGTHS, WIDTH = [(4, 9), (3, 7), (1, 12)], 13


def policy_of(shape: Shape) -> MTPLlamaForCausalLM:
    return MTPLlamaForCausalLM(LlamaConfig.from_dict(shape.fields(max_length=64, attention="eager")))


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    supervised = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    segments = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int32)
    for row, (prompt, solution) in enumerate(LENGTHS):
        supervised[row, prompt : prompt + solution] = True
        segments[row, : prompt + solution] = 1
    return Batch(
        input_ids=torch.randint(3, SMALL.vocab_size, supervised.shape, generator=generator),
        supervised=supervised,
        decisions=torch.nn.functional.pad(supervised[:, 1:], (0, 1)),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        segment_ids=segments,
        row_ids=torch.arange(len(LENGTHS)),
        correct=torch.tensor([True, False, True]),
    )


def stage_model(name: str) -> tuple[StageModel, Trains]:
    config = training_class(name)(n_epochs=1, batch_size=3, learning_rate=1e-3, **REQUIRED[name])
    stage = make_stage(name, config)
    head = ValueHead(SMALL.hidden_size, "mlp") if config.has_value_head else None
    if head is not None:
        torch.nn.init.normal_(head.output.weight)
    model = StageModel(policy_of(SMALL).requires_grad_(stage.trains_policy), head, stage)
    return model, Trains(stage.trains_policy, "mlp" if head else None, OTHER if config.needs_reference else None)


def work_of(model: StageModel, batch: Batch) -> Work:
    """By loops over positions."""
    n = model.n
    targets = [sum(k <= j < p + s and j >= p for j in range(p + s)) for k in range(1, n + 1) for p, s in LENGTHS]
    counts = model.stage.counts(batch, n)
    lengths = [p + s for p, s in LENGTHS]
    return Work(
        tokens=sum(lengths),
        pairs=sum(1 for length in lengths for i in range(length) for j in range(length) if j <= i),
        positions=len(LENGTHS) * WIDTH,
        full_pairs=len(LENGTHS) * WIDTH**2,
        targets=sum(targets),
        learned=float(counts.targets_n.sum()),
        next_targets=sum(targets[: len(LENGTHS)]),
    )


@pytest.fixture
def plain(monkeypatch):
    """Stages and reference compute their losses from materialised logits, whose products torch's counter can see."""
    for module in (base, rho1, reference_module):
        for name, function in materialised._REPLACEMENTS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("name", REQUIRED)
def test_nominal_operations_are_those_that_torch_counts(plain, name):
    model, trains = stage_model(name)
    batch = make_batch()
    totals = Totals.unpack(model.stage.counts(batch, model.n).pack(), model.n)
    with FlopCounterMode(display=False) as counter:
        found = None
        if trains.reference is not None:
            with torch.no_grad():
                found = ReferenceModel(policy_of(OTHER))(batch)
        loss, *_ = model(batch, totals, found)
        loss.backward()
    assert counter.get_total_flops() == nominal(SMALL, trains, work_of(model, batch)).total


@pytest.mark.parametrize("name", REQUIRED)
def test_needed_operations_from_the_matrices_of_the_model(name):
    model, trains = stage_model(name)
    work = work_of(model, make_batch())

    def block(layer: torch.nn.Module, shape: Shape) -> float:
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        attention = layer.self_attn.o_proj.in_features
        # Scores and weighted values: a multiplication and an addition of each, for each pair.
        return 2 * matrices * work.tokens + 2 * 2 * attention * work.pairs

    passes = 3 if trains.policy else 1
    policy = model.policy
    expected = passes * sum(block(layer, SMALL) for layer in policy.model.layers[:-1])
    if trains.policy:
        expected += 3 * sum(block(layer, SMALL) for layer in (policy.model.layers[-1], *policy.mtp_heads))
        expected += 2 * policy.lm_head.weight.numel() * work.targets
        expected += 4 * policy.lm_head.weight.numel() * work.learned
    if model.value_head is not None:
        expected += 6 * work.tokens * sum(p.numel() for p in model.value_head.parameters() if p.dim() == 2)
    if trains.reference is not None:
        other = policy_of(OTHER)
        expected += sum(block(layer, OTHER) for layer in other.model.layers)
        expected += 2 * other.lm_head.weight.numel() * work.next_targets
    assert needed(SMALL, trains, work).total == pytest.approx(expected, rel=1e-12)


def test_rho1_learns_from_a_share_of_the_targets():
    model, _ = stage_model("rho1")
    batch = make_batch()
    of_heads = model.stage.counts(batch, model.n).supervised_n.tolist()
    work = work_of(model, batch)
    assert work.targets == sum(of_heads)
    assert work.learned == sum(-(-count // 2) for count in of_heads)  # half of each head's, rounded up


def test_less_is_needed_than_nominal():
    model, trains = stage_model("baseline")
    work = work_of(model, make_batch())
    parts = ("trunk", "heads", "unembedding")
    few, many = needed(SMALL, trains, work), nominal(SMALL, trains, work)
    assert all(0 < getattr(few, part) < getattr(many, part) for part in parts)
    assert few.value_head == few.reference == 0


def test_mfu_by_hand():
    # 6e12 operations in half a second on two devices of 10 TFLOP/s.
    assert mfu(6e12, 0.5, 2, 10.0) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="must be positive"):
        mfu(1.0, 0.0, 1, 1.0)
    assert Operations(1, 2, 3, 4, 5).total == 15


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "float32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 311.9),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),  # which it cannot
        ("NVIDIA GeForce GTX 1080", "float32", None),
    ],
)
def test_peaks_by_name(name, dtype, peak):
    assert peak_of(name, dtype) == peak


# --- sizes ---


@pytest.mark.parametrize("shape", [*SIZES.values(), *REFERENCES.values()])
def test_parameters_are_those_of_the_model(shape):
    with torch.device("meta"):
        model = policy_of(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_sizes_are_what_their_names_say():
    assert SIZES["7b"].parameters == 6_738_415_616  # Llama-2-7B, as published
    assert SIZES["7b"].trunk_blocks == 28
    assert 1.15e9 < SIZES["1b"].parameters < 1.25e9
    assert 150e6 < SIZES["160m"].parameters < 170e6


def test_micro_is_the_micro_model(tmp_path: Path):
    row = {"problem_id": "a", "instruction": "add", "output": "x = 1 + 2", "is_correct": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    make_micro_models(data=tmp_path / "rows.jsonl", policy=tmp_path / "policy", reference=tmp_path / "reference")
    for folder, shape in (("policy", SIZES["micro"]), ("reference", REFERENCES["micro"])):
        made = json.loads((tmp_path / folder / "config.json").read_text())
        names = [name for name in shape.__dataclass_fields__ if name not in ("vocab_size", "n_future_tokens")]
        assert {name: made[name] for name in names} == {name: getattr(shape, name) for name in names}


def test_memory_by_hand():
    assert MemoryNeed(1000, 10, sixteen_bit=True).bytes == 1000 * (2 + 2 + 4 + 8) + 10 * 2
    assert MemoryNeed(1000, 10, sixteen_bit=False).bytes == 1000 * (4 + 4 + 4 + 8) + 10 * 4


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic(monkeypatch):
    need = MemoryNeed(SIZES["7b"].parameters, 0, sixteen_bit=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 20 * 2**30}))
    with pytest.raises(UserError) as refused:
        check_memory(need, "cpu", 1, "7b")
    message = str(refused.value)
    assert "6,738,415,616 trained parameters × 20 bytes" in message
    assert "= 125.5 GiB" in message
    assert "20.0 GiB available" in message
    check_memory(MemoryNeed(SIZES["micro"].parameters, 0, sixteen_bit=False), "cpu", 1, "micro")


def test_gpus_share_the_model(monkeypatch):
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda index: type("Properties", (), {"total_memory": 80 * 2**30})
    )
    need = MemoryNeed(SIZES["7b"].parameters, 0, sixteen_bit=True)  # 100.4 GiB
    with pytest.raises(UserError, match=r"1 GPU of 80.0 GiB"):
        check_memory(need, "cuda", 1, "7b")
    check_memory(need, "cuda", 2, "7b")
