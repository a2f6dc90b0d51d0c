"""The chunked, weighted cross-entropy against logits that are all in memory, in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp_kernels import IGNORE_INDEX, reference_cross_entropy, rows_torch, weighted_linear_cross_entropy
from wmtp_kernels.chunked_linear import ChunkedLinear

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_case(rows: int, dim: int, vocabulary: int, seed: int = 0, peak: float = 1.0, kept: float = 0.8) -> Case:
    """Hidden states, unembedding, targets, weights and scales in float64; ``peak`` sharpens the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * peak
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) > kept] = IGNORE_INDEX
    weights = 0.1 + 4.9 * torch.rand(rows, generator=generator, dtype=torch.float64)
    scales = torch.rand(rows, generator=generator, dtype=torch.float64) / rows
    return hidden, weight, targets, weights, scales


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``logsumexp(z) − z[y]`` of each row, 0 where ignored."""
    at_target = logits[torch.arange(len(targets)), targets.clamp(min=0)]
    return torch.where(targets == IGNORE_INDEX, 0.0, logits.logsumexp(-1) - at_target)


def oracle(case: Case, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses of rows, and both gradients of ``upstream`` times the loss, from materialised float64 logits."""
    hidden, weight, targets, weights, scales = (x.detach().double() if x.is_floating_point() else x for x in case)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = cross_entropy(hidden @ weight.T, targets)
    loss = (scales * weights * losses).sum()
    grads = torch.autograd.grad(upstream * loss, (hidden, weight))
    return loss.detach(), losses.detach(), *grads


