"""What a block keeps for backward: against what autograd really saves."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.plan.activations import Activations
from wmtp_ds.plan.shape import ModelShape

BATCH, LENGTH = 2, 64
DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def shape_of(**changes: int) -> ModelShape:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
    }
    return ModelShape(**(sizes | changes))


def saved_bytes(module: torch.nn.Module, run: Any, *, without: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps while ``run`` runs, parameters and ``without`` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *without]}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # keeps it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in known)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"intermediate_size": 1024}, {"head_dim": 32}])
def test_a_block_keeps_what_is_said(dtype: torch.dtype, changes: dict[str, int], packed: bool) -> None:
    shape = shape_of(**changes)
    fields = {key: value for key, value in shape.__dict__.items() if key in LlamaConfig().to_dict() and value}
    config = LlamaConfig(**fields, attn_implementation="sdpa")
    block = LlamaDecoderLayer(config, 0).to(dtype)
    hidden = torch.randn(BATCH, LENGTH, shape.hidden_size, dtype=dtype, requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    stream = hidden * 1  # not a leaf, as inside a model
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=dtype) if packed else None

    def run() -> Tensor:
        return block(stream, attention_mask=mask, position_embeddings=rotary, position_ids=positions)

    said = BATCH * LENGTH * Activations(shape, DTYPES[dtype], packed).block
    known = [*rotary, mask] if mask is not None else [*rotary]
    assert saved_bytes(block, run, without=known) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_value_head_keeps_what_is_said(dtype: torch.dtype, kind: Any) -> None:
    shape = shape_of()
    head = ValueHead(shape.hidden_size, kind)
    trunk = torch.randn(BATCH, LENGTH, shape.hidden_size, dtype=dtype, requires_grad=True) * 1
    said = BATCH * LENGTH * Activations(shape, DTYPES[dtype]).value_head(kind)
    found = saved_bytes(head, lambda: head(trunk), without=[trunk])
    assert found == pytest.approx(said, rel=0.05)


def test_a_checkpointed_block_keeps_one_tensor() -> None:
    for b in (2, 4):
        assert Activations(shape_of(), b).residual == b * 128
