"""Rho-1's cross-entropy on each arm: a selection sorted in Python, float64 logits for the rest."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import (
    IGNORED,
    Arm,
    Case,
    Result,
    assert_as_exact_as_plain,
    exact,
    peaked_layer,
    plain,
    relative_largest,
    selection,
)
from torch import Tensor

from wmtp_kernels import rho1_linear_cross_entropy
from wmtp_kernels.rho1 import kept_count

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and infinities are asked for


class Batch(NamedTuple):
    hidden_nBSD: Tensor
    weight_VD: Tensor
    targets_nBS: Tensor
    reference_nBS: Tensor
    scales_n: Tensor

    def counts(self) -> Tensor:
        return (self.targets_nBS != IGNORED).sum(-1).cpu()

    def flat(self, weights_nBS: Tensor) -> Case:
        """The same as rows, with given weights."""
        scales = self.scales_n[:, None, None].expand(self.targets_nBS.shape).reshape(-1)
        return Case(
            self.hidden_nBSD.flatten(0, 2), self.weight_VD, self.targets_nBS.flatten(),
            weights_nBS.flatten().to(scales.device, torch.float32), scales,
        )  # fmt: skip


def make_batch(arm: Arm, dtype: torch.dtype, seed: int = 0, shape: tuple[int, ...] | None = None) -> Batch:
    """4 heads of 8192 positions, D 4096, V 32000 on a GPU; a sequence without targets, and a position."""
    heads, batch, length, dim, vocabulary = shape or arm.size((2, 3, 5, 24, 67), (4, 4, 2048, 4096, 32_000))
    hidden, weight, targets = peaked_layer(arm, (heads, batch, length), dim, vocabulary, dtype, seed)
    targets[:, batch // 2 : batch // 2 + 1] = IGNORED
    targets[..., length // 2 : length // 2 + 1] = IGNORED
    reference = 5 * torch.rand(targets.shape, generator=arm.generator(seed + 1), device=arm.device)
    scales = (0.5 + torch.rand(heads, generator=arm.generator(seed + 2), device=arm.device)) / max(targets.numel(), 1)
    return Batch(hidden, weight, targets, reference, scales)


class Measured(NamedTuple):
    result: Result
    ce_nBS: Tensor
    weights_nBS: Tensor


def measured(batch: Batch, counts: Tensor | None = None, **options: Any) -> Measured:
    hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
    loss, ce, weights = rho1_linear_cross_entropy(
        hidden, weight, *batch[2:4], scales_n=batch.scales_n, counts_nB=counts, **options
    )
    assert not ce.requires_grad
    assert not weights.requires_grad
    assert loss.dtype == ce.dtype == weights.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Measured((loss.detach(), ce.flatten(), hidden.grad.flatten(0, 2), weight.grad), ce, weights)


def assert_right(batch: Batch, found: Measured, options: dict[str, Any], slack: float) -> None:
    """The selection follows from the losses as they were computed; the rest from the selection."""
    expected = selection(found.ce_nBS, batch.reference_nBS, batch.targets_nBS, options)
    if options.get("weighting") == "softmax":
        assert relative_largest(found.weights_nBS.cpu(), expected) < 1e-5
    else:
        assert torch.equal(found.weights_nBS.cpu().double(), expected)
    case = batch.flat(found.weights_nBS)
    assert_as_exact_as_plain(found.result, plain(case), exact(case), slack)
    hidden_grad, ignored = found.result[2], batch.targets_nBS.flatten() == IGNORED
    assert not found.ce_nBS.flatten()[ignored].any()
    assert not hidden_grad[found.weights_nBS.flatten() == 0].any()


CHOICES = [
    {"k_percent": 0.5},
    {"k_percent": 0.4, "scope": "sequence"},
    {"k_percent": 0.35, "excess": "absolute"},
    {"k_percent": 0.6, "excess": "reference", "scope": "sequence"},
    {"weighting": "softmax", "temperature": 0.7},
    {"k_percent": 1.0},
]


# What is chosen and what it weighs hardly depends on what computes: the slow interpreter takes fewer of them.
GPU = pytest.mark.gpu
GROUPS = [
    *(("torch", torch.float32, options, counted) for options in CHOICES for counted in (False, True)),
    *(("torch", torch.bfloat16, options, False) for options in CHOICES),
    *(("interpreter", torch.float32, options, True) for options in CHOICES),
    *(("interpreter", torch.bfloat16, options, False) for options in (CHOICES[0], CHOICES[1], CHOICES[4])),
    *(
        pytest.param("cuda", dtype, options, counted, marks=GPU)
        for dtype in (torch.float32, torch.bfloat16)
        for options in CHOICES
        for counted in (False, True)
    ),
]


@pytest.mark.parametrize(("arm", "dtype", "options", "counted"), GROUPS, indirect=["arm"])
def test_groups_within_a_chunk(arm, dtype, options, counted):
    """Losses, selection and gradients while a chunk's logits are at hand."""
    batch = make_batch(arm, dtype)
    found = measured(batch, batch.counts() if counted else None, **options)
    assert_right(batch, found, options, arm.slack(dtype))


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[1], CHOICES[4]], ids=["batch", "sequence", "softmax"])
@pytest.mark.parametrize(
    ("chunk", "dtype", "counted"),
    [
        ("a few rows", torch.float32, False),
        ("a few rows", torch.bfloat16, True),
        ("one group", torch.float32, True),
    ],
)
def test_chunks_of_other_sizes(arm, chunk_of, dtype, options, counted, chunk):
    """Groups larger than a chunk need two passes; a chunk of one group or a little more is taken by groups."""
    batch = make_batch(arm, dtype, seed=1)
    heads, sequences, length = batch.targets_nBS.shape
    group = length * (sequences if options.get("scope") != "sequence" else 1)
    chunk_of(group + 1 if chunk == "one group" else min(4 * heads, group - 1))
    found = measured(batch, batch.counts() if counted else None, **options)
    assert_right(batch, found, options, arm.slack(dtype))


