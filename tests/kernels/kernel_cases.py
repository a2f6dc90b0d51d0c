"""Cases and oracles of the kernels' tests: definitions in float64, written without the code under test."""

import importlib
import itertools
import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

IGNORED = -100

# For tests of what torch has no part in; without it, a test that asks for an arm runs with torch, too.
TRITON_ALONE = pytest.mark.parametrize(
    "arm", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


class Arm(NamedTuple):
    """What computes in a test: torch, Triton's interpreter, or Triton on a GPU."""

    backend: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device.type == "cpu"

    @property
    def rows(self) -> ModuleType:
        """The module that turns logits into losses and gradients."""
        return importlib.import_module(f"wmtp_kernels.rows_{self.backend}")

    def size(self, tiny: Any, real: Any) -> Any:
        """What a CPU can do in no time, or what is trained with."""
        return real if self.device.type == "cuda" else tiny

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def stores_within(self, dtype: torch.dtype) -> float:
        """Units in the last place between a number and what is stored: Triton's interpreter truncates bfloat16."""
        return 1.0 if self.interpreted and dtype == torch.bfloat16 else 0.5

    def slack(self, dtype: torch.dtype) -> float:
        """What that adds to the relative error of whatever is made of stored gradients: a unit in the last place."""
        return 2.0**-7 if self.interpreted and dtype == torch.bfloat16 else 0.0


class Case(NamedTuple):
    """Rows of a linear layer: 16-bit or float32 factors, float32 weights and scales."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor
    scales: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().clone().requires_grad_(), self.weight.detach().clone().requires_grad_()


Result = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, losses of rows, gradients of hidden states and unembedding


def _blocks(rows: int) -> list[slice]:
    return [slice(start, start + 2048) for start in range(0, rows, 2048)]


def peaked_layer(
    arm: Arm, shape: Sequence[int], dim: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, kept: float = 0.8
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[*shape, D]``, unembedding, and targets drawn from the model: cross-entropy is 2 to 3."""
    generator = arm.generator(seed)
    rows = math.prod(shape)
    # Logits of variance s² have entropy log V − s²/2.
    spread = math.sqrt(2 * max(math.log(vocabulary) - 2.5, 0.5))
    hidden = torch.randn(rows, dim, generator=generator, device=arm.device)
    hidden = torch.nn.functional.normalize(hidden) * spread  # as after a final norm
    weight = torch.randn(vocabulary, dim, generator=generator, device=arm.device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.empty(rows, dtype=torch.int64, device=arm.device)
    for block in _blocks(rows):
        logits = hidden[block].float() @ weight.float().T
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        targets[block] = (logits + noise).argmax(-1)
    targets[torch.rand(rows, generator=generator, device=arm.device) > kept] = IGNORED
    return hidden.view(*shape, dim), weight, targets.view(*shape)


def peaked(
    arm: Arm, rows: int, dim: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, kept: float = 0.8
) -> Case:
    hidden, weight, targets = peaked_layer(arm, (rows,), dim, vocabulary, dtype, seed, kept)
    generator = arm.generator(seed + 1)
    weights = 0.1 + 4.9 * torch.rand(rows, generator=generator, device=arm.device)
    scales = (0.5 + torch.rand(rows, generator=generator, device=arm.device)) / max(rows, 1)
    return Case(hidden, weight, targets, weights, scales)


def exact(case: Case, upstream: float = 1.0) -> Result:
    """The definition by autograd through logits that are all there, in float64; a block of rows at a time."""
    hidden, weight = (x.detach().double().requires_grad_() for x in case[:2])
    factors = torch.where(case.targets == IGNORED, 0.0, case.weights.double() * case.scales.double())
    losses = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    for block in _blocks(len(hidden)):
        logits = hidden[block] @ weight.T
        at_target = logits.gather(-1, case.targets[block].clamp(min=0)[:, None]).squeeze(-1)
        losses_R = torch.where(case.targets[block] == IGNORED, 0.0, logits.logsumexp(-1) - at_target)
        (upstream * (factors[block] * losses_R).sum()).backward()
        losses[block] = losses_R.detach()
    return (factors * losses).sum(), losses, hidden.grad, weight.grad


def plain(case: Case) -> Result:
    """What one would write without a kernel, in the dtype of the case."""
    hidden, weight = case.leaves()
    losses = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), case.targets, reduction="none")
    loss = (case.scales * case.weights * losses).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), losses.detach(), hidden.grad, weight.grad


def relative_norm(found: Tensor, expected: Tensor) -> float:
    """``‖found − expected‖ / ‖expected‖``; NaN if anything found is NaN."""
    distance = (found.double() - expected.double()).norm()
    return (distance / expected.double().norm().clamp(min=1e-30)).item()


