"""Random inputs with peaked logits, as a trained model has: a cross-entropy of 2 to 3 nats, widely spread."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import oracle

# The recipe of the TD weights; the oracle computes them, the kernels compute them themselves.
BETA, WEIGHT_MIN, WEIGHT_MAX = 0.9, 0.1, 5.0

# Of the logits, in nats: standard deviation of those that are noise, and of the target's lead over them.
_NOISE, _LEAD_SPREAD = 1.5, 1.5
# By how much the log-sum-exp of the noise leads the target, on average. Both spreads taken into account, the mean
# of softplus(lag) is then 2.5 nats.
_LAG = 2.1


@dataclass(frozen=True)
class Sizes:
    """``heads`` n, ``sequences`` B, ``length`` S, ``dim`` D, ``vocabulary`` V."""

    heads: int
    sequences: int
    length: int
    dim: int
    vocabulary: int

    @property
    def positions(self) -> int:
        """B·S."""
        return self.sequences * self.length

    @property
    def rows(self) -> int:
        """N = n·B·S."""
        return self.heads * self.positions


@dataclass(frozen=True)
class Inputs:
    """One set of inputs. Every position is a decision; the last k − 1 positions of head k have no target.

    Attributes:
        hidden_nBSD: leaf that requires a gradient, in the measured dtype.
        weight_VD: likewise.
        targets_nBS: int64, -100 where a head would look past the end.
        values_BS, rewards_B, decisions_BS: what TD weights are made of; float32, float32, bool.
        weights_nBS: TD weight of each target (of the decision that emits it), float32, 0 where there is none.
        scales_n: ``1/(n·M_k)``, float32.
        reference_nBS: made-up losses of a reference model, float32.
        mean_cross_entropy: of the targets, in nats.
        k_percent: share that Rho-1 selects.
    """

    sizes: Sizes
    hidden_nBSD: Tensor
    weight_VD: Tensor
    targets_nBS: Tensor
    values_BS: Tensor
    rewards_B: Tensor
    decisions_BS: Tensor
    weights_nBS: Tensor
    scales_n: Tensor
    reference_nBS: Tensor
    mean_cross_entropy: float
    k_percent: float

    @property
    def hidden_rows(self) -> Tensor:
        """``[N, D]``: all heads stacked as rows; gradients flow to ``hidden_nBSD``."""
        return self.hidden_nBSD.view(self.sizes.rows, self.sizes.dim)

    @cached_property
    def target_rows(self) -> Tensor:
        """``[N]``."""
        return self.targets_nBS.view(-1)

    @cached_property
    def weight_rows(self) -> Tensor:
        """``[N]`` float32."""
        return self.weights_nBS.view(-1)

    @cached_property
    def scale_rows(self) -> Tensor:
        """``[N]`` float32: each row's ``1/(n·M_k)``."""
        return self.scales_n.repeat_interleave(self.sizes.positions)

    @cached_property
    def coefficient_rows(self) -> Tensor:
        """``[N]`` float32: weight times scale."""
        return self.weight_rows * self.scale_rows

    @cached_property
    def logit_gradient(self) -> Tensor:
        """``[N, V]``: the gradient of the logits that the floor multiplies; in the measured dtype."""
        dtype = self.weight_VD.dtype
        gradient_NV = torch.empty(self.sizes.rows, self.sizes.vocabulary, dtype=dtype, device=self.weight_VD.device)
        for part in oracle.chunks(self.sizes.rows):
            gradient_NV[part] = oracle.logit_gradient(
                self.hidden_rows[part],
                self.weight_VD,
                self.target_rows[part],
                self.coefficient_rows[part],
                torch.float32,
            )
        return gradient_NV

    def selected_scales(self, scope: str) -> Tensor:
        """``1/(n·M_k)`` where M_k counts what Rho-1 selects of head k. ``[n]`` float32."""
        sizes = self.sizes
        counts = []
        for head in range(sizes.heads):
            of_a_sequence = max(sizes.length - head, 0)
            if scope == "batch":
                counts.append(oracle.kept(sizes.sequences * of_a_sequence, self.k_percent))
            else:
                counts.append(sizes.sequences * oracle.kept(of_a_sequence, self.k_percent))
        scales = [1.0 / (sizes.heads * count) if count else 0.0 for count in counts]
        return torch.tensor(scales, device=self.weight_VD.device)

    def drop_gradients(self) -> None:
        """As before a step."""
        self.hidden_nBSD.grad = self.weight_VD.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Of both gradients."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.hidden_nBSD, self.weight_VD))


