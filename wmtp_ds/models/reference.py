"""The frozen reference model, whose cross-entropy of each token Rho-1 compares the policy with."""

from functools import partial

import torch
from torch import Tensor, nn

from wmtp_ds.data.batches import Batch
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_kernels import IGNORE_INDEX, reference_cross_entropy


class ReferenceModel(nn.Module):
    """A next-token model (an MTP model with one head) that scores the supervised tokens of a batch."""

    def __init__(self, policy: MTPLlamaForCausalLM):
        super().__init__()
        assert policy.n_future_tokens == 1, "a reference predicts the next token alone"
        self.policy = policy

    def forward(self, batch: Batch) -> Tensor:
        """``r_j``, the cross-entropy in nats of each supervised token given those before it; ``[B, S]`` float32.

        0 at tokens that are not supervised, and at the first of a segment, which nothing precedes.
        """
        follows_BS = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        targets_BS = torch.where(batch.supervised[:, 1:] & follows_BS, batch.input_ids[:, 1:], IGNORE_INDEX)
        targets_BS = nn.functional.pad(targets_BS, (0, 1), value=IGNORE_INDEX)  # the last position predicts nothing
        count = int(batch.host.supervised.sum())
        hidden_BSD = self.policy.head_states(self.policy.trunk(batch.input_ids, batch.packing), batch.packing)[0]
        losses: Tensor = self.policy.lm_head(
            hidden_BSD.flatten(0, 1),
            loss=partial(reference_cross_entropy, targets_N=targets_BS.flatten(), count=count),
        )
        return nn.functional.pad(losses.view_as(targets_BS)[:, :-1], (1, 0))
