"""The policy loss with TD weights on each arm: loops over tokens for the weights, float64 logits for the rest."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import (
    IGNORED,
    Arm,
    Case,
    Decisions,
    Result,
    advantages_loop,
    assert_as_exact_as_plain,
    decide,
    exact,
    peaked_layer,
    plain,
    relative_largest,
    spread_over_heads,
    targets_of,
    weights_loop,
)
from torch import Tensor

from wmtp_kernels import Standardisation, TDWeights, WeightedLoss, td_weighted_linear_cross_entropy
from wmtp_kernels.statistics import decision_statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and infinities are asked for

GAMMA, BETA, LOW, HIGH = 0.9, 0.6, 0.95, 2.0


class Batch(NamedTuple):
    """One micro-batch: what a layer has to say, and what its weights are made of."""

    hidden_nBSD: Tensor
    weight_VD: Tensor
    targets_nBS: Tensor
    places: Decisions
    scales_n: Tensor

    def td(self, **options: Any) -> TDWeights:
        options = {"gamma": GAMMA, "beta": BETA, "min_weight": LOW, "max_weight": HIGH} | options
        return TDWeights(*self.places, **options)

    def counts(self) -> Tensor:
        return (self.targets_nBS != IGNORED).sum(-1).cpu()

    def flat(self, weights_nBS: Tensor) -> Case:
        """The same as rows, with the weights of an oracle."""
        scales = self.scales_n[:, None, None].expand(self.targets_nBS.shape).reshape(-1)
        return Case(
            self.hidden_nBSD.flatten(0, 2), self.weight_VD, self.targets_nBS.flatten(),
            weights_nBS.flatten().to(scales.device, torch.float32), scales,
        )  # fmt: skip


def make_batch(arm: Arm, dtype: torch.dtype, seed: int = 5, shape: tuple[int, ...] | None = None) -> Batch:
    """4 heads of 8192 positions, D 4096, V 32000 on a GPU."""
    heads, batch, length, dim, vocabulary = shape or arm.size((2, 3, 5, 24, 67), (4, 4, 2048, 4096, 32_000))
    places = decide(arm, batch, length, seed)
    # The kernel reads what the test reads: values that float32 holds.
    hidden, weight, drawn = peaked_layer(arm, (heads, batch, length), dim, vocabulary, dtype, seed, kept=1.0)
    targets = targets_of(arm, places.decisions, heads, drawn)
    scales = (0.5 + torch.rand(heads, generator=arm.generator(seed), device=arm.device)) / targets.numel()
    return Batch(hidden, weight, targets, places, scales)


def weights_of(batch: Batch, td_lambda: float = 0.0, constants: tuple[float, ...] = (0, 1, 0)) -> tuple[Tensor, Tensor]:
    """Advantages and weights of decisions, ``[B, S]``, by loops."""
    advantages = advantages_loop(*batch.places.loops(), GAMMA, td_lambda)
    return advantages, weights_loop(advantages, batch.places.decisions.tolist(), BETA, LOW, HIGH, constants)


def measured(batch: Batch, weights: TDWeights | Tensor, counts: Tensor | None = None) -> tuple[WeightedLoss, Result]:
    """What the operation returns, and as ``exact`` does: loss, losses of heads, both gradients."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
    found = td_weighted_linear_cross_entropy(
        hidden, weight, batch.targets_nBS, weights, scales_n=batch.scales_n, counts_nB=counts
    )
    found.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert found.loss.dtype == found.losses_n.dtype == torch.float32
    return found, (found.loss.detach(), found.losses_n, hidden.grad.flatten(0, 2), weight.grad)


def of_heads(result: Result, case: Case, heads: int) -> Result:
    """``Σ w·CE`` of each head instead of the losses of rows."""
    loss, losses, *gradients = result
    weighted = torch.where(case.targets == IGNORED, 0.0, case.weights.double() * losses.double())
    return loss, weighted.view(heads, -1).sum(-1), *gradients


