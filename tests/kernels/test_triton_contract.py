"""What every loss promises besides numbers, on each arm: gradients once and on demand, clear errors, the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Arm, decide, peaked_layer, targets_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmtp_kernels import (
    TDWeights,
    decision_weights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    td_weighted_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

Loss = Callable[[Tensor, Tensor], Tensor]  # of hidden states [n, B, S, D] and unembedding

KINDS = ["weighted", "td", "gae", "ready", "topk", "two passes", "softmax"]

# The interpreter is slow, and what is promised here hardly depends on what computes.
CASES = [
    *(("torch", kind) for kind in KINDS),
    *(("interpreter", kind) for kind in ("td", "two passes")),
    *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in KINDS),
]
EACH = pytest.mark.parametrize(("arm", "kind"), CASES, indirect=["arm"])


class Problem:
    """One loss, as a function of hidden states and unembedding alone."""

    def __init__(self, arm: Arm, kind: str, dtype: torch.dtype = torch.float32, counted: bool = False):
        heads, batch, length, dim, vocabulary = arm.size((2, 2, 4, 16, 34), (4, 4, 512, 1024, 32_000))
        self.kind, self.arm = kind, arm
        hidden, self.weight_VD, drawn = peaked_layer(arm, (heads, batch, length), dim, vocabulary, dtype, kept=1.0)
        self.hidden_nBSD = hidden
        places = decide(arm, batch, length)
        self.targets_nBS = targets_of(arm, places.decisions, heads, drawn)
        self.td = TDWeights(*places, td_lambda=0.8 if kind == "gae" else 0.0)
        generator = arm.generator(1)
        self.reference_nBS = 5 * torch.rand(self.targets_nBS.shape, generator=generator, device=arm.device)
        self.ready_BS = torch.rand(places.values.shape, generator=generator, device=arm.device)
        self.scales_n = torch.full((heads,), 0.01, device=arm.device)
        self.counts = (self.targets_nBS != -100).sum(-1).cpu() if counted else None

    def leaves(self, hidden: bool = True, weight: bool = True) -> tuple[Tensor, Tensor]:
        found = self.hidden_nBSD.detach().clone(), self.weight_VD.detach().clone()
        return found[0].requires_grad_(hidden), found[1].requires_grad_(weight)

    def outputs(self, hidden: Tensor, weight: Tensor) -> tuple[Any, ...]:
        options = {"scales_n": self.scales_n, "counts_nB": self.counts}
        layer = hidden, weight, self.targets_nBS
        if self.kind == "weighted":
            weights = self.reference_nBS.flatten()
            count = None if self.counts is None else int(self.counts.sum())
            rows = hidden.flatten(0, 2), weight, self.targets_nBS.flatten()
            return weighted_linear_cross_entropy(*rows, weights, scales_N=weights / 7, count=count)
        if self.kind in ("td", "gae", "ready"):
            return td_weighted_linear_cross_entropy(
                *layer, self.ready_BS if self.kind == "ready" else self.td, **options
            )
        how = {"weighting": "softmax"} if self.kind == "softmax" else {"k_percent": 0.6}
        return rho1_linear_cross_entropy(*layer, self.reference_nBS, **how, **options)

    def loss(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self.outputs(hidden, weight)[0]

    def gradients(self, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
        leaves = self.leaves()
        (upstream * self.loss(*leaves)).backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is not None
        return leaves[0].grad, leaves[1].grad


@pytest.fixture
def problem(arm: Arm, kind: str, chunk_of: Callable[[int], None]) -> Problem:
    chunk_of(arm.size(7, 1024) if kind in ("two passes", "td") else 10**6)
    return Problem(arm, kind)


def assert_close(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@EACH
def test_gradients_only_of_what_asks_for_them(problem):
    expected = problem.gradients()
    for wants in ((True, False), (False, True)):
        leaves = problem.leaves(*wants)
        problem.loss(*leaves).backward()
        assert [x.grad is not None for x in leaves] == list(wants)
        place = wants.index(True)
        assert_close((leaves[place].grad,), (expected[place],))
    assert not problem.loss(*problem.leaves(False, False)).requires_grad


@EACH
def test_without_gradient_nothing_of_its_size_is_made(problem, monkeypatch):
    """The unembedding's gradient is the largest tensor of all."""
    shapes: list[torch.Size] = []
    for name in ("empty_like", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda x, make=make, **kw: (shapes.append(x.shape), make(x, **kw))[1])
    with torch.no_grad():
        silent = problem.loss(*problem.leaves())
    assert not silent.requires_grad
    big = problem.weight_VD.shape, problem.hidden_nBSD.flatten(0, 2).shape
    assert not set(big) & set(shapes)
    loss = problem.loss(*problem.leaves())
    assert set(big) <= set(shapes)  # the watch sees them where there are any
    torch.testing.assert_close(silent, loss.detach(), rtol=1e-5, atol=1e-7)


@EACH
def test_a_second_backward_says_what_to_do(problem):
    loss = problem.loss(*problem.leaves())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward was called twice .* Run forward again"):
        loss.backward()


