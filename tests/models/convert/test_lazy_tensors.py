"""Tensors that are read in blocks: whatever the blocks, the values are those of the whole."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert import tensors
from wmtp_ds.models.convert.tensors import (
    LazyTensor,
    bytes_of,
    cast,
    checked_blocks,
    checksum,
    constant,
    halves_from_pairs,
    joined,
    normal,
    pairs_from_halves,
    portion,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = st.integers(1, 40), st.integers(1, 12)
SIZES = st.sampled_from([1, 7, 64, 300, 10**6])


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor("file: name", tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop].clone())


def whole(tensor: LazyTensor, block_bytes: int = 10**6) -> torch.Tensor:
    """All blocks of a tensor, read with blocks of a size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", block_bytes)
        blocks = list(tensor.blocks())
    for block in blocks[:-1]:
        assert block.shape[0] % tensor.group == 0
        assert block.shape[0] == blocks[0].shape[0]
        assert block.nbytes <= max(block_bytes, tensor.group * block[0].nbytes)
    assert all(block.is_contiguous() for block in blocks)
    result = torch.cat(blocks)
    assert (tuple(result.shape), result.dtype) == (tensor.shape, tensor.dtype)
    return result


@st.composite
def matrices(draw, rows=ROWS, columns=COLUMNS):
    shape = (draw(rows), draw(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator).to(draw(st.sampled_from(FLOATS)))


@given(matrix=matrices(), block_bytes=SIZES)
def test_blocks_are_the_tensor(matrix, block_bytes):
    assert torch.equal(whole(lazy(matrix), block_bytes), matrix)
    vector = matrix[:, 0].contiguous()
    assert torch.equal(whole(lazy(vector), block_bytes), vector)
    assert lazy(matrix).nbytes == matrix.nbytes
    assert checksum(lazy(matrix)) == hashlib.sha256(matrix.view(torch.uint8).numpy().tobytes()).hexdigest()


@given(matrix=matrices())
def test_bytes_of_a_block(matrix):
    assert bytes_of(matrix) == matrix.flatten().view(torch.uint8).numpy().tobytes()


@given(data=st.data(), block_bytes=SIZES, axis=st.sampled_from([0, 1]), count=st.integers(1, 4))
def test_joined_and_portion_are_inverse(data, block_bytes, axis, count):
    size = st.integers(1, 6).map(lambda number: number * count)
    matrix = data.draw(matrices(size, size))
    parts = [portion(lazy(matrix), axis, index, count) for index in range(count)]
    for part, expected in zip(parts, matrix.chunk(count, dim=axis), strict=True):
        assert torch.equal(whole(part, block_bytes), expected)
    assert torch.equal(whole(joined(parts, axis), block_bytes), matrix)


@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([2, 4, 6, 16]),
    columns=st.integers(1, 5),
    block_bytes=SIZES,
)
def test_rotary_orders(seed, heads, head_dim, columns, block_bytes):
    """Against the published formula, and against what it is for: pair (2i, 2i + 1) becomes (i, i + half)."""
    matrix = torch.randn(heads * head_dim, columns, generator=torch.Generator().manual_seed(seed))
    halves = halves_from_pairs(lazy(matrix), head_dim)
    expected = matrix.view(heads, head_dim // 2, 2, columns).transpose(1, 2).reshape(heads * head_dim, columns)
    assert torch.equal(whole(halves, block_bytes), expected)
    for head in range(heads):
        for pair in range(head_dim // 2):
            assert torch.equal(expected[head * head_dim + pair], matrix[head * head_dim + 2 * pair])
            assert torch.equal(expected[head * head_dim + head_dim // 2 + pair], matrix[head * head_dim + 2 * pair + 1])
    back = pairs_from_halves(lazy(expected), head_dim)
    assert torch.equal(whole(back, block_bytes), matrix)
    assert torch.equal(whole(pairs_from_halves(halves, head_dim), block_bytes), matrix)


@given(matrix=matrices(), dtype=st.sampled_from([*FLOATS, None]), block_bytes=SIZES)
def test_cast(matrix, dtype, block_bytes):
    result = cast(lazy(matrix), dtype)
    assert torch.equal(whole(result, block_bytes), matrix.to(dtype or matrix.dtype))


def test_a_cast_to_what_it_is_changes_nothing():
    tensor = lazy(torch.ones(2, 2))
    assert cast(tensor, None) is tensor
    assert cast(tensor, torch.float32) is tensor


def test_what_a_dtype_cannot_hold():
    tensor = lazy(torch.tensor([[1.0, -70000.0]]))
    with pytest.raises(UserError, match=r"^file: name holds 7e\+04, which float16 cannot\. Take --dtype bfloat16"):
        whole(cast(tensor, torch.float16))
    assert torch.isfinite(whole(cast(tensor, torch.bfloat16))).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-torch.inf, "infinity")]
)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_values_that_are_not_finite(dtype, value, word, place):
    matrix = torch.randn(4, 5).to(dtype)
    list(checked_blocks(lazy(matrix)))
    matrix.view(-1)[place] = value
    with pytest.raises(UserError, match=rf"^file: name holds {word}: the weights are damaged.*Copy the model again"):
        list(checked_blocks(lazy(matrix)))


def test_infinities_of_both_signs_are_found():
    with pytest.raises(UserError, match="infinity"):
        list(checked_blocks(lazy(torch.tensor([[float("inf"), float("-inf")]]))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_values_are_fine(dtype):
    """Their sum is not finite, they are."""
    matrix = torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(torch.cat(list(checked_blocks(lazy(matrix)))), matrix)


@given(value=st.sampled_from([0.0, 1.0]), dtype=st.sampled_from(FLOATS), block_bytes=SIZES)
def test_constant(value, dtype, block_bytes):
    assert torch.equal(whole(constant("x", dtype, (5, 3), value), block_bytes), torch.full((5, 3), value, dtype=dtype))
    assert torch.equal(whole(constant("x", dtype, (5,), value), block_bytes), torch.full((5,), value, dtype=dtype))


def test_normal_has_its_moments():
    values = whole(normal("x", torch.float32, (1500, 200), 0.02, "0")).double()
    assert abs(values.mean()) < 2e-4
    assert abs(values.std() - 0.02) < 2e-4
    kurtosis = (values / values.std()).pow(4).mean()
    assert abs(kurtosis - 3) < 0.05
    lagged = [float((values[step:] * values[: len(values) - step]).mean()) / 0.02**2 for step in (1, 256, 512)]
    assert max(map(abs, lagged)) < 0.01, "rows repeat"


@given(rows=st.integers(1, 900), block_bytes=st.sampled_from([1, 5000, 10**6]), seed=st.text(max_size=3))
def test_normal_is_the_same_however_it_is_read(rows, block_bytes, seed):
    tensor = normal("x", torch.bfloat16, (rows, 3), 0.5, seed)
    assert torch.equal(whole(tensor, block_bytes), whole(tensor))


def test_normal_differs_by_seed():
    one, other = (whole(normal("x", torch.float32, (300, 3), 1.0, seed)) for seed in ("0\0a", "0\0b"))
    assert (one != other).all()
