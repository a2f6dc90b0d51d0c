"""A tiny random policy, a batch made by hand, and the policy loss written from its definition."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from wmtp_ds.config.training import training_class
from wmtp_ds.data.batches import Batch, PackedBatch
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.stages.base import Output, StageModel, Totals, make_stage

VOCABULARY, HIDDEN = 64, 32
REQUIRED: dict[str, dict[str, Any]] = {
    "baseline": {},
    "critic": {},
    "verifiable": {"beta": 0.9, "value_coef": 0.5, "weight_clip_min": 0.1, "weight_clip_max": 5.0},
    "rho1": {"temperature": 1.0, "k_percent": 0.5},
}
# Length of prompt and of solution (with its end token) of each sequence; the third has nothing to learn.
LENGTHS = [(3, 5), (1, 9), (4, 0), (2, 2)]
REWARDS = [1.0, 0.0, 1.0, 0.25]


def _make_model(
    stage: str, n: int = 4, dtype: torch.dtype = torch.float64, activation: Any = "sigmoid", **training: Any
) -> StageModel:
    common = {"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    config = training_class(stage)(**(common | REQUIRED[stage] | training))
    llama = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        n_future_tokens=n,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = MTPLlamaForCausalLM(llama)
        for parameter in policy.parameters():
            # The customary 0.02 makes logits so small that every loss is about log(V).
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        head = ValueHead(HIDDEN, "linear", activation) if config.has_value_head else None
        if head is not None:
            head.output.weight.data.normal_(std=0.3)
    made = make_stage(stage, config)
    policy.to(dtype).requires_grad_(made.trains_policy)
    return StageModel(policy, head, made)


def _make_batch(lengths: Sequence[tuple[int, int]], rewards: Sequence[float], size: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    length = size or max(map(sum, lengths))
    shape = len(lengths), length
    supervised, segments = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int32)
    for b, (prompt, solution) in enumerate(lengths):
        supervised[b, prompt : prompt + solution] = True
        segments[b, : prompt + solution] = 1
    return Batch(
        input_ids=torch.randint(VOCABULARY, shape, generator=generator),
        supervised=supervised,
        decisions=torch.nn.functional.pad(supervised[:, 1:], (0, 1)),
        rewards=torch.tensor(rewards),
        segment_ids=segments,
        row_ids=torch.arange(len(lengths)),
        correct=torch.tensor(rewards) >= 0.5,
    )


def _rows(batch: Batch, rows: Sequence[int], trim: bool = True) -> Batch:
    """Some sequences of a batch; without the padding that none of them needs if ``trim``."""
    chosen = {
        field.name: getattr(batch, field.name)[list(rows)] for field in fields(batch) if field.name != "reference"
    }
    if trim:
        longest = int((chosen["segment_ids"] > 0).sum(1).max())
        chosen = {name: x[:, :longest] if x.dim() == 2 else x for name, x in chosen.items()}
    return Batch(**chosen)


def _packed(batch: Batch, rows: Sequence[Sequence[int]]) -> PackedBatch:
    """Sequences of a batch, token by token, in these rows; padded with a token that is none of theirs."""
    tokens = (batch.segment_ids > 0).sum(1).tolist()
    width = max(sum(tokens[s] for s in row) for row in rows) + 2
    order = [s for row in rows for s in row]
    longest = max(tokens[s] for s in order)
    shape = len(rows), width
    fields = {
        "input_ids": torch.full(shape, 61),
        "supervised": torch.zeros(shape, dtype=torch.bool),
        "segment_ids": torch.zeros(shape, dtype=torch.int32),
        "members": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "places": torch.full((len(order), longest), -1),
    }
    for b, row in enumerate(rows):
        i = 0
        for segment, s in enumerate(row):
            for j in range(tokens[s]):
                fields["input_ids"][b, i] = batch.input_ids[s, j]
                fields["supervised"][b, i] = batch.supervised[s, j]
                fields["segment_ids"][b, i] = segment + 1
                fields["position_ids"][b, i] = j
                fields["places"][order.index(s), j] = b * width + i
                i += 1
            fields["members"][b, i - tokens[s] :] = order.index(s)
    return PackedBatch(
        **fields,
        decisions=torch.nn.functional.pad(fields["supervised"][:, 1:], (0, 1)),
        rewards=batch.rewards[order],
        row_ids=batch.row_ids[order],
        correct=batch.correct[order],
    )


def _count(model: StageModel, window: Sequence[Batch]) -> Totals:
    """Totals over a window, as the training loop makes them on a single rank."""
    packed = torch.stack([model.stage.counts(batch, model.n).pack() for batch in window]).sum(0)
    totals = Totals.unpack(packed, model.n)
    if not model.stage.needs_window:
        return totals
    with torch.no_grad():
        values = [model(batch, mode="values") for batch in window]
    return replace(totals, standardisation=model.stage.standardise(values, window))


def _places(batch: Batch, k: int) -> Iterator[tuple[int, int]]:
    """Sequence and position of each supervised target of head ``k``."""
    for b, row in enumerate(batch.supervised.tolist()):
        for i in range(len(row) - k):
            if row[i + k] and batch.segment_ids[b, i] == batch.segment_ids[b, i + k]:
                yield b, i


def _materialised(model: StageModel, batch: Batch, trunk: Tensor | None = None) -> Tensor:
    """``−log p`` of every token for every head at every position, ``[n, B, S, V]``, with gradient."""
    hidden = model.policy.head_states(model.policy.trunk(batch.input_ids) if trunk is None else trunk)
    return -(hidden @ model.policy.lm_head.weight.T).log_softmax(-1)


def _policy_loss(
    model: StageModel, batch: Batch, weight: Callable[[int, int, int], float], selects: bool = False
) -> Tensor:
    """``(1/n) Σ_k (1/M_k) Σ w·CE``; ``weight(k, b, i)`` of the target of head k; M_k = those > 0 if ``selects``."""
    ce = _materialised(model, batch)
    loss = ce.new_zeros(())
    for k in range(1, model.n + 1):
        targets = [(weight(k, b, i), ce[k - 1, b, i, batch.input_ids[b, i + k]]) for b, i in _places(batch, k)]
        counted = sum(w > 0 for w, _ in targets) if selects else len(targets)
        if counted:
            loss = loss + sum(w * x for w, x in targets) / counted / model.n
    return loss


def _gradients(model: StageModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every trainable parameter, zero where the loss does not depend on it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def _run(
    model: StageModel, window: Sequence[Batch], references: Sequence[Tensor | None] | None = None
) -> tuple[Output, dict[str, Tensor]]:
    """One optimizer step's loss, shares (summed) and gradients, micro-batch by micro-batch."""
    totals = _count(model, window)
    model.zero_grad()
    losses, shares = [], []
    output = None
    for batch, reference in zip(window, references or [None] * len(window), strict=True):
        output = Output(*model(batch, totals, reference))
        output.loss.backward()
        losses.append(output.loss.detach())
        shares.append(output.shares)
    assert output is not None
    summed = {name: sum((share[name].detach() for share in shares), torch.zeros(())) for name in shares[0]}
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return Output(torch.stack(losses).sum(), summed, output.moments), grads


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name].double(), x.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on many threads, by far where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch() -> Batch:
    """Four sequences: of prompts and solutions of several lengths, one without anything to learn."""
    return _make_batch(LENGTHS, REWARDS)


@pytest.fixture
def references(batch: Batch) -> Tensor:
    """What a reference model might say of each supervised token, float32 ``[B, S]``, 0 elsewhere."""
    losses = 8 * torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(2))
    return losses * batch.supervised


@pytest.fixture
def make_model() -> Callable[..., StageModel]:
    return _make_model


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return _make_batch


@pytest.fixture
def rows() -> Callable[..., Batch]:
    return _rows


@pytest.fixture
def packed() -> Callable[..., PackedBatch]:
    return _packed


@pytest.fixture
def count() -> Callable[..., Totals]:
    return _count


@pytest.fixture
def places() -> Callable[..., Iterator[tuple[int, int]]]:
    return _places


@pytest.fixture
def materialised() -> Callable[..., Tensor]:
    return _materialised


@pytest.fixture
def policy_loss() -> Callable[..., Tensor]:
    return _policy_loss


@pytest.fixture
def gradients() -> Callable[..., dict[str, Tensor]]:
    return _gradients


@pytest.fixture
def run() -> Callable[..., tuple[Output, dict[str, Tensor]]]:
    return _run


@pytest.fixture
def assert_same() -> Callable[..., None]:
    return _assert_same
