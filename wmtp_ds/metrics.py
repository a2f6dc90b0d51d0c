"""What one optimizer step has to say: pieces of micro-batches, put together over the global batch."""

import torch
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.stages.base import Output
from wmtp_ds.weighting.statistics import ADDITIVE, N_MOMENTS, describe, merge_moments


class WindowMetrics:
    """Adds up the outputs of an accumulation window, then reduces them over ranks, in two small collectives."""

    def __init__(self) -> None:
        self._shares: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}

    def add(self, output: Output) -> None:
        """A micro-batch's output; nothing waits for the device."""
        shares = output.shares | {"train/loss": output.loss.detach()}
        for name, share in shares.items():
            share = share.detach().double()
            self._shares[name] = self._shares[name] + share if name in self._shares else share
        for name, values in output.moments.items():
            self._moments[name] = merge_moments(self._moments[name], values) if name in self._moments else values

    def reduce(self, signal: int = 0) -> tuple[dict[str, float], int]:
        """The metrics over the global batch, the same on every rank, and the largest ``signal`` of any rank."""
        names, kinds = sorted(self._shares), sorted(self._moments)
        sums = torch.stack([self._shares[name] for name in names])
        if kinds:
            sums = torch.cat([sums, *(self._moments[kind][:ADDITIVE] for kind in kinds)])
        extremes = torch.cat([sums.new_tensor([float(signal)]), *(self._moments[kind][ADDITIVE:] for kind in kinds)])
        sums, extremes = distributed.sum_over_ranks(sums), distributed.max_over_ranks(extremes)
        metrics = dict(zip(names, sums.tolist(), strict=False))
        width = N_MOMENTS - ADDITIVE
        for i, kind in enumerate(kinds):
            added = sums[len(names) + i * ADDITIVE : len(names) + (i + 1) * ADDITIVE]
            values = torch.cat([added, extremes[1 + i * width : 1 + (i + 1) * width]])
            for name, value in describe(values, kind).items():
                metrics[name.replace("_", "/", 1)] = value
        return metrics, int(extremes[0])
