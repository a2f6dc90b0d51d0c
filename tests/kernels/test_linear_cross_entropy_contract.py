"""What the cross-entropies promise besides numbers: gradients on demand, clear errors, bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wmtp_kernels import reference_cross_entropy, weighted_linear_cross_entropy

TARGETS = torch.tensor([0, 3, -100, 6])


def inputs(hidden_grad: bool = True, weight_grad: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, generator=generator), torch.randn(7, 5, generator=generator)
    return hidden.requires_grad_(hidden_grad), weight.requires_grad_(weight_grad)


def test_gradients_only_of_what_asks_for_them():
    expected = inputs()
    weighted_linear_cross_entropy(*expected, TARGETS, torch.ones(4))[0].backward()
    for wants in ((True, False), (False, True)):
        found = inputs(*wants)
        weighted_linear_cross_entropy(*found, TARGETS, torch.ones(4))[0].backward()
        for x, reference, wanted in zip(found, expected, wants, strict=True):
            assert (x.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(x.grad, reference.grad)


def test_without_gradient_none_is_formed(monkeypatch):
    made: list[object] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **kwargs: (made.append(x), zeros_like(x, **kwargs))[1])
    expected, _ = weighted_linear_cross_entropy(*inputs(False, False), TARGETS, torch.ones(4))
    assert not expected.requires_grad
    with torch.no_grad():
        loss, losses = weighted_linear_cross_entropy(*inputs(), TARGETS, torch.ones(4))
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert not losses.requires_grad
    assert not made  # no buffer for a gradient, of which the unembedding's is the largest tensor of all


def test_neither_weights_nor_scales_nor_losses_of_rows_carry_gradient():
    weights, scales = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    loss, losses = weighted_linear_cross_entropy(*inputs(), TARGETS, weights, scales_N=scales)
    assert not losses.requires_grad
    loss.backward()
    assert weights.grad is None
    assert scales.grad is None
    alone, _ = weighted_linear_cross_entropy(*inputs(False, False), TARGETS, weights, scales_N=scales)
    assert not alone.requires_grad


def test_gradients_accumulate_over_calls():
    hidden, weight = inputs()
    for _ in range(2):
        weighted_linear_cross_entropy(hidden, weight, TARGETS, torch.ones(4))[0].backward()
    once = inputs()
    weighted_linear_cross_entropy(*once, TARGETS, torch.ones(4))[0].backward()
    for x, reference in zip((hidden, weight), once, strict=True):
        assert x.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(x.grad, 2 * reference.grad)


def test_a_second_backward_says_what_to_do():
    loss, _ = weighted_linear_cross_entropy(*inputs(), TARGETS, torch.ones(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward was called twice .* Run forward again"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    hidden, weight = inputs()
    loss, _ = weighted_linear_cross_entropy(hidden, weight, TARGETS, torch.ones(4))
    upstream = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_unembedding_that_is_not_gathered_is_a_clear_error():
    """ZeRO-3 leaves an empty tensor in place of a parameter that is not gathered."""
    for empty in (torch.zeros(0), torch.zeros(0, 5)):
        with pytest.raises(RuntimeError, match=r"no elements: under ZeRO-3 it is gathered only inside"):
            weighted_linear_cross_entropy(inputs()[0], empty, TARGETS, torch.ones(4))
        with pytest.raises(RuntimeError, match=r"no elements"):
            reference_cross_entropy(inputs()[0], empty, TARGETS)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight = inputs()
    with pytest.raises(ValueError, match=r"hidden states \[4, 5\] and unembedding \[7, 4\]"):
        weighted_linear_cross_entropy(hidden, weight[:, :4], TARGETS, torch.ones(4))
    with pytest.raises(ValueError, match=r"hidden states \[2, 2, 5\]"):
        reference_cross_entropy(hidden.view(2, 2, 5), weight, TARGETS)
    with pytest.raises(ValueError, match=r"must have shape \[4\], not \[3\]"):
        weighted_linear_cross_entropy(hidden, weight, TARGETS, torch.ones(3))
    with pytest.raises(ValueError, match=r"must have shape \[4\], not \[4, 1\]"):
        weighted_linear_cross_entropy(hidden, weight, TARGETS[:, None], torch.ones(4))
    with pytest.raises(ValueError, match=r"must have shape \[4\], not \[1\]"):
        weighted_linear_cross_entropy(hidden, weight, TARGETS, torch.ones(4), scales_N=torch.ones(1))
    with pytest.raises(ValueError, match=r"must have shape \[4\], not \[5\]"):
        reference_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64))


def test_reference_cross_entropy_by_hand():
    log3 = torch.tensor(3.0).log()
    weight = torch.stack([0 * log3, log3])[:, None]
    found = reference_cross_entropy(torch.ones(3, 1), weight, torch.tensor([1, 0, -100]))
    torch.testing.assert_close(found, torch.tensor([4 / 3, 4, 1]).log())
    assert found.dtype == torch.float32
    low = reference_cross_entropy(torch.ones(3, 1).bfloat16(), weight.bfloat16(), torch.tensor([1, 0, -100]))
    assert low.dtype == torch.float32


def test_inputs_are_left_as_they_are():
    """Logits are overwritten in place; with a plain identity for an unembedding nothing else may be."""
    hidden, weight = inputs()
    before = hidden.detach().clone(), weight.detach().clone(), TARGETS.clone()
    weighted_linear_cross_entropy(hidden, weight, TARGETS, torch.ones(4))[0].backward()
    reference_cross_entropy(hidden, weight, TARGETS)
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(TARGETS, before[2])


PEAK_MEMORY = """
import re, sys
import torch
from wmtp_kernels import reference_cross_entropy, weighted_linear_cross_entropy

torch.set_num_threads(2)
rows, dim, vocabulary = int(sys.argv[1]), 16, 32_000

def peak_mib():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) / 1024

def run(rows):
    hidden = torch.randn(rows, dim).requires_grad_()
    targets = torch.arange(rows) % vocabulary
    reference_cross_entropy(hidden, weight, targets)
    weighted_linear_cross_entropy(hidden, weight, targets, torch.ones(rows))[0].backward()

weight = torch.randn(vocabulary, dim).requires_grad_()
run(16)
before = peak_mib()
run(rows)
print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_logits():
    rows = 2048
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY, str(rows)], capture_output=True, text=True, check=True)
    logits_mib = rows * 32_000 * 4 / 2**20
    assert logits_mib == 250
    assert float(done.stdout) < logits_mib / 2