def assert_right(batch: Batch, found: Result, weights_BS: Tensor, slack: float) -> None:
    heads = len(batch.targets_nBS)
    case = batch.flat(spread_over_heads(weights_BS, batch.targets_nBS))
    assert_as_exact_as_plain(found, of_heads(plain(case), case, heads), of_heads(exact(case), case, heads), slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
@pytest.mark.parametrize("counted", [False, True])
def test_as_exact_as_plain_torch(arm, chunk_of, dtype, td_lambda, counted):
    batch = make_batch(arm, dtype)
    advantages, weights = weights_of(batch, td_lambda)
    assert {LOW, HIGH, 0.0} <= set(weights.flatten().tolist())
    chunk_of(arm.size(10, 8192))
    found, result = measured(batch, batch.td(td_lambda=td_lambda), batch.counts() if counted else None)
    assert_right(batch, result, weights, arm.slack(dtype))
    assert relative_largest(found.weights_BS.cpu(), weights) < 1e-5
    assert found.td_BS is not None
    assert relative_largest(found.td_BS.cpu(), advantages) < 1e-5
    assert not any(x.requires_grad for x in (found.losses_n, found.weights_BS, found.td_BS))


def test_by_blocks(arm, by_blocks):
    batch = make_batch(arm, torch.bfloat16)
    _, result = measured(batch, batch.td())
    assert_right(batch, result, weights_of(batch)[1], arm.slack(torch.bfloat16))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_standardised_weights(arm, on_device, td_lambda):
    batch, constants = make_batch(arm, torch.float32), (0.12, 0.45, -0.2)
    given = constants
    if on_device:  # sums over the global batch are float64, and stay where they were made
        given = tuple(torch.tensor(x, dtype=torch.float64, device=arm.device) for x in constants)
    found, result = measured(batch, batch.td(td_lambda=td_lambda, standardisation=Standardisation(*given)))
    weights = weights_of(batch, td_lambda, constants)[1]
    assert_right(batch, result, weights, 0.0)
    assert relative_largest(found.weights_BS.cpu(), weights) < 1e-5


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ready_weights(arm, counted, dtype):
    batch = make_batch(arm, dtype)
    ready = 5 * torch.rand(batch.places.values.shape, generator=arm.generator(9), device=arm.device)
    found, result = measured(batch, ready.requires_grad_(), batch.counts() if counted else None)
    assert_right(batch, result, ready.detach(), arm.slack(dtype))
    assert found.td_BS is None
    assert found.statistics.td is None
    assert torch.equal(found.weights_BS, ready)
    assert ready.grad is None


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_statistics_are_those_of_the_decisions(arm, td_lambda):
    batch = make_batch(arm, torch.float32)
    found, _ = measured(batch, batch.td(td_lambda=td_lambda))
    expected = decision_statistics(found.weights_BS, batch.places.decisions, found.td_BS)
    for a, b in zip(found.statistics, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert found.statistics.weights[0] == batch.places.decisions.sum() > 0


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_the_same_without_gradient(arm, td_lambda):
    """Validation asks for no gradient and takes another way through the kernels."""
    batch = make_batch(arm, torch.float32)
    learned, _ = measured(batch, batch.td(td_lambda=td_lambda))
    arguments = batch[0].requires_grad_(), *batch[1:3], batch.td(td_lambda=td_lambda)
    with torch.no_grad():
        silent = td_weighted_linear_cross_entropy(*arguments, scales_n=batch.scales_n)
    assert not silent.loss.requires_grad
    for name in ("loss", "losses_n", "weights_BS", "td_BS"):
        torch.testing.assert_close(getattr(silent, name), getattr(learned, name), rtol=1e-5, atol=1e-6)


def test_counts_that_are_too_large_take_ignored_rows_along(arm):
    batch = make_batch(arm, torch.float32)
    exactly, result = measured(batch, batch.td(), batch.counts())
    found, more = measured(batch, batch.td(), batch.counts() + 1)
    for a, b in zip(more, result, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.weights_BS, exactly.weights_BS)


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
@pytest.mark.parametrize("counted", [False, True])
def test_what_stands_beside_decisions_counts_for_nothing(arm, td_lambda, counted):
    batch = make_batch(arm, torch.bfloat16)
    hidden, values = batch.hidden_nBSD.clone(), batch.places.values.clone()
    hidden[batch.targets_nBS == IGNORED] = math.nan
    read = batch.places.decisions | torch.nn.functional.pad(batch.places.decisions, (1, 0))[:, :-1]
    values[~read] = math.nan
    spoilt = batch._replace(hidden_nBSD=hidden, places=batch.places._replace(values=values))
    counts = batch.counts() if counted else None
    expected, result = measured(batch, batch.td(td_lambda=td_lambda), counts)
    found, again = measured(spoilt, spoilt.td(td_lambda=td_lambda), counts)
    for a, b in zip(again, result, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.weights_BS, expected.weights_BS)


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_a_value_head_gone_wrong_is_seen(arm, td_lambda):
    batch = make_batch(arm, torch.float32)
    b, i = batch.places.decisions.nonzero()[1].tolist()
    values = batch.places.values.clone()
    values[b, i] = math.nan
    spoilt = batch._replace(places=batch.places._replace(values=values))
    found, (loss, *_) = measured(spoilt, spoilt.td(td_lambda=td_lambda))
    assert loss.isnan()
    assert found.weights_BS[b, i].isnan()
    assert found.losses_n.isnan().any()
    assert found.statistics.weights[1:].isnan().all()


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_decisions_without_a_target_are_none(arm, td_lambda):
    """Whether the weights are made in the row kernel or before it: where head 1 has no target, nothing is decided."""
    batch = make_batch(arm, torch.float32)
    b, i = batch.places.decisions.nonzero()[0].tolist()
    targets = batch.targets_nBS.clone()
    targets[0, b, i] = IGNORED
    batch = batch._replace(targets_nBS=targets)
    decided = targets[0] != IGNORED
    learned, _ = measured(batch, batch.td(td_lambda=td_lambda))
    with torch.no_grad():
        silent = td_weighted_linear_cross_entropy(*batch[:3], batch.td(td_lambda=td_lambda))
    for found in (learned, silent):
        assert not found.weights_BS[~decided].any()
        assert not found.td_BS[~decided].any()
        assert found.weights_BS[decided].all()
        assert found.statistics.weights[0] == decided.sum()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_nothing_to_learn(arm, counted, td_lambda):
    batch = make_batch(arm, torch.bfloat16)
    nothing = batch.places._replace(decisions=torch.zeros_like(batch.places.decisions))
    batch = batch._replace(targets_nBS=torch.full_like(batch.targets_nBS, IGNORED), places=nothing)
    found, result = measured(batch, batch.td(td_lambda=td_lambda), batch.counts() if counted else None)
    assert not any(x.any() for x in (*result, found.weights_BS, found.td_BS))
    assert found.statistics.weights[0] == found.statistics.entropy[1] == 0


@pytest.mark.parametrize(
    "shape", [(3, 0, 5, 8, 11), (2, 2, 0, 8, 11), (1, 1, 1, 8, 2), (4, 1, 2, 8, 3), (1, 3, 5, 8, 20)]
)
@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_the_smallest_batches(arm, shape, td_lambda):
    """No sequence, no token, one token, more heads than tokens, one head."""
    heads, batch_size, length, *_ = shape
    batch = make_batch(arm, torch.float32, 3, shape)
    if min(shape[:3]):
        decisions = torch.ones(batch_size, length, dtype=torch.bool, device=arm.device)
        drawn = torch.zeros_like(batch.targets_nBS)
        batch = batch._replace(
            places=batch.places._replace(decisions=decisions), targets_nBS=targets_of(arm, decisions, heads, drawn)
        )
    for counts in (None, batch.counts()):
        found, result = measured(batch, batch.td(td_lambda=td_lambda), counts)
        assert found.weights_BS.shape == (batch_size, length)
        if min(shape[:3]):
            assert_right(batch, result, weights_of(batch, td_lambda)[1], 1e-6)
        else:
            assert not any(x.any() for x in result)


def test_inputs_of_any_layout(arm):
    """Tensors cut out of wider ones."""
    batch = make_batch(arm, torch.float32)
    expected = measured(batch, batch.td())[1]

    def wide(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    cut = Batch(*(wide(x) if isinstance(x, Tensor) else Decisions(*map(wide, x)) for x in batch))
    for a, b in zip(measured(cut, cut.td())[1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    one = batch._replace(**{name: getattr(batch, name)[:1] for name in ("hidden_nBSD", "targets_nBS", "scales_n")})
    one = one._replace(
        hidden_nBSD=one.hidden_nBSD[:, :1], targets_nBS=wide(one.targets_nBS[:, :1]),
        places=Decisions(*(x[:1] for x in one.places)),
    )  # fmt: skip
    flat = one._replace(targets_nBS=one.targets_nBS.contiguous())
    for a, b in zip(measured(one, one.td())[1], measured(flat, flat.td())[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_without_scales_every_scale_is_one(arm):
    batch = make_batch(arm, torch.float32)
    found = td_weighted_linear_cross_entropy(*batch[:3], batch.td())
    torch.testing.assert_close(found.loss, found.losses_n.sum())


def test_wrong_arguments_are_refused(arm):
    batch = make_batch(arm, torch.float32)
    hidden, weight, targets, places, scales = batch
    td = batch.td()

    def refused(*arguments: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            td_weighted_linear_cross_entropy(*arguments, **options)

    refused(hidden, weight, targets[:, :, 1:], td, match="targets")
    refused(hidden, weight, targets, places.values[:, 1:], match="weights")
    refused(hidden, weight[:, 1:], targets, td, match="unembedding")
    refused(hidden, weight, targets, td, scales_n=scales[1:], match=r"scales must have shape \[\d\]")
    refused(hidden, weight.double(), targets, td, match=r"float32, the unembedding is torch.float64")
    refused(hidden, weight.to("meta"), targets, td, match="unembedding must be on the hidden states' device")
    refused(hidden, weight, targets.to("meta"), td, match="targets must be on the hidden states' device")
    counts = batch.counts()
    refused(hidden, weight, targets, td, counts_nB=counts[:, 1:], match=r"counts must be \[\d, \d\] on the CPU")
    refused(
        hidden, weight, targets, td, counts_nB=counts.to("meta"), match=r"counts must be .* on the CPU, not .* meta"
    )
    with pytest.raises(ValueError, match="decisions must be bool"):
        TDWeights(places.values, places.rewards, places.decisions.float())
    with pytest.raises(ValueError, match=r"must be \[B, S\], \[B, S\] and \[B\]"):
        TDWeights(places.values, places.rewards[1:], places.decisions)
    for options in ({"beta": 0.0}, {"beta": math.nan}, {"min_weight": 2.0, "max_weight": 1.0}, {"min_weight": -1.0}):
        with pytest.raises(ValueError, match=r"beta|clip"):
            batch.td(**options)


def test_tensors_on_another_device_are_refused(arm):
    batch = make_batch(arm, torch.float32)
    places = batch.places
    for name in Decisions._fields:
        moved = places._replace(**{name: getattr(places, name).to("meta")})
        with pytest.raises(ValueError, match="must be on one device"):
            TDWeights(*moved)
    elsewhere = TDWeights(*(x.to("meta") for x in places))
    for weights in (elsewhere, places.values.to("meta")):
        with pytest.raises(ValueError, match="weights must be on the hidden states' device"):
            td_weighted_linear_cross_entropy(*batch[:3], weights)
    with pytest.raises(ValueError, match="scales must be on the targets' device"):
        td_weighted_linear_cross_entropy(*batch[:3], batch.td(), scales_n=batch.scales_n.to("meta"))