def _lead(sizes: Sizes) -> float:
    """Mean logit of the target for the wanted cross-entropy: it lags behind the noise's log-sum-exp by ``_LAG``."""
    lead = 0.0
    for _ in range(20):
        # What lifts the target lifts other words a little, too: their vectors are not orthogonal.
        variance = _NOISE**2 + min(lead, sizes.dim / 4) ** 2 / sizes.dim
        lead = math.log(sizes.vocabulary) + variance / 2 - _LAG
    return lead


def _peaked_hidden(sizes: Sizes, weight_VD: Tensor, targets_nBS: Tensor, random: torch.Generator) -> Tensor:
    """``[n, B, S, D]``: noise, and the target's row of the unembedding, as much of it as makes its logit lead."""
    device = weight_VD.device
    shape = (*targets_nBS.shape, sizes.dim)
    hidden_nBSD = torch.randn(shape, generator=random, device=device)
    spread_nBS = torch.randn(targets_nBS.shape, generator=random, device=device)
    leads_nBS = _lead(sizes) + _LEAD_SPREAD * spread_nBS
    for hidden_BSD, targets_BS, leads_BS in zip(hidden_nBSD, targets_nBS.clamp(min=0), leads_nBS, strict=True):
        rows_BSD = weight_VD[targets_BS]
        hidden_BSD += rows_BSD * (leads_BS / rows_BSD.square().sum(-1))[..., None]
    return hidden_nBSD


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, k_percent: float) -> Inputs:
    """Fresh random inputs, the same for the same seed on the same device."""
    random = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    heads, batch, length = sizes.heads, sizes.sequences, sizes.length
    weight_VD = randn(sizes.vocabulary, sizes.dim) * (_NOISE / math.sqrt(sizes.dim))
    tokens = torch.randint(sizes.vocabulary, (batch, length + 1), generator=random, device=device)
    values_BS, rewards_B = randn(batch, length).sigmoid(), (randn(batch) > 0).float()
    weights_BS = oracle.td_weights(values_BS.double(), rewards_B.double(), BETA, WEIGHT_MIN, WEIGHT_MAX).float()
    targets_nBS = torch.full((heads, batch, length), oracle.IGNORE_INDEX, device=device)
    weights_nBS = torch.zeros(heads, batch, length, device=device)
    for head in range(min(heads, length)):
        # Head `head` at position i predicts token i + head + 1, which decision i + head emits.
        targets_nBS[head, :, : length - head] = tokens[:, head + 1 :]
        weights_nBS[head, :, : length - head] = weights_BS[:, head:]
    hidden_nBSD = _peaked_hidden(sizes, weight_VD, targets_nBS, random).to(dtype)
    weight_VD = weight_VD.to(dtype)
    losses_nBS = oracle.cross_entropy(hidden_nBSD.view(sizes.rows, -1), weight_VD, targets_nBS.view(-1), torch.float32)
    losses_nBS = losses_nBS.view_as(targets_nBS)
    supervised_n = (targets_nBS != oracle.IGNORE_INDEX).sum((1, 2))
    return Inputs(
        sizes=sizes,
        hidden_nBSD=hidden_nBSD.requires_grad_(),
        weight_VD=weight_VD.requires_grad_(),
        targets_nBS=targets_nBS,
        values_BS=values_BS,
        rewards_B=rewards_B,
        decisions_BS=torch.ones(batch, length, dtype=torch.bool, device=device),
        weights_nBS=weights_nBS,
        scales_n=torch.where(supervised_n > 0, 1.0 / (heads * supervised_n.clamp(min=1)), 0.0),
        reference_nBS=(losses_nBS + 0.7 * randn(heads, batch, length)).clamp(min=0.0),
        mean_cross_entropy=(losses_nBS.sum() / supervised_n.sum()).item(),
        k_percent=k_percent,
    )
