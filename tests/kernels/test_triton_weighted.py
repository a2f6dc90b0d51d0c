"""The weighted cross-entropy on each arm, at sizes of training on a GPU, against float64 and plain torch."""

import math

import pytest
import torch
from kernel_cases import (
    IGNORED,
    TRITON_ALONE,
    Arm,
    Case,
    Result,
    assert_as_exact_as_plain,
    exact,
    peaked,
    plain,
    relative_largest,
    relative_norm,
)

from wmtp_kernels import reference_cross_entropy, weighted_linear_cross_entropy
from wmtp_kernels.chunked_linear import _common_power

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and infinities are asked for


def measured(case: Case, upstream: float = 1.0, count: int | None = None) -> Result:
    hidden, weight = case.leaves()
    loss, losses = weighted_linear_cross_entropy(
        hidden, weight, case.targets, case.weights, scales_N=case.scales, count=count
    )
    (upstream * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == case.hidden.dtype
    assert loss.dtype == losses.dtype == torch.promote_types(case.hidden.dtype, torch.float32)
    return loss.detach(), losses, hidden.grad, weight.grad


def training_case(arm: Arm, dtype: torch.dtype, seed: int = 0) -> Case:
    """4 heads of 8192 positions, D 4096, V 32000 on a GPU."""
    return peaked(arm, *arm.size((21, 24, 67), (4 * 8192, 4096, 32_000)), dtype, seed)


def test_the_cases_are_peaked(arm):
    """Cross-entropy of 2 to 3, as a trained model has."""
    case = peaked(arm, *arm.size((800, 24, 67), (4 * 8192, 4096, 32_000)), torch.float32)
    assert 2 < exact(case)[1][case.targets != IGNORED].mean() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_plain_torch(arm, row_layout, dtype):
    case = training_case(arm, dtype)
    assert_as_exact_as_plain(measured(case), plain(case), exact(case), arm.slack(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", ["exact", "too large", "all"])
def test_ignored_rows_are_left_out_where_their_number_is_known(arm, chunk_of, dtype, count):
    """A number that is too large takes some of them along, and they count for nothing."""
    case = training_case(arm, dtype, seed=1)
    known = int((case.targets != IGNORED).sum())
    chunk_of(arm.size(8, 8192))
    counts = {"exact": known, "too large": known + 3, "all": len(case.targets)}
    found = measured(case, count=counts[count])
    assert_as_exact_as_plain(found, plain(case), exact(case), arm.slack(dtype))
    ignored = case.targets == IGNORED
    assert not found[1][ignored].any()
    assert not found[2][ignored].any()


def test_float64_is_torchs(arm, chunk_of):
    """The kernels compute in float32; what is asked for in float64 is given in float64."""
    case = peaked(arm, *arm.size((31, 24, 67), (4096, 512, 32_000)), torch.float64)
    chunk_of(1)  # of the kernels' rows, which have no part in it
    for found, truth in zip(measured(case), exact(case), strict=True):
        assert relative_largest(found, truth) < 1e-12
    losses = reference_cross_entropy(case.hidden, case.weight, case.targets)
    assert relative_largest(losses, exact(case)[1]) < 1e-12


@pytest.mark.parametrize("chunks", [3, 16])
def test_the_weight_gradient_of_many_chunks_is_that_of_one_product(arm, chunk_of, chunks):
    """At most 1.1 times the error of a single product of bfloat16 factors, however many there are."""
    rows, dim, vocabulary = arm.size((48, 24, 40), (4 * 8192, 4096, 32_000))
    case = peaked(arm, rows, dim, vocabulary, torch.bfloat16, kept=1.0)
    truth, single = exact(case)[3], relative_norm(plain(case)[3], exact(case)[3])
    chunk_of(rows)
    once = relative_norm(measured(case)[3], truth)
    chunk_of(-(-rows // chunks))
    assert relative_norm(measured(case)[3], truth) <= 1.1 * once
    assert once <= 1.1 * single + arm.slack(torch.bfloat16)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("arm", ["torch", "interpreter"], indirect=True)
def test_the_product_of_16_bit_factors_that_adds_to_float32(arm, chunk_of, monkeypatch):
    """What a GPU is asked for, answered here by the definition: factors of 16 bits, nothing read of a first sum."""
    case, calls = training_case(arm, torch.bfloat16), []

    def addmm(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert left.dtype == right.dtype == torch.bfloat16
        assert total.dtype == out.dtype == out_dtype == torch.float32
        assert total.data_ptr() == out.data_ptr()
        assert alpha == 1
        calls.append(beta)
        product = left.float() @ right.float()
        return out.copy_(total + product if beta else product)

    make = arm.rows.workspace
    monkeypatch.setattr(arm.rows, "workspace", lambda *sizes: make(*sizes).as_subclass(OnGpu))
    chunk_of(8)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype_out", addmm, "CPU")
        found = measured(case)
    assert calls == [0, *[1] * (len(calls) - 1)]
    assert len(calls) >= 3
    assert_as_exact_as_plain(found, plain(case), exact(case), arm.slack(torch.bfloat16))
    single = relative_norm(plain(case)[3], exact(case)[3])
    assert relative_norm(found[3], exact(case)[3]) <= 1.1 * single + arm.slack(torch.bfloat16)


def test_a_scale_common_to_all_rows_shifts_nothing(arm):
    """Equal weights and scales: had the scale been rounded to bfloat16, every gradient would be off by as much."""
    case = peaked(arm, *arm.size((100, 32, 60), (8192, 1024, 32_000)), torch.bfloat16, kept=1.0)
    case = case._replace(weights=torch.ones_like(case.weights), scales=torch.full_like(case.scales, 1 / 389))
    found, truth = measured(case), exact(case)
    # What the interpreter truncates is a shift, too: 2^-9 on average, or half as much again.
    bound = 6e-3 if arm.interpreted else 3e-4
    for place in (2, 3):
        gain = (found[place].double() * truth[place]).sum() / truth[place].square().sum() - 1
        assert abs(gain) < bound  # 1/389 itself is 9e-4 away from the nearest bfloat16


def test_float16_gradients_do_not_underflow_under_a_loss_scale(arm):
    case = peaked(arm, *arm.size((40, 32, 60), (8192, 1024, 32_000)), torch.float16)
    case = case._replace(scales=torch.full_like(case.scales, 1 / (4 * 500_000)))
    found, truth = measured(case, 65536.0), exact(case, 65536.0)
    assert relative_norm(found[2], truth[2]) < 3e-3
    assert relative_norm(found[3], truth[3]) < 3e-3


@pytest.mark.parametrize("seed", range(6))
def test_ragged_sizes(arm, chunk_of, by_blocks, seed):
    """Rows that are no multiple of anything, chunks of one row and more, any D, V from 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows, dim = draw(0, 1, 2, 5, 13, arm.size(19, 5003)), draw(8, 24, 40, arm.size(56, 1032))
    vocabulary, chunk = draw(1, 2, 3, 15, 16, 17, 33, 64, arm.size(65, 40_001)), draw(1, 3, 7, arm.size(16, 999))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    case = peaked(arm, rows, dim, vocabulary, dtype, seed, kept=(0.0, 0.5, 1.0)[seed % 3])
    chunk_of(chunk)
    count = (None, int((case.targets != IGNORED).sum()))[seed // 2 % 2]
    # Where there are few numbers, plain torch may happen to be exact: a unit in the last place besides.
    slack = arm.slack(dtype) + torch.finfo(dtype).eps
    assert_as_exact_as_plain(measured(case, count=count), plain(case), exact(case), slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_cross_entropy(arm, row_layout, chunk_of, dtype):
    case = training_case(arm, dtype)
    losses, naive = exact(case)[1], plain(case)[1]
    chunk_of(arm.size(13, 8192))
    for count in (None, int((case.targets != IGNORED).sum())):
        found = reference_cross_entropy(case.hidden.requires_grad_(), case.weight, case.targets, count=count)
        assert not found.requires_grad
        assert found.dtype == torch.float32
        assert_as_exact_as_plain([found], [naive], [losses], 0.0)
        assert not found[case.targets == IGNORED].any()


def test_without_scales_every_scale_is_one(arm):
    case = training_case(arm, torch.float32)
    loss, _ = weighted_linear_cross_entropy(*case[:4])
    assert relative_largest(loss, exact(case._replace(scales=torch.ones_like(case.scales)))[0]) < 1e-5


def test_weights_and_scales_of_zero(arm):
    case = training_case(arm, torch.float32)
    weights, scales = case.weights.clone(), case.scales.clone()
    weights[::2], scales[::3] = 0, 0
    case = case._replace(weights=weights, scales=scales)
    found = measured(case)
    assert_as_exact_as_plain(found, plain(case), exact(case), 0.0)
    assert not found[2][::2].any()
    assert not found[2][::3].any()
    silent = measured(case._replace(scales=torch.zeros_like(scales)))
    assert silent[0] == 0
    assert not silent[2].any()
    assert not silent[3].any()


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_what_stands_at_ignored_rows_counts_for_nothing(arm, rubbish):
    case = training_case(arm, torch.bfloat16)
    spoilt = Case(*(x.clone() for x in case))
    ignored = case.targets == IGNORED
    spoilt.hidden[ignored], spoilt.weights[ignored], spoilt.scales[ignored] = rubbish, rubbish, rubbish
    for a, b in zip(measured(spoilt), measured(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not reference_cross_entropy(spoilt.hidden, case.weight, case.targets).isnan().any()


@pytest.mark.parametrize("arm", ["interpreter"], indirect=True)  # on a GPU it ends the process's use of the device
def test_a_count_that_is_too_small_is_an_error(arm):
    case = training_case(arm, torch.float32)
    known = int((case.targets != IGNORED).sum())
    with pytest.raises(RuntimeError, match="more targets than the count that was given"):
        measured(case, count=known - 1)
    with pytest.raises(RuntimeError, match="more targets than the count that was given"):
        reference_cross_entropy(case.hidden, case.weight, case.targets, count=known - 1)


@pytest.mark.parametrize("largest", [1.0, 0.75, 1 / 389, 5e-39, 3e-41, 1e30])
def test_scales_are_taken_relative_to_a_power_of_two(largest):
    """A power of two rounds nothing, however small the scales are."""
    power = _common_power(torch.tensor([0.0, largest / 3, -largest]))
    mantissa, exponent = math.frexp(power.item())
    assert mantissa == 0.5
    assert 0.5 <= abs(largest) / 2.0 ** (exponent - 1) <= 1.0
    for none in (torch.zeros(3), torch.empty(0)):
        assert _common_power(none) == 1


def test_all_rows_masked_and_no_rows(arm):
    for case in (training_case(arm, torch.bfloat16), peaked(arm, 0, 8, 33, torch.bfloat16)):
        masked = case._replace(targets=torch.full_like(case.targets, IGNORED))
        for count in (None, 0):
            found = measured(masked, count=count)
            assert [x.shape for x in found] == [(), case.targets.shape, case.hidden.shape, case.weight.shape]
            assert not any(x.any() for x in found)
            assert not reference_cross_entropy(case.hidden, case.weight, masked.targets, count=count).any()


def test_inputs_of_any_layout(arm):
    """Tensors cut out of wider ones, and an unembedding that is stored transposed."""
    case = training_case(arm, torch.float32)
    wide = [torch.stack([x, x.flip(0)], -1)[..., 0] for x in case]
    wide[1] = case.weight.T.contiguous().T
    assert not any(x.is_contiguous() for x in wide)
    for a, b in zip(measured(Case(*wide)), measured(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    losses = reference_cross_entropy(wide[0], wide[1], wide[2])
    torch.testing.assert_close(losses, measured(case)[1], rtol=1e-5, atol=1e-6)


def test_a_target_out_of_range_makes_the_loss_nan(arm):
    """torch refuses it; a kernel cannot, and must neither read elsewhere nor go on as if nothing were wrong."""
    case = training_case(arm, torch.float32)
    for wrong in (len(case.weight), -1, 2**40):
        targets = case.targets.clone()
        targets[0] = wrong
        try:
            loss, losses = weighted_linear_cross_entropy(case.hidden, case.weight, targets, case.weights)
        except (IndexError, RuntimeError):
            assert arm.backend == "torch"
            continue
        assert loss.isnan()
        assert losses.isnan().sum() == 1


def test_a_vocabulary_of_256000(arm):
    """By blocks of 4096 in the kernels; one block for torch."""
    rows, dim = arm.size((3, 8), (2048, 2048))
    case = peaked(arm, rows, dim, 256_000, torch.bfloat16, kept=1.0)
    assert_as_exact_as_plain(measured(case), plain(case), exact(case), arm.slack(torch.bfloat16))


@TRITON_ALONE
def test_chunks_are_bounded_whatever_the_vocabulary(arm):
    for vocabulary in (2, 32_000, 32_001, 128_256, 256_000, 10**9):
        for dtype in (torch.bfloat16, torch.float32):
            rows = arm.rows.chunk_rows(vocabulary, dtype, arm.device)
            assert rows >= 16
            assert rows * vocabulary * dtype.itemsize <= max(2**29, 16 * vocabulary * dtype.itemsize)
            if 16 <= vocabulary <= 256_000:
                assert rows * vocabulary * dtype.itemsize > 2**28  # large enough for products at full speed
                assert rows % 128 == 0
