"""What turns a chunk of logits into losses and gradients, element by element, against float64 definitions."""

import pytest
import torch
from kernel_cases import (
    IGNORED,
    TRITON_ALONE,
    Arm,
    advantages_loop,
    decide,
    peaked,
    relative_largest,
    spread_over_heads,
    targets_of,
    unit_in_the_last_place,
    weights_loop,
)
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and infinities are asked for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_of(arm: Arm, rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked logits in a workspace, as the products leave them there, their targets (some ignored) and weights."""
    case = peaked(arm, rows, 8, vocabulary, torch.float32, seed)
    # torch's workspace is in float32 for 16-bit inputs, too.
    logits = arm.rows.workspace(rows, vocabulary, dtype, arm.device)
    logits.copy_(case.hidden @ case.weight.T)
    return logits, case.targets, case.weights


def definition(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, logsumexp and ``w·(softmax − onehot)``, float64; cross-entropy and gradient 0 where ignored."""
    logits, known = logits.double(), targets != IGNORED
    onehot = torch.nn.functional.one_hot(targets.clamp(min=0), logits.shape[1])
    gradients = weights.double()[:, None] * (logits.softmax(-1) - onehot)
    losses = logits.logsumexp(-1) - logits.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(known, losses, 0.0), logits.logsumexp(-1), torch.where(known[:, None], gradients, 0.0)


def assert_stored(found: Tensor, expected: Tensor, weights: Tensor, arm: Arm) -> None:
    """Each element is the number expected, rounded once to its dtype: float32 in between costs next to nothing."""
    units = unit_in_the_last_place(expected, found.dtype)
    if found.dtype == torch.float32:
        bound = 2e-5 * expected.abs() + 5e-7 * weights.double()[:, None]
    else:
        bound = (arm.stores_within(found.dtype) + 0.01) * units + 5e-7 * weights.double()[:, None]
    excess = (found.double() - expected).abs() - bound
    assert (excess <= 0).all(), (excess.max(), excess.argmax())


SIZES = [(1, 2), (3, 7), (5, 16), (4, 33), (9, 150)]
REAL = [(4096, 32_000), (1000, 50_257), (777, 128_256), (3, 256_000), (5, 2), (4, 1), (100, 33)]


@pytest.fixture(params=range(len(SIZES)))
def size(request: pytest.FixtureRequest, arm: Arm) -> tuple[int, int]:
    return arm.size(SIZES, REAL)[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted(arm, row_layout, size, dtype):
    logits, targets, weights = logits_of(arm, *size, dtype)
    losses, _, gradients = definition(logits, targets, weights)
    # Of rows without a target nothing is asked where they are never visited.
    visited = slice(None) if arm.backend == "triton" else targets != IGNORED
    logits, found = logits[visited], logits[visited]
    found_losses = arm.rows.weighted_(found, targets[visited], weights[visited])
    assert relative_largest(found_losses, losses[visited]) < 2e-6
    assert_stored(found, gradients[visited], weights[visited], arm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(arm, row_layout, size, dtype):
    logits, targets, weights = logits_of(arm, *size, dtype)
    losses, log_sums, _ = definition(logits, targets, weights)
    before = logits.clone()
    found, found_sums = arm.rows.cross_entropy(logits, targets)
    assert found.dtype == found_sums.dtype == torch.float32
    assert relative_largest(found, losses) < 2e-6
    assert relative_largest(found_sums, log_sums) < 1e-6
    assert torch.equal(logits, before)
    assert not found[targets == IGNORED].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_selected(arm, row_layout, dtype):
    rows, vocabulary = arm.size((9, 150), (4096, 32_000))
    logits, targets, weights = logits_of(arm, rows, vocabulary, dtype)
    targets = targets.clamp(min=0)
    _, log_sums, gradients = definition(logits, targets, weights)
    count = rows * 2 // 3
    # Half of the first rows stay; the others are replaced by rows from beyond them, in any order.
    sources = torch.arange(count, device=arm.device)
    later = torch.arange(count, rows, device=arm.device).flip(0)
    sources[1::2][: len(later)] = later[: len(sources[1::2])]
    beyond = logits[count:].clone()
    arm.rows.selected_(logits, sources, targets[sources], weights[sources], log_sums[sources].float())
    assert_stored(logits[:count], gradients[sources], weights[sources], arm)
    assert torch.equal(logits[count:], beyond)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 40, 5000])
@pytest.mark.parametrize("gathered", [False, True])
def test_scaled_rows(arm, dtype, dim, gathered):
    rows = arm.size(7, 3001)
    generator = arm.generator(0)
    hidden = torch.randn(2 * rows, dim, generator=generator, device=arm.device).to(dtype)[::2]
    scales = torch.rand(rows, generator=generator, device=arm.device)
    hidden[3], scales[3] = torch.nan, 0.0
    picked = torch.randperm(rows, generator=generator, device=arm.device)[: rows - 2] if gathered else None
    if picked is not None:
        scales = scales[picked]
    found = arm.rows.scaled_rows(hidden, scales, picked)
    expected = (hidden if picked is None else hidden[picked]).double() * scales.double()[:, None]
    expected = torch.where(scales[:, None] == 0, 0.0, expected)
    assert found.shape == expected.shape
    distance = (found.double() - expected).abs()
    # What torch returns here is float32 and rounds once more later; float32 itself rounds once.
    assert (distance <= 1.01 * unit_in_the_last_place(expected, dtype)).all()


@TRITON_ALONE
def test_rows_of_a_workspace_start_on_even_borders(arm):
    """Vector loads need it; the columns beyond the vocabulary belong to nobody."""
    for vocabulary in (1, 2, 17, 33, 50_257):
        workspace = arm.rows.workspace(3, vocabulary, torch.bfloat16, arm.device)
        assert workspace.shape == (3, vocabulary)
        assert workspace.stride(1) == 1
        assert workspace.stride(0) % 16 == 0
        assert workspace.stride(0) - vocabulary < 16
        assert workspace.data_ptr() % 16 == 0


def run_each(arm: Arm, logits: Tensor, targets: Tensor, weights: Tensor, log_sums: Tensor) -> list[Tensor]:
    """Losses of the first two, gradients of the last two, of one set of logits that is put back in between."""
    before = logits.clone()
    losses, _ = arm.rows.cross_entropy(logits, targets)
    more_losses = arm.rows.weighted_(logits, targets, weights)
    gradients = logits.clone()
    logits.copy_(before)
    arm.rows.selected_(logits, torch.arange(len(logits), device=arm.device), targets, weights, log_sums)
    return [losses, more_losses, gradients, logits]


@TRITON_ALONE
@pytest.mark.parametrize("rubbish", [1e4, float("nan"), float("inf")])
def test_padding_counts_for_nothing_and_ends_as_zero(arm, row_layout, rubbish):
    """It is read and written with the vectors that hold the last logits; the products that follow may read it, too."""
    rows, vocabulary = 5, arm.size(35, 32_001)
    case = peaked(arm, rows, 8, vocabulary, torch.float32)
    logits = arm.rows.workspace(rows, vocabulary, torch.float32, arm.device)
    padded = logits.as_strided((rows, logits.stride(0)), logits.stride())
    padded[:, vocabulary:] = rubbish
    logits.copy_(case.hidden @ case.weight.T)
    losses, log_sums, expected = definition(logits, case.targets, case.weights)
    found = run_each(arm, logits, case.targets, case.weights, log_sums.float())
    for values in found[:2]:
        assert relative_largest(values, losses) < 2e-6
    for gradients in found[2:]:
        assert_stored(gradients, expected, case.weights, arm)
    assert not padded[:, vocabulary:].any()


@TRITON_ALONE
@pytest.mark.parametrize("gap", [1, 16])
def test_columns_that_are_no_padding_are_left_alone(arm, row_layout, gap):
    rows, vocabulary = 5, arm.size(35, 32_001)
    case = peaked(arm, rows, 8, vocabulary, torch.float32)
    wide = torch.full((rows, vocabulary + gap), torch.nan, device=arm.device)
    logits = wide[:, :vocabulary]
    logits.copy_(case.hidden @ case.weight.T)
    losses, log_sums, expected = definition(logits, case.targets, case.weights)
    found = run_each(arm, logits, case.targets, case.weights, log_sums.float())
    assert relative_largest(found[1], losses) < 2e-6
    for gradients in found[2:]:
        assert_stored(gradients, expected, case.weights, arm)
    assert wide[:, vocabulary:].isnan().all()


@TRITON_ALONE  # torch never visits ignored rows
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_is_zero_whatever_its_logits(arm, row_layout, rubbish, dtype):
    logits, targets, weights = logits_of(arm, 6, arm.size(50, 32_000), dtype)
    targets[:4] = targets[:4].clamp(min=0)
    targets[4:] = IGNORED
    expected = definition(logits, targets, weights)
    logits[4], logits[5, 7], weights[5] = rubbish, rubbish, rubbish
    found, _ = arm.rows.cross_entropy(logits, targets)
    sums = expected[1].float()
    again, selected = logits.clone(), torch.arange(6, device=arm.device)
    losses = arm.rows.weighted_(logits, targets, weights)
    arm.rows.selected_(again, selected, targets, weights, sums)
    for values in (found, losses):
        assert relative_largest(values, expected[0]) < 2e-6
    for gradients in (logits, again):
        assert not gradients[4:].any()
        assert_stored(gradients[:4], expected[2][:4], weights[:4], arm)


@pytest.mark.parametrize("wrong", [-1, -99, -101, 50, 2**40, -(2**40)])
def test_a_target_out_of_range_is_seen_and_reads_nothing_else(arm, row_layout, wrong):
    """NaN from a kernel, an exception from torch: never the loss of another token."""
    logits, targets, weights = logits_of(arm, 3, 50, torch.float32)
    targets.clamp_(min=0)
    expected = definition(logits, targets, weights)
    targets[1] = wrong
    others = torch.tensor([0, 2], device=arm.device)
    for operation in (arm.rows.cross_entropy, lambda *tensors: (arm.rows.weighted_(*tensors, weights),)):
        chunk = logits.clone()
        try:
            losses = operation(chunk, targets)[0]
        except (IndexError, RuntimeError):
            assert arm.backend == "torch"
            continue
        assert losses[1].isnan()
        assert relative_largest(losses[others], expected[0][others]) < 2e-6
    if arm.backend == "triton":
        assert chunk[1].isnan().all()
        assert relative_largest(chunk[others], expected[2][others]) < 1e-5


@pytest.mark.parametrize("shift", [0.0, -3000.0, 3000.0])
def test_logits_of_thousands_neither_overflow_nor_vanish(arm, row_layout, shift):
    logits, targets, weights = logits_of(arm, 8, 40, torch.float32)
    targets.clamp_(min=0)
    logits.mul_(500.0).add_(shift)
    losses, _, gradients = definition(logits, targets, weights)
    assert losses.max() > 500
    found, _ = arm.rows.cross_entropy(logits, targets)
    again = arm.rows.weighted_(logits, targets, weights)
    assert relative_largest(found, losses) < 2e-6
    assert relative_largest(again, losses) < 2e-6
    assert relative_largest(logits, gradients) < 1e-5


def test_a_target_that_is_nearly_certain(arm, row_layout):
    """What is left of logsumexp and logit, two numbers of a thousand, is a thousandth: their difference comes first."""
    logits, targets, weights = logits_of(arm, 8, 40, torch.float32)
    targets.clamp_(min=0)
    logits.add_(1000.0)
    rows = torch.arange(8, device=arm.device)
    logits[rows, targets] = logits.amax(-1) + rows
    losses, _, _ = definition(logits, targets, weights)
    assert losses.min() < 1e-2
    if arm.backend == "triton":  # torch.logsumexp has nothing to take the difference of
        found, _ = arm.rows.cross_entropy(logits, targets)
        torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)
    again = arm.rows.weighted_(logits, targets, weights)
    torch.testing.assert_close(again.double(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rubbish", [float("-inf"), float("inf"), float("nan")])
def test_logits_that_are_not_finite(arm, row_layout, rubbish):
    """−inf is a token that cannot be; +inf and NaN are a model gone wrong, which must be seen."""
    logits, targets, weights = logits_of(arm, 4, 70, torch.float32)
    targets[:] = 3
    logits[1, 10:60] = rubbish  # all that some of a block's columns ever see
    losses, _, gradients = definition(logits, targets, weights)
    found, _ = arm.rows.cross_entropy(logits, targets)
    again = arm.rows.weighted_(logits, targets, weights)
    impossible = rubbish == float("-inf")
    kept = [0, 1, 2, 3] if impossible else [0, 2, 3]
    for values in (found, again):
        assert relative_largest(values[kept], losses[kept]) < 2e-6
        assert values[1].isfinite() == impossible
    assert relative_largest(logits[kept], gradients[kept]) < 1e-5
    assert logits[1].isnan().any() != impossible


def test_no_rows(arm):
    nothing = torch.empty(0, device=arm.device)
    logits = arm.rows.workspace(0, 50, torch.bfloat16, arm.device)
    targets = torch.empty(0, dtype=torch.int64, device=arm.device)
    assert arm.rows.weighted_(logits, targets, nothing).shape == (0,)
    assert [x.shape for x in arm.rows.cross_entropy(logits, targets)] == [(0,), (0,)]
    arm.rows.selected_(logits, targets, targets, nothing, nothing)
    assert arm.rows.scaled_rows(torch.empty(0, 8, device=arm.device), nothing).shape == (0, 8)


# --- Weights computed in the row kernel ---


@TRITON_ALONE  # torch computes the weights beforehand
@pytest.mark.parametrize("td_lambda", [0.0, 0.7])
@pytest.mark.parametrize("gathered", [False, True])
def test_td_weighted(arm, row_layout, td_lambda, gathered):
    heads, batch, length, vocabulary = arm.size((2, 3, 7, 40), (4, 4, 512, 32_000))
    gamma, low, high, start, constants = 0.9, 0.3, 2.0, 5, (0.13, 0.31, -0.2)
    places = decide(arm, batch, length)
    logits, drawn, _ = logits_of(arm, heads * batch * length, vocabulary, torch.float32)
    targets = targets_of(arm, places.decisions, heads, drawn.clamp(min=0).view(heads, batch, length))
    advantages = advantages_loop(*places.loops(), gamma, td_lambda)
    scale_beta, decisions = constants[1], places.decisions.tolist()
    of_decisions = weights_loop(advantages, decisions, scale_beta, low, high, (constants[0], 1, constants[2]))
    assert {low, high} <= set(of_decisions.flatten().tolist())  # the clip is felt on both sides
    weights = spread_over_heads(of_decisions, targets).view(-1).to(arm.device)
    source = arm.rows.TDSource(
        values_BS=None if td_lambda else places.values,
        rewards_B=places.rewards,
        last_B=torch.where(places.decisions, torch.arange(length, device=arm.device), 0).amax(-1),
        advantages_BS=advantages.float().to(arm.device) if td_lambda else None,
        decisions_BS=places.decisions,
        constants_3=torch.tensor(constants, device=arm.device),
        gamma=gamma,
        min_weight=low,
        max_weight=high,
    )
    rows = slice(start, len(logits))
    if gathered:
        order = torch.randperm(len(logits), generator=arm.generator(3), device=arm.device)
        rows = order[start:]
    chunk, targets_R, expected = logits[rows].clone(), targets.view(-1)[rows], weights[rows]
    losses, _, gradients = definition(chunk, targets_R, expected)
    found, found_weights, found_deltas = arm.rows.td_weighted_(chunk, targets_R, source, rows)
    assert relative_largest(found, losses) < 2e-6
    torch.testing.assert_close(found_weights.double(), expected, rtol=2e-6, atol=1e-7)
    assert_stored(chunk, gradients, expected.clamp(min=low), arm)
    # δ of the decision that emits a row's target, whether it has one or not; 0 beyond the end.
    deltas = torch.stack([torch.nn.functional.pad(advantages[:, k:], (0, k)) for k in range(heads)])
    expected = deltas.view(-1).to(arm.device)[rows]
    torch.testing.assert_close(found_deltas.double(), expected, rtol=1e-6, atol=1e-6)
