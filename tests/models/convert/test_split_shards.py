"""How the tensors of a model are divided among files."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp_ds.models.convert.deliver import split_shards
from wmtp_ds.models.convert.tensors import LazyTensor, constant


def tensors_of(sizes: list[int]) -> dict[str, LazyTensor]:
    """Tensors of so many bytes each."""
    return {f"t{number}": constant("", torch.float32, (size // 4,), 0.0) for number, size in enumerate(sizes)}


def test_names_are_those_that_transformers_looks_for():
    assert list(split_shards(tensors_of([40, 40]), 80)) == ["model.safetensors"]
    shards = split_shards(tensors_of([40, 44, 40, 120, 4, 4]), 80)
    assert {file: list(shard) for file, shard in shards.items()} == {
        "model-00001-of-00005.safetensors": ["t0"],
        "model-00002-of-00005.safetensors": ["t1"],
        "model-00003-of-00005.safetensors": ["t2"],
        "model-00004-of-00005.safetensors": ["t3"],
        "model-00005-of-00005.safetensors": ["t4", "t5"],
    }


SIZES = st.lists(st.integers(1, 30).map(lambda count: 4 * count), min_size=1, max_size=40)


@given(sizes=SIZES, limit=st.integers(1, 200))
def test_no_file_is_too_large_or_closed_too_early(sizes, limit):
    tensors = tensors_of(sizes)
    shards = list(split_shards(tensors, limit).values())
    assert [name for shard in shards for name in shard] == list(tensors), "all of them, in their order"
    totals = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    for shard, total in zip(shards, totals, strict=True):
        assert total <= limit or len(shard) == 1
    for total, after in zip(totals, shards[1:], strict=False):
        assert total + next(iter(after.values())).nbytes > limit, "the next tensor would have fitted"
