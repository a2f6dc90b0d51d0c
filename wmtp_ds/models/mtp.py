"""The multi-token-prediction policy (Gloeckle et al. 2024), made of transformers' own Llama blocks.

Of ``num_hidden_layers`` Llama blocks all but the last form the trunk; the last is head 1; ``n_future_tokens − 1``
more blocks are heads 2..n. Every head reads the trunk's output and is followed by the shared final norm and the
shared unembedding; head ``k`` at position ``i`` predicts token ``i + k``. Without its extra heads the model *is* a
``LlamaForCausalLM``, under the same parameter names, so its folder loads as one.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from wmtp_ds.config.fields import PACKING_ATTENTION


class Reading(Protocol):
    """How tokens are read that are not simply one sequence a row: packed rows, or tokens behind those in a cache."""

    @property
    def position_ids(self) -> Tensor:
        """Of the tokens, ``[B, S]``."""

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each token may read, as numbers to add to scores: ``[B, 1, S, tokens there are]``."""


@runtime_checkable
class Cache(Reading, Protocol):
    """Keeps the keys and values of tokens that were read."""

    def update(self, keys_BHSE: Tensor, values_BHSE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values; returns those of all tokens there are."""


class Unembedding(nn.Linear):
    """The linear layer onto the vocabulary, which can hand its weight to a loss that never holds all logits.

    Under ZeRO-3 a weight is whole only inside the forward of the module that owns it. So a loss that multiplies by
    the unembedding itself runs in here.
    """

    def forward(self, hidden: Tensor, loss: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits ``[..., V]``, or what ``loss(hidden, weight)`` returns."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


class MTPLlamaForCausalLM(LlamaForCausalLM):
    """A Llama policy with ``config.n_future_tokens`` prediction heads.

    ``forward``, ``generate`` and the names of the parameters are those of ``LlamaForCausalLM`` (head 1).

    Raises:
        ValueError: if the config has no ``n_future_tokens`` ≥ 1, or no block for head 1.
    """

    def __init__(self, config: LlamaConfig):
        n: Any = getattr(config, "n_future_tokens", None)
        for name, value in (("n_future_tokens", n), ("num_hidden_layers", config.num_hidden_layers)):
            if type(value) is not int or value < 1:
                raise ValueError(f"the model's config.json must say {name} >= 1, not {value!r}")
        # As LlamaForCausalLM does, but with an unembedding that can host a loss.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Unembedding(config.hidden_size, config.vocab_size, bias=False)
        self.mtp_heads = nn.ModuleList(
            LlamaDecoderLayer(config, layer_idx=config.num_hidden_layers + extra) for extra in range(n - 1)
        )
        self.post_init()

    @property
    def n_future_tokens(self) -> int:
        """The number of heads, n."""
        return len(self.mtp_heads) + 1

    def trunk(self, input_ids_BS: Tensor, reading: Reading | None = None) -> Tensor:
        """Token ids ``[B, S]`` -> the trunk's output ``h``, ``[B, S, D]``, not normalised.

        Attention is causal and nothing else: padding belongs on the right, where no token can see it. In packed rows it
        is causal within each segment, and positions count from the segment's first token. With a `Cache`, tokens are
        read behind those that are in it.

        Raises:
            ValueError: there is a ``reading``, and the config's attention implementation takes no mask.
        """
        hidden_BSD = self.model.embed_tokens(input_ids_BS)
        inputs = self._attention_inputs(hidden_BSD, reading)
        for block in self.model.layers[:-1]:
            hidden_BSD = block(hidden_BSD, **inputs)
        return hidden_BSD

    def head_states(self, trunk_BSD: Tensor, reading: Reading | None = None, heads: int | None = None) -> Tensor:
        """Trunk output ``[B, S, D]`` -> what the unembedding reads, ``[n, B, S, D]``: each head, then the norm.

        Args:
            trunk_BSD: of :meth:`trunk`.
            reading: as it was given there.
            heads: only so many of the first; None: all.
        """
        inputs = self._attention_inputs(trunk_BSD, reading)
        blocks = (self.model.layers[-1], *self.mtp_heads)[:heads]
        return torch.stack([self.model.norm(block(trunk_BSD, **inputs)) for block in blocks])

    def _attention_inputs(self, hidden_BSD: Tensor, reading: Reading | None) -> dict[str, Any]:
        """What every block is given; made once for all of them."""
        if reading is None:
            positions = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]
            # Not told the positions: it would look for packed sequences in them, and a GPU would be waited for.
            mask = create_causal_mask(
                config=self.config, inputs_embeds=hidden_BSD, attention_mask=None, past_key_values=None
            )
        else:
            if self.config._attn_implementation not in PACKING_ATTENTION:
                raise ValueError(
                    "packed rows and caches need an attention implementation that takes a mask "
                    f"({', '.join(PACKING_ATTENTION)}), not {self.config._attn_implementation!r}"
                )
            # In the blocks' own dtype: of a mask of bools, each block would make one of these for itself.
            positions, mask = reading.position_ids, reading.mask(hidden_BSD.dtype)
        return {
            "past_key_values": reading if isinstance(reading, Cache) else None,
            "attention_mask": mask,
            "position_embeddings": self.model.rotary_emb(hidden_BSD, position_ids=positions),
            "position_ids": positions,
        }