def test_by_blocks(arm, by_blocks, chunk_of):
    batch = make_batch(arm, torch.bfloat16)
    for rows in (10**6, 4):
        chunk_of(rows)
        assert_right(batch, measured(batch, **CHOICES[0]), CHOICES[0], arm.slack(torch.bfloat16))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("chunk", [10**6, 4])
def test_ties_go_to_the_lower_index(arm, chunk_of, counted, chunk):
    """Where all losses and references are equal, the first of each group are selected, by position."""
    batch = make_batch(arm, torch.float32)
    same = batch._replace(
        hidden_nBSD=torch.zeros_like(batch.hidden_nBSD), reference_nBS=torch.ones_like(batch.reference_nBS),
        targets_nBS=torch.where(batch.targets_nBS == IGNORED, IGNORED, 1),
    )  # fmt: skip
    chunk_of(chunk)
    found = measured(same, same.counts() if counted else None, k_percent=0.5)
    assert_right(same, found, {"k_percent": 0.5}, 0.0)
    for weights, targets in zip(found.weights_nBS.flatten(1), same.targets_nBS.flatten(1), strict=True):
        chosen = weights[targets != IGNORED]
        assert chosen.tolist() == sorted(chosen.tolist(), reverse=True)


@pytest.mark.parametrize("share", [0.55, 1e-9, 0.3333333333333333, 1.0])
def test_counts_are_exact(arm, share):
    batch = make_batch(arm, torch.float32)
    for scope, supervised in (("batch", batch.counts().sum(-1)), ("sequence", batch.counts())):
        found = measured(batch, k_percent=share, scope=scope)
        kept = found.weights_nBS.sum((-1, -2) if scope == "batch" else -1).cpu()
        assert kept.flatten().tolist() == [kept_count(m, share) for m in supervised.flatten().tolist()]


