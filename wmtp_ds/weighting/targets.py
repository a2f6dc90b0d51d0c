"""Which token each head predicts at each position, and what it weighs."""

import torch
from torch import Tensor

from wmtp_kernels import IGNORE_INDEX
from wmtp_kernels.td_linear_cross_entropy import per_head


def mtp_targets(input_ids_BS: Tensor, supervised_BS: Tensor, segment_ids_BS: Tensor, n: int) -> Tensor:
    """Head ``k`` at position ``i`` predicts token ``i + k``, if that is supervised and of the same segment.

    Args:
        input_ids_BS: int64 token ids.
        supervised_BS: bool, tokens to learn.
        segment_ids_BS: int, the solution that a token belongs to; 0 is padding.
        n: number of heads.

    Returns:
        ``[n, B, S]`` int64, ``-100`` where there is no target.
    """
    length = input_ids_BS.shape[1]
    targets_nBS = input_ids_BS.new_full((n, *input_ids_BS.shape), IGNORE_INDEX)
    for k in range(1, min(n, length - 1) + 1):
        valid_BS = supervised_BS[:, k:] & (segment_ids_BS[:, k:] == segment_ids_BS[:, :-k])
        targets_nBS[k - 1, :, :-k] = torch.where(valid_BS, input_ids_BS[:, k:], IGNORE_INDEX)
    return targets_nBS


__all__ = ["mtp_targets", "per_head"]
