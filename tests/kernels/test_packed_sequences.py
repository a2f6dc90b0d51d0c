"""Rho-1 within sequences where several of them share a row of the batch."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from kernel_cases import IGNORED, Arm, peaked_layer
from torch import Tensor

from wmtp_kernels import rho1_linear_cross_entropy

HEADS, LENGTH = 2, 11
# Tokens of the sequences of each row; what is left of a row is padding, and counts to the last of them.
ROWS = [[4, 1, 5], [3, 7]]
IDS = [[0] * 4 + [1] + [2] * 6, [3] * 3 + [4] * 8]


class Inputs:
    """Two rows of five sequences; the ends of sequences and the padding have no targets."""

    def __init__(self, arm: Arm):
        self.hidden, self.weight, self.targets = peaked_layer(arm, (HEADS, 2, LENGTH), 24, 67, torch.float32, 5)
        self.ids = torch.tensor(IDS, device=arm.device)
        for b, lengths in enumerate(ROWS):
            end = 0
            for tokens in lengths:
                end += tokens
                self.targets[:, b, end - 1] = IGNORED
            self.targets[:, b, end:] = IGNORED
        self.reference = 5 * torch.rand(self.targets.shape, generator=arm.generator(6), device=arm.device)
        supervised = self.targets != IGNORED
        self.counts = torch.stack([(supervised & (self.ids == g)).sum((1, 2)) for g in range(5)], 1).cpu()

    def run(self, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cross-entropies, weights, gradients of hidden states and unembedding."""
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        given = {"counts_nB": self.counts, "sequences_BS": self.ids} | options
        loss, ce, weights = rho1_linear_cross_entropy(hidden, weight, self.targets, self.reference, **given)
        loss.backward()
        return ce, weights, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [10**6, 6, 3])  # all at once, some sequences at once, two passes
@pytest.mark.parametrize("excess", ["signed", "reference"])
def test_each_sequence_is_a_group(arm, chunk_of, chunk, excess):
    """Against a selection sorted in Python, and torch's own gradient of what was selected."""
    inputs, share = Inputs(arm), 0.55
    chunk_of(chunk)
    ce, weights, hidden_grad, weight_grad = inputs.run(k_percent=share, scope="sequence", excess=excess)
    expected = torch.zeros_like(weights).cpu()
    scores = (ce - inputs.reference if excess == "signed" else inputs.reference).cpu()
    for k in range(HEADS):
        for g in range(5):
            b = 0 if g < 3 else 1
            places = [i for i in range(LENGTH) if IDS[b][i] == g and inputs.targets[k, b, i] != IGNORED]
            places.sort(key=lambda i, k=k, b=b: -scores[k, b, i].item())
            for i in places[: ceil(Fraction(55, 100) * len(places))]:
                expected[k, b, i] = 1
    assert torch.equal(weights.cpu(), expected)
    assert 0 < expected.sum() < (inputs.targets != IGNORED).sum()
    hidden, weight = (x.detach().clone().requires_grad_() for x in (inputs.hidden, inputs.weight))
    losses = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 2), inputs.targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    torch.testing.assert_close(ce.flatten(), losses.detach(), rtol=1e-5, atol=1e-5)
    (losses * expected.to(losses.device).flatten()).sum().backward()
    torch.testing.assert_close(hidden_grad, hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [10**6, 6])
def test_the_same_as_rows_of_their_own(arm, chunk_of, chunk):
    """Sequences of one length, one after another in a single row."""
    inputs = Inputs(arm)
    chunk_of(chunk)
    options = {"k_percent": 0.4, "scope": "sequence"}
    counts = (inputs.targets != IGNORED).sum(-1).cpu()
    ce, weights, hidden_grad, weight_grad = inputs.run(**options, counts_nB=counts, sequences_BS=None)
    ids = torch.arange(2, device=arm.device).repeat_interleave(LENGTH)[None]
    for name in ("hidden", "targets", "reference"):
        x = getattr(inputs, name)
        setattr(inputs, name, x.reshape(HEADS, 1, 2 * LENGTH, *x.shape[3:]))
    found = inputs.run(**options, counts_nB=counts, sequences_BS=ids)
    for x, expected in zip(found, (ce, weights, hidden_grad, weight_grad), strict=True):
        torch.testing.assert_close(x.view_as(expected), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"k_percent": 0.5}, {"weighting": "softmax"}], ids=["batch", "softmax"])
def test_other_groups_do_not_ask_for_sequences(arm, options):
    inputs = Inputs(arm)
    rows = (inputs.targets != IGNORED).sum(-1).cpu()
    expected = inputs.run(**options, counts_nB=rows, sequences_BS=None)
    for x, y in zip(inputs.run(**options), expected, strict=True):
        assert torch.equal(x, y)


def test_what_does_not_fit_is_said():
    inputs = Inputs(Arm("torch", torch.device("cpu")))
    with pytest.raises(ValueError, match=r"sequences need their counts, \[2, sequences\]"):
        inputs.run(counts_nB=None)
    with pytest.raises(ValueError, match="sequences need their counts"):
        inputs.run(counts_nB=inputs.counts[:1])
    with pytest.raises(ValueError, match=r"sequences \[2, 10\] must be \[2, 11\]"):
        inputs.run(sequences_BS=inputs.ids[:, 1:])
    with pytest.raises(ValueError, match="counts must be on the CPU, not on meta"):
        inputs.run(counts_nB=inputs.counts.to("meta"))