def test_infinite_losses_are_ranked(arm):
    """A target that cannot be has an infinite loss, and comes first; nothing infinite is left out of the selection."""
    batch = make_batch(arm, torch.float32)
    reference = batch.reference_nBS.clone()
    reference[0, 0, 0] = -math.inf
    reference[1, 0, 1] = math.inf
    targets = batch.targets_nBS.clone()
    targets[0, 0, 0] = targets[1, 0, 1] = 2
    batch = batch._replace(reference_nBS=reference, targets_nBS=targets)
    found = measured(batch, k_percent=0.5)
    assert found.weights_nBS[0, 0, 0] == 1
    assert found.weights_nBS[1, 0, 1] == 0
    supervised = (batch.targets_nBS != IGNORED).sum((1, 2)).tolist()
    assert found.weights_nBS.sum((1, 2)).tolist() == [kept_count(m, 0.5) for m in supervised]


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[4]], ids=["topk", "softmax"])
@pytest.mark.parametrize("counted", [False, True])
def test_what_stands_at_ignored_rows_counts_for_nothing(arm, options, counted):
    batch = make_batch(arm, torch.bfloat16)
    hidden, reference = batch.hidden_nBSD.clone(), batch.reference_nBS.clone()
    ignored = batch.targets_nBS == IGNORED
    hidden[ignored], reference[ignored] = math.nan, math.nan
    counts = batch.counts() if counted else None
    expected = measured(batch, counts, **options)
    found = measured(batch._replace(hidden_nBSD=hidden, reference_nBS=reference), counts, **options)
    assert torch.equal(found.weights_nBS, expected.weights_nBS)
    for a, b in zip(found.result, expected.result, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[1], CHOICES[4]], ids=["batch", "sequence", "softmax"])
def test_nothing_to_learn(arm, options):
    for shape in (None, (3, 0, 5, 8, 11), (2, 2, 0, 8, 11)):
        batch = make_batch(arm, torch.bfloat16, 0, shape)
        silent = batch._replace(targets_nBS=torch.full_like(batch.targets_nBS, IGNORED))
        for counts in (None, silent.counts()):
            found = measured(silent, counts, **options)
            assert found.weights_nBS.shape == silent.targets_nBS.shape
            assert not any(x.any() for x in (*found.result, found.weights_nBS))


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[4]], ids=["topk", "softmax"])
def test_the_same_without_gradient(arm, chunk_of, options):
    batch = make_batch(arm, torch.float32)
    for rows in (10**6, 6):
        chunk_of(rows)
        expected = measured(batch, **options)
        with torch.no_grad():
            loss, ce, weights = rho1_linear_cross_entropy(
                batch.hidden_nBSD, *batch[1:4], scales_n=batch.scales_n, **options
            )
        assert torch.equal(weights, expected.weights_nBS)
        assert torch.equal(ce, expected.ce_nBS)
        torch.testing.assert_close(loss, expected.result[0])


def test_inputs_of_any_layout(arm):
    batch = make_batch(arm, torch.float32)
    expected = measured(batch, k_percent=0.5)
    cut = Batch(*(torch.stack([x, torch.zeros_like(x)], -1)[..., 0] for x in batch))
    found = measured(cut, k_percent=0.5)
    assert torch.equal(found.weights_nBS, expected.weights_nBS)
    for a, b in zip(found.result, expected.result, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_wrong_arguments_are_refused(arm):
    hidden, weight, targets, reference, scales = make_batch(arm, torch.float32)

    def refused(*arguments: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            rho1_linear_cross_entropy(*arguments, **options)

    refused(hidden, weight, targets[..., 1:], reference, match="targets")
    refused(hidden, weight, targets, reference[0], match="reference")
    refused(hidden, weight.double(), targets, reference, match="the unembedding is torch.float64")
    refused(hidden, weight, targets.to("meta"), reference, match="targets must be on the hidden states' device")
    refused(hidden, weight, targets, reference.to("meta"), match="reference must be on the hidden states' device")
    refused(hidden, weight, targets, reference, scales_n=scales[1:], match="scales must have shape")
    counts = (targets != IGNORED).sum(-1)
    refused(hidden, weight, targets, reference, counts_nB=counts.cpu()[1:], match=r"counts must be")
    refused(hidden, weight, targets, reference, counts_nB=counts.to("meta"), match=r"counts must be .* on the CPU")
    for options in ({"k_percent": 0.0}, {"k_percent": 1.1}, {"k_percent": math.nan}):
        refused(hidden, weight, targets, reference, **options, match="k_percent")
    for temperature in (0.0, -1.0, math.nan):
        refused(hidden, weight, targets, reference, weighting="softmax", temperature=temperature, match="temperature")
    for options in ({"excess": "ratio"}, {"scope": "token"}, {"weighting": "threshold"}):
        refused(hidden, weight, targets, reference, **options, match=next(iter(options.values())))