def measured(case: Case, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets, weights, scales = case
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, losses = weighted_linear_cross_entropy(hidden, weight, targets, weights, scales_N=scales)
    (upstream * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), losses, hidden.grad, weight.grad


def plain(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one would write without a kernel, in the dtype of the case."""
    hidden, weight, targets, weights, scales = case
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    loss = (scales.float() * weights.float() * losses).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), losses.detach(), *grads


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def chunk_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of rows that a chunk holds."""
    return lambda rows: monkeypatch.setattr(rows_torch, "chunk_rows", lambda *_: rows)


def test_by_hand():
    """Two classes, one feature: softmax of (0, log 3) is (1/4, 3/4)."""
    hidden = torch.tensor([[1.0], [1.0], [5.0]], dtype=torch.float64, requires_grad=True)
    log3 = torch.tensor(3.0, dtype=torch.float64).log()
    weight = torch.stack([0 * log3, log3])[:, None].requires_grad_()
    targets, weights = torch.tensor([1, 0, -100]), torch.tensor([2.0, 0.5, 9.0])
    loss, losses = weighted_linear_cross_entropy(
        hidden, weight, targets, weights, scales_N=torch.tensor([1.0, 4.0, 1.0])
    )
    loss.backward()
    torch.testing.assert_close(losses, torch.tensor([4 / 3, 4, 1], dtype=torch.float64).log())
    assert loss.item() == pytest.approx(2 * torch.tensor(4 / 3).log().item() + 2 * torch.tensor(4.0).log().item())
    # w·s·(p − y): (2·1/4, −2·1/4) and (−2·3/4, 2·3/4); over h = 1 they add up.
    torch.testing.assert_close(weight.grad, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    expected = torch.tensor([[-0.5], [1.5], [0.0]], dtype=torch.float64) * log3
    torch.testing.assert_close(hidden.grad, expected)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    dim=st.integers(1, 9),
    vocabulary=st.integers(1, 30),
    chunk=st.sampled_from([1, 3, 7, 1000]),
    seed=st.integers(0, 2**31),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    upstream=st.sampled_from([1.0, -0.5, 65536.0]),
)
def test_matches_materialised_logits(rows, dim, vocabulary, chunk, seed, kept, upstream):
    case = make_case(rows, dim, vocabulary, seed, kept=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_torch, "chunk_rows", lambda *_: chunk)
        found = measured(case, upstream)
        reference = reference_cross_entropy(*case[:3])
    expected = oracle(case, upstream)
    assert_same(found[:2], expected[:2])
    assert_same(tuple(g / upstream for g in found[2:]), tuple(g / upstream for g in expected[2:]))
    assert_same((reference,), (expected[1],))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_ragged_chunks_give_the_same(chunk, chunk_of):
    case = make_case(23, 6, 50)
    whole = measured(case)
    chunk_of(chunk)
    assert_same(measured(case), whole, 1e-12)


def test_chunks_grow_linearly_with_the_rows(chunk_of, monkeypatch):
    sizes: list[int] = []
    logits = ChunkedLinear.logits
    monkeypatch.setattr(ChunkedLinear, "logits", lambda self, rows: (sizes.append(len(rows)), logits(self, rows))[1])
    chunk_of(7)
    hidden, weight, _, weights, scales = make_case(23, 6, 50)
    targets = torch.arange(23) % 50
    targets[::8] = IGNORE_INDEX  # rows that are ignored cost nothing
    measured((hidden, weight, targets, weights, scales))
    assert sizes == [7, 7, 6]


def test_a_chunk_is_bounded_whatever_the_vocabulary():
    for vocabulary in (2, 32_000, 128_256, 10**9):
        for device in ("cpu", "cuda"):
            rows = rows_torch.chunk_rows(vocabulary, torch.float32, torch.device(device))
            assert rows >= 16
            assert rows * vocabulary <= max(2**24 if device == "cpu" else 2**27, 16 * vocabulary)


def test_peaked_logits():
    """Logits of thousands neither overflow nor lose the loss of a confident mistake."""
    case = make_case(30, 8, 40, peak=1000.0)
    found, expected = measured(case), oracle(case)
    assert expected[1].max() > 1000
    assert_same(found, expected)
    single = tuple(x.float() if x.is_floating_point() else x for x in case)
    assert all(error(a, b) < 1e-4 for a, b in zip(measured(single), expected, strict=True))


def test_two_classes_and_one():
    assert_same(measured(make_case(11, 3, 2)), oracle(make_case(11, 3, 2)))
    loss, losses, *grads = measured(make_case(11, 3, 1))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in (losses, *grads))


def test_everything_ignored():
    hidden, weight, targets, weights, scales = make_case(9, 4, 7)
    loss, losses, *grads = measured((hidden, weight, torch.full_like(targets, -100), weights, scales))
    assert loss == 0
    assert not any(x.any() for x in (losses, *grads))


def test_without_rows():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        hidden, weight = torch.zeros(0, 4, dtype=dtype, requires_grad=True), torch.ones(7, 4, dtype=dtype)
        weight.requires_grad_()
        nothing = torch.zeros(0, dtype=torch.int64)
        loss, losses = weighted_linear_cross_entropy(hidden, weight, nothing, torch.zeros(0), scales_N=torch.zeros(0))
        loss.backward()
        assert loss == 0
        assert losses.shape == (0,)
        assert weight.grad is not None
        assert not weight.grad.any()
        assert reference_cross_entropy(hidden, weight, nothing).shape == (0,)


def test_without_scales_every_scale_is_one():
    case = make_case(12, 5, 9)
    loss, _ = weighted_linear_cross_entropy(*case[:4])
    expected = oracle((*case[:4], torch.ones(12, dtype=torch.float64)))
    torch.testing.assert_close(loss, expected[0])


def test_weights_and_scales_of_zero():
    hidden, weight, targets, weights, scales = make_case(20, 5, 9, kept=1.0)
    weights, scales = weights.clone(), scales.clone()
    weights[::2] = 0
    scales[::3] = 0
    case = (hidden, weight, targets, weights, scales)
    found = measured(case)
    assert_same(found, oracle(case))
    assert (found[1] > 0).all()  # their losses are still told
    assert not found[2][::2].any()
    assert not found[2][::3].any()
    silent = measured((hidden, weight, targets, weights, torch.zeros_like(scales)))
    assert silent[0] == 0
    assert not silent[3].any()


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_what_stands_at_ignored_rows_counts_for_nothing(rubbish):
    case = make_case(12, 5, 9, kept=0.5)
    hidden, weight, targets, weights, scales = (x.clone() for x in case)
    ignored = targets == IGNORE_INDEX
    hidden[ignored], weights[ignored], scales[ignored] = rubbish, rubbish, rubbish
    found = measured((hidden, weight, targets, weights, scales))
    assert_same(found, measured(case))
    assert_same((reference_cross_entropy(hidden, weight, targets),), (found[1],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [0.3, 3.0])
def test_rounding_is_at_most_twice_that_of_plain_torch(dtype, peak):
    case = make_case(600, 64, 500, peak=peak / 8)
    low = (case[0].to(dtype), case[1].to(dtype), case[2], case[3].float(), case[4].float())
    exact = oracle(low)
    for found, ours, naive in zip(exact, measured(low), plain(low), strict=True):
        assert error(ours, found) <= 2 * error(naive, found) + 1e-4
    loss, losses, grad_hidden, grad_weight = measured(low)
    assert loss.dtype == losses.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == dtype


def test_float16_gradients_do_not_underflow_under_a_loss_scale():
    """``1/(n·M)`` of a large batch times a gradient is below float16's smallest number; the loss scale saves it."""
    case = make_case(300, 32, 100, peak=0.1)
    hidden, weight, targets, weights, _ = case
    scales = torch.full((300,), 1 / (4 * 500_000), dtype=torch.float32)
    low = (hidden.half(), weight.half(), targets, weights.float(), scales)
    exact = oracle(low, 65536.0)
    _, _, grad_hidden, grad_weight = measured(low, 65536.0)
    assert grad_hidden.dtype == grad_weight.dtype == torch.float16
    assert error(grad_hidden, exact[2]) < 2e-3
    assert error(grad_weight, exact[3]) < 2e-3


def test_the_weight_gradient_of_many_bfloat16_chunks_is_summed_in_float32(chunk_of):
    case = make_case(2048, 32, 64, peak=0.2, kept=1.0)
    low = (case[0].bfloat16(), case[1].bfloat16(), case[2], case[3].float(), case[4].float())
    exact = oracle(low)[3]
    chunk_of(2048)
    single = error(measured(low)[3], exact)
    chunk_of(16)
    assert error(measured(low)[3], exact) <= 1.1 * single
    assert single <= 1.1 * error(plain(low)[3], exact)


def test_a_scale_common_to_all_rows_rounds_nothing():
    """Equal rows of bfloat16: a rounding of the scale would shift every gradient the same way."""
    hidden, weight, targets, _, _ = make_case(400, 32, 60, peak=0.2, kept=1.0)
    low = (hidden.bfloat16(), weight.bfloat16(), targets, torch.ones(400), torch.full((400,), 1 / 389.0))
    _, _, exact_hidden, exact_weight = oracle(low)
    _, _, grad_hidden, grad_weight = measured(low)
    for found, exact in ((grad_hidden, exact_hidden), (grad_weight, exact_weight)):
        shrinkage = ((found.double() * exact).sum() / (exact * exact).sum()).item() - 1
        assert abs(shrinkage) < 3e-4  # 1/389 itself is 9e-4 away from the nearest bfloat16