def relative_largest(found: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest number expected."""
    if not expected.numel():
        return 0.0
    distance = (found.double() - expected.double()).abs().max()
    return (distance / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_as_exact_as_plain(
    found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], slack: float
) -> None:
    """At most twice the error of plain torch in the same dtype, plus 1e-4 (and ``slack``, for gradients).

    No single number is further off, either; where plain torch happens to be exact, by a unit in the last place.
    """
    for place, (ours, naive, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.shape == truth.shape
        more = slack if place >= 2 else 0.0
        for error, unit in ((relative_norm, 0.0), (relative_largest, torch.finfo(ours.dtype).eps)):
            bound = 2 * error(naive, truth) + 1e-4 + more + unit
            assert error(ours, truth) <= bound, (place, error.__name__, error(ours, truth), bound)


def unit_in_the_last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype around ``x``, float64."""
    info = torch.finfo(dtype)
    exponents = torch.frexp(x.double().abs().clamp(min=info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponents - 1)


# --- Temporal differences: loops over tokens ---

Lists = list[list[float]]


def advantages_loop(values: Lists, rewards: list[float], decisions: Lists, gamma: float, td_lambda: float) -> Tensor:
    """δ, or ``Σ_l (γλ)^l δ_{i+l}``, of each decision; 0 elsewhere."""
    found = []
    for v, reward, decided in zip(values, rewards, decisions, strict=True):
        last = max((i for i, d in enumerate(decided) if d), default=-1)
        row, following = [0.0] * len(v), 0.0
        for i in reversed(range(len(v))):
            delta = ((reward if i == last else gamma * v[i + 1]) - v[i]) if decided[i] else 0.0
            following = delta + (gamma * td_lambda * following if td_lambda else 0.0)
            row[i] = following if decided[i] else 0.0
        found.append(row)
    return torch.tensor(found, dtype=torch.float64).view(len(values), -1)


def weights_loop(
    advantages: Tensor, decisions: Lists, beta: float, low: float, high: float, constants: Sequence[float] = (0, 1, 0)
) -> Tensor:
    """``clip(exp((δ − shift)/(scale·β) − log_mean), low, high)`` of each decision; 0 elsewhere."""
    shift, scale, log_mean = constants
    found = torch.zeros_like(advantages)
    for b, row in enumerate(advantages.tolist()):
        for i, delta in enumerate(row):
            if decisions[b][i]:
                exponent = (delta - shift) / (scale * beta) - log_mean
                found[b, i] = min(max(math.exp(min(exponent, 700.0)), low), high)
    return found


def spread_over_heads(weights: Tensor, targets: Tensor) -> Tensor:
    """The target of head ``k`` (from 0) at ``i`` weighs what decision ``i + k`` weighs; 0 where there is no target."""
    heads, batch, length = targets.shape
    rows, known = weights.tolist(), targets.tolist()
    found = torch.zeros(heads, batch, length, dtype=torch.float64)
    for k, b in itertools.product(range(heads), range(batch)):
        found[k, b] = torch.tensor(
            [
                rows[b][i + k] if i + k < length and known[k][b][i] != IGNORED else 0.0
                for i in range(length)
            ]
        )  # fmt: skip
    return found


class Decisions(NamedTuple):
    """Sequences that decide: values, rewards, and where."""

    values: Tensor
    rewards: Tensor
    decisions: Tensor

    def loops(self) -> tuple[Lists, list[float], Lists]:
        return self.values.double().tolist(), self.rewards.double().tolist(), self.decisions.tolist()


def decide(arm: Arm, batch: int, length: int, seed: int = 0) -> Decisions:
    """A prompt, a solution and padding in each sequence, with gaps in some; the last sequence has no decision."""
    generator = arm.generator(seed)
    values = torch.rand(batch, length, generator=generator, device=arm.device)
    rewards = torch.rand(batch, generator=generator, device=arm.device).round()
    positions = torch.arange(length, device=arm.device)
    begin, end = (torch.rand(2, batch, 1, generator=generator, device=arm.device) * (length // 8)).floor()
    end = end // 3 * 3 + torch.arange(batch, device=arm.device)[:, None] % 3  # neighbours end at different places
    decisions = (positions >= begin + 1) & (positions < length - 1 - end)
    decisions[::3] &= torch.rand(decisions[::3].shape, generator=generator, device=arm.device) < 0.8
    decisions[batch - 1 :] = False if batch > 1 else decisions[batch - 1 :]
    return Decisions(values, rewards, decisions)


def targets_of(arm: Arm, decisions: Tensor, heads: int, drawn: Tensor) -> Tensor:
    """``[n, B, S]``: head ``k`` (from 0) at ``i`` has a target if ``i + k`` is a decision; others become ignored."""
    length = decisions.shape[1]
    targets = torch.full_like(drawn, IGNORED)
    for k in range(min(heads, length)):
        kept = decisions[:, k:]
        targets[k, :, : length - k] = torch.where(kept, drawn[k, :, : length - k], IGNORED)
    return targets


# --- Rho-1: sorting ---


def selection(ce: Tensor, reference: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    """Rho-1's weights ``[n, B, S]``, given the cross-entropies: sorted in Python."""
    # Differences are rounded to the dtype of the losses, so that what ties in a kernel ties here.
    excess = options.get("excess", "signed")
    scores_nBS = reference if excess == "reference" else ce - reference
    if excess == "absolute":
        scores_nBS = scores_nBS.abs()
    known, scores = targets.tolist(), scores_nBS.double().tolist()
    heads, batch, length = targets.shape
    weights = torch.zeros(targets.shape, dtype=torch.float64)
    if options.get("weighting", "topk") == "softmax":
        for b, i in itertools.product(range(batch), range(length)):
            valid = [k for k in range(heads) if known[k][b][i] != IGNORED]
            if valid:
                top = max(scores[k][b][i] for k in valid)
                powers = [math.exp((scores[k][b][i] - top) / options["temperature"]) for k in valid]
                for k, power in zip(valid, powers, strict=True):
                    weights[k, b, i] = len(valid) * power / sum(powers)
        return weights
    sequences = [[b] for b in range(batch)] if options.get("scope") == "sequence" else [list(range(batch))]
    for k, group in itertools.product(range(heads), sequences):
        members = [(b, i) for b in group for i in range(length) if known[k][b][i] != IGNORED]
        share = Decimal(repr(options.get("k_percent", 1.0)))
        kept = int((share * len(members)).to_integral_value(ROUND_CEILING))
        for b, i in sorted(members, key=lambda p: (-scores[k][p[0]][p[1]], p))[:kept]:
            weights[k, b, i] = 1.0
    return weights
