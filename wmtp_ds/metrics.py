"""What one optimizer step has to say: pieces of micro-batches, put together over the global batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wmtp_ds import distributed
from wmtp_ds.stages.base import Output
from wmtp_ds.weighting.statistics import ADDITIVE, N_MOMENTS, describe, merge_moments


class WindowMetrics:
    """Adds up the outputs of an accumulation window, then reduces them over ranks, in a small collective."""

    def __init__(self) -> None:
        self._shares: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # of each micro-batch, for when one of them is not finite

    def add(self, output: Output) -> None:
        """A micro-batch's output; nothing waits for the device."""
        self.losses.append(output.loss.detach())
        shares = output.shares | {"train/loss": output.loss.detach()}
        for name, share in shares.items():
            share = share.detach().double()
            self._shares[name] = self._shares[name] + share if name in self._shares else share
        for name, values in output.moments.items():
            self._moments[name] = merge_moments(self._moments[name], values) if name in self._moments else values

    def reduce(
        self,
        signal: int = 0,
        same: Mapping[str, Tensor] | None = None,
        largest: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, float], int]:
        """The metrics over the global batch, the same on every rank, and the largest ``signal`` of any rank.

        Args:
            signal: of this rank.
            same: further scalars, which all ranks have alike: they come to the host along with the others.
            largest: further numbers of this rank, of which the largest of any rank is wanted.
        """
        names, kinds, same, largest = sorted(self._shares), sorted(self._moments), same or {}, largest or {}
        added = [torch.stack([self._shares[name] for name in names]), *(self._moments[k][:ADDITIVE] for k in kinds)]
        own = [added[0].new_full((1,), float(number)) for number in (signal, *largest.values())]
        extremes = [*own, *(self._moments[kind][ADDITIVE:] for kind in kinds)]
        # One collective and one copy: each copy is a wait for all that the device has been asked to do.
        everyones = distributed.gather_equal(torch.cat([*added, *extremes]))
        known = [value.detach().to(everyones).reshape(1) for value in same.values()]
        host = torch.cat([everyones.flatten(), *known]).cpu()
        on_host = host[: everyones.numel()].view_as(everyones)
        split = len(names) + ADDITIVE * len(kinds)
        sums, extreme = on_host[:, :split].sum(0), on_host[:, split:].amax(0)
        metrics = dict(zip(names, sums.tolist(), strict=False))
        width = N_MOMENTS - ADDITIVE
        for i, kind in enumerate(kinds):
            values = [sums[len(names) + i * ADDITIVE :][:ADDITIVE], extreme[len(own) + i * width :][:width]]
            for name, value in describe(torch.cat(values), kind).items():
                metrics[name.replace("_", "/", 1)] = value
        metrics |= dict(zip(same, host[everyones.numel() :].tolist(), strict=True))
        metrics |= dict(zip(largest, extreme[1:].tolist(), strict=False))
        return metrics, int(extreme[0])