@EACH
def test_gradients_one_after_the_other_are_refused(problem):
    """``retain_graph`` keeps nothing: one backward gives all gradients away, asked for or not."""
    hidden, weight = problem.leaves()
    loss = problem.loss(hidden, weight)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        torch.autograd.grad(loss, weight)


@EACH
def test_gradients_of_gradients_are_refused(problem):
    hidden, weight = problem.leaves()
    upstream = torch.ones((), requires_grad=True, device=hidden.device)
    (grad,) = torch.autograd.grad(problem.loss(hidden, weight), hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EACH
def test_two_forwards_and_then_two_backwards_accumulate(problem):
    """Gradients belong to the forward that formed them: neither shares a buffer with the other."""
    expected = problem.gradients()
    hidden, weight = problem.leaves()
    first, second = problem.loss(hidden, weight), problem.loss(2 * hidden, weight)
    alone = problem.leaves()
    problem.loss(2 * alone[0], alone[1]).backward()
    second.backward()
    assert_close((hidden.grad, weight.grad), (alone[0].grad, alone[1].grad))
    first.backward()
    assert_close(
        (hidden.grad, weight.grad),
        tuple(a.grad + b for a, b in zip(alone, expected, strict=True)),
    )


@EACH
def test_gradients_scale_with_that_of_the_loss(problem):
    expected = problem.gradients()
    for upstream in (-0.37, 65536.0, 0.0):
        scaled = problem.gradients(upstream)
        assert_close(tuple(x / (upstream or 1.0) for x in scaled), tuple(x if upstream else 0 * x for x in expected))


@EACH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(problem, reentrant):
    """Forward runs again in backward, and its gradients are those of one run."""

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return problem.loss(hidden.tanh() * 2, weight)

    plain = problem.leaves()
    run(*plain).backward()
    leaves = problem.leaves()
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    assert_close(tuple(x.grad for x in leaves), tuple(x.grad for x in plain))


@EACH
def test_two_runs_give_the_same_bits(problem):
    """No atomics, no order of summation that could differ."""
    torch.use_deterministic_algorithms(False)
    for counted in (False, True):
        again = Problem(problem.arm, problem.kind, torch.bfloat16, counted)
        runs = []
        for _ in range(2):
            leaves = again.leaves()
            loss, *more = again.outputs(*leaves)
            loss.backward()
            more = [x for x in more if isinstance(x, Tensor)]
            runs.append([loss.detach(), *more, *(x.grad for x in leaves)])
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


@EACH
def test_inputs_are_left_as_they_are(problem):
    before = [x.clone() for x in vars(problem).values() if isinstance(x, Tensor)]
    problem.gradients()
    after = [x for x in vars(problem).values() if isinstance(x, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@EACH
@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_an_unembedding_that_is_not_gathered_is_a_clear_error(problem, shape):
    """ZeRO-3 leaves an empty tensor in place of a parameter that is not gathered."""
    empty = torch.zeros(shape, device=problem.arm.device)
    with pytest.raises(RuntimeError, match=r"no elements: under ZeRO-3 it is gathered only inside"):
        problem.loss(problem.leaves()[0], empty)


@EACH
def test_a_dtype_or_device_that_does_not_fit_is_refused(problem):
    hidden, weight = problem.leaves()
    with pytest.raises(ValueError, match=r"hidden states are torch\.float32, the unembedding is torch\.bfloat16"):
        problem.loss(hidden, weight.detach().bfloat16())
    with pytest.raises(ValueError, match=r"unembedding must be on the hidden states' device, \w+(:0)?, not meta"):
        problem.loss(hidden, weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"and unembedding \[\d+, \d+\] must be \[N, D\] and \[V, D\]"):
        problem.loss(hidden, weight.detach()[:, 1:])


def test_reference_refuses_what_does_not_fit(arm):
    problem = Problem(arm, "weighted")
    rows, weight, targets = problem.hidden_nBSD.flatten(0, 2), problem.weight_VD, problem.targets_nBS.flatten()
    for arguments, match in (
        ((rows, weight.double(), targets), "the unembedding is torch.float64"),
        ((rows, weight, targets.to("meta")), "targets must be on the hidden states' device"),
        ((rows, weight, targets[1:]), "targets must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            reference_cross_entropy(*arguments)
    with pytest.raises(RuntimeError, match="no elements"):
        reference_cross_entropy(rows, weight[:0], targets)


def test_weights_take_no_gradient(arm):
    problem = Problem(arm, "td")
    values = problem.td.values_BS.clone().requires_grad_()
    td = TDWeights(values, problem.td.rewards_B, problem.td.decisions_BS)
    td_weighted_linear_cross_entropy(*problem.leaves(), problem.targets_nBS, td).loss.backward()
    assert values.grad is None
    assert not any(x.requires_grad for x in (*decision_weights(td), td.advantages()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH
def test_autocast_changes_nothing(problem, dtype):
    """The products' dtypes are those of the inputs, whatever surrounds the loss."""
    expected = problem.loss(*problem.leaves()), *problem.gradients()
    leaves = problem.leaves()
    with torch.autocast(problem.arm.device.type, dtype=dtype):
        loss = problem.loss(*leaves)
        silent = problem.loss(*problem.leaves(False, False))
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert_close((silent,), (expected[0].detach(),))
    assert_close(tuple(x.grad for x in leaves), expected[1:])
