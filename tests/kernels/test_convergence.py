"""A small model trained with the kernels, and with materialised float32 logits: the same loss curve within noise."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_cases import TRITON_ALONE, Arm, targets_of
from torch import Tensor, nn

from wmtp_kernels import TDWeights, decision_weights, rho1_linear_cross_entropy, td_weighted_linear_cross_entropy
from wmtp_kernels.td_linear_cross_entropy import per_head

HEADS = 2
LossOf = Callable[["Model", "Batch"], Tensor]


class Size(NamedTuple):
    vocabulary: int
    dim: int
    batch: int
    length: int
    steps: int


class Batch(NamedTuple):
    tokens_BS: Tensor
    targets_nBS: Tensor
    td: TDWeights
    reference_nBS: Tensor
    scales_n: Tensor


class Model(nn.Module):
    """An embedding, an MLP block, a head for each of the next tokens, one norm and one unembedding for all."""

    def __init__(self, size: Size):
        super().__init__()
        dim = size.dim
        self.embedding = nn.Embedding(size.vocabulary, dim)
        self.block = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.heads = nn.ModuleList(nn.Linear(dim, dim) for _ in range(HEADS))
        self.norm = nn.LayerNorm(dim)
        self.unembedding = nn.Linear(dim, size.vocabulary, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Hidden states of the heads, ``[n, B, S, D]``."""
        x = self.embedding(tokens_BS)
        x = x + self.block(x)
        return torch.stack([self.norm(x + head(x).relu()) for head in self.heads])


@functools.cache
def batches(size: Size, device: torch.device, seed: int) -> list[Batch]:
    """Sequences in which each token follows from the one before it, nine times in ten; a prompt is not learned."""
    generator = torch.Generator().manual_seed(seed)
    shape, found = (size.batch, size.length), []
    reference = 3 * torch.rand(size.vocabulary, generator=generator)
    for _ in range(size.steps):
        tokens = torch.randint(size.vocabulary, shape, generator=generator)
        surprising = torch.rand(shape, generator=generator) < 0.1
        for i in range(1, size.length):
            tokens[:, i] = torch.where(surprising[:, i], tokens[:, i], (3 * tokens[:, i - 1] + 1) % size.vocabulary)
        decisions = torch.zeros(shape, dtype=torch.bool)
        decisions[:, size.length // 4 : -1] = True
        values, rewards = torch.rand(shape, generator=generator), torch.rand(size.batch, generator=generator).round()
        following = torch.stack([tokens.roll(-k, -1) for k in range(1, HEADS + 1)])
        targets = targets_of(Arm("torch", torch.device("cpu")), decisions, HEADS, following)
        scales = 1 / (HEADS * (targets != -100).sum((1, 2)).float())
        moved = [x.to(device) for x in (tokens, targets, values, rewards, decisions, reference, scales)]
        tokens, targets, values, rewards, decisions, losses, scales = moved
        td = TDWeights(values, rewards, decisions, td_lambda=0.5)
        found.append(Batch(tokens, targets, td, losses[targets.clamp(min=0)], scales))
    return found


def with_td(model: Model, batch: Batch) -> Tensor:
    found = td_weighted_linear_cross_entropy(
        model(batch.tokens_BS), model.unembedding.weight, batch.targets_nBS, batch.td, scales_n=batch.scales_n
    )
    return found.loss


def with_rho1(model: Model, batch: Batch) -> Tensor:
    loss, *_ = rho1_linear_cross_entropy(
        model(batch.tokens_BS), model.unembedding.weight, batch.targets_nBS, batch.reference_nBS,
        k_percent=0.6, scales_n=batch.scales_n,
    )  # fmt: skip
    return loss


def materialised(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropies ``[n, B, S]`` of all targets, 0 where ignored, and which are known."""
    logits = model.unembedding(model(batch.tokens_BS)).float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 2), batch.targets_nBS.flatten(), reduction="none")
    return losses.view_as(batch.targets_nBS), batch.targets_nBS != -100


def plain_td(model: Model, batch: Batch) -> Tensor:
    losses, _ = materialised(model, batch)
    weights = per_head(decision_weights(batch.td)[1], HEADS)
    return (batch.scales_n[:, None, None] * weights * losses).sum()


def plain_rho1(model: Model, batch: Batch) -> Tensor:
    losses, known = materialised(model, batch)
    excess = torch.where(known, losses.detach() - batch.reference_nBS, -torch.inf).flatten(1)
    kept = (0.6 * known.flatten(1).sum(1)).ceil().long()
    chosen = excess.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < kept[:, None]
    return (batch.scales_n[:, None] * chosen * losses.flatten(1)).sum()


def train(loss_of: LossOf, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """The loss of each step, ``[steps]``; ``seed`` draws the weights, the data are always the same."""
    torch.manual_seed(seed)
    model = Model(size).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    curve = []
    for batch in batches(size, device, 0):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve).float().cpu()


def smooth(curve: Tensor) -> Tensor:
    """Means over ten steps."""
    return curve[: len(curve) // 10 * 10].view(-1, 10).mean(1)


SIZES = {
    "torch": Size(vocabulary=97, dim=32, batch=4, length=12, steps=200),
    "cuda": Size(vocabulary=5000, dim=256, batch=16, length=128, steps=200),
    "interpreter": Size(vocabulary=11, dim=16, batch=1, length=5, steps=20),
}


@pytest.mark.parametrize(("ours", "theirs"), [(with_td, plain_td), (with_rho1, plain_rho1)], ids=["td", "rho1"])
@pytest.mark.parametrize("arm", ["torch", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_200_steps_in_float32(arm, ours, theirs):
    """What rounding makes of 200 steps is far below what they learn."""
    size = SIZES["cuda" if arm.device.type == "cuda" else "torch"]
    found, expected = (train(loss, size, torch.float32, arm.device) for loss in (ours, theirs))
    assert smooth(expected)[-1] < 0.75 * smooth(expected)[0]
    torch.testing.assert_close(found[:20], expected[:20], rtol=1e-4, atol=0)
    torch.testing.assert_close(smooth(found), smooth(expected), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), [(with_td, plain_td), (with_rho1, plain_rho1)], ids=["td", "rho1"])
@pytest.mark.parametrize("arm", ["torch", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_200_steps_in_bfloat16(arm, ours, theirs):
    """Nearer to plain torch from the same weights than plain torch is to itself from others."""
    size = SIZES["cuda" if arm.device.type == "cuda" else "torch"]
    found, expected = (train(loss, size, torch.bfloat16, arm.device) for loss in (ours, theirs))
    other = train(theirs, size, torch.bfloat16, arm.device, seed=1)
    assert smooth(expected)[-1] < 0.75 * smooth(expected)[0]
    spread = (smooth(other) - smooth(expected)).abs()
    distance = (smooth(found) - smooth(expected)).abs()
    assert distance.mean() <= 0.5 * spread.mean()
    assert distance.max() <= spread.max()


@pytest.mark.parametrize(("ours", "theirs"), [(with_td, plain_td), (with_rho1, plain_rho1)], ids=["td", "rho1"])
@TRITON_ALONE
def test_20_steps_through_the_kernels(arm, ours, theirs):
    found, expected = (train(loss, SIZES["interpreter"], torch.float32, arm.device) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
