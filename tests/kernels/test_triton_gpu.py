"""What can be seen on a GPU alone: offsets beyond 2^31, memory, waiting, other devices and streams.

``make gpu-test`` runs this and every other test's GPU arm, and compute-sanitizer over those marked here as short.
"""

import pytest
import torch
from kernel_cases import (
    IGNORED,
    Arm,
    assert_as_exact_as_plain,
    decide,
    exact,
    peaked,
    plain,
    relative_largest,
    targets_of,
)

from wmtp_kernels import (
    TDWeights,
    reference_cross_entropy,
    rho1_linear_cross_entropy,
    rows_triton,
    td_weighted_linear_cross_entropy,
    weighted_linear_cross_entropy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("arm", ["cuda"], indirect=True),
]

GB = 10**9


def needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / GB:.1f} are free")


@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_offsets_beyond_2_to_the_31(arm, vocabulary):
    """One chunk of more than 2^31 logits: the rows at its end are as right as those at its beginning."""
    needs_memory(16)
    rows = 2**31 // vocabulary + 300
    logits = arm.rows.workspace(rows, vocabulary, torch.bfloat16, arm.device)
    few = 200
    case = peaked(arm, few, 64, vocabulary, torch.bfloat16, kept=1.0)
    both = torch.mm(case.hidden, case.weight.T)
    logits[:few], logits[-few:] = both, both
    logits[few:-few] = 0
    targets = torch.full((rows,), IGNORED, device=arm.device)
    targets[:few] = targets[-few:] = case.targets
    weights = torch.zeros(rows, device=arm.device)
    weights[:few] = weights[-few:] = case.weights
    losses, sums = arm.rows.cross_entropy(logits, targets)
    truth = both.double().logsumexp(-1) - both.double().gather(-1, case.targets[:, None]).squeeze(-1)
    assert relative_largest(losses[-few:], truth) < 1e-5
    # Selected rows may come from beyond 2^31, too.
    selected = logits[:few].clone()
    again = arm.rows.workspace(rows, vocabulary, torch.bfloat16, arm.device)
    again[-few:] = both
    sources = torch.arange(rows - few, rows, device=arm.device)
    arm.rows.selected_(again, sources, case.targets, case.weights, sums[-few:])
    selected = again[:few].clone()
    del again
    again_losses = arm.rows.weighted_(logits, targets, weights)
    assert torch.equal(again_losses[-few:], again_losses[:few])
    assert relative_largest(again_losses[-few:], truth) < 1e-5
    assert torch.equal(logits[-few:], logits[:few])
    assert not logits[few : few + 1000].any()
    onehot = torch.nn.functional.one_hot(case.targets, vocabulary)
    gradient = case.weights[:, None].double() * (both.double().softmax(-1) - onehot)
    for found in (logits[-few:], selected):
        assert (found.double() - gradient).abs().max() <= 2.0**-8 * gradient.abs().max()


def test_a_vocabulary_of_256000_in_chunks_beyond_2_to_the_31(arm, monkeypatch):
    needs_memory(24)
    monkeypatch.setattr(rows_triton, "_CHUNK_BYTES", 2**34)
    case = peaked(arm, 2**31 // 256_000 + 700, 512, 256_000, torch.bfloat16, kept=1.0)
    hidden, weight = case.leaves()
    loss, losses = weighted_linear_cross_entropy(hidden, weight, case.targets, case.weights, scales_N=case.scales)
    loss.backward()
    torch.cuda.empty_cache()
    few = slice(-512, None)
    truth = exact(case._replace(hidden=case.hidden[few], targets=case.targets[few], weights=case.weights[few],
                                scales=case.scales[few]))  # fmt: skip
    assert relative_largest(losses[few], truth[1]) < 1e-4
    assert relative_largest(hidden.grad[few], truth[2]) < 2e-2


@pytest.mark.parametrize("kind", ["td", "gae", "topk", "two passes", "softmax", "weighted", "reference"])
@pytest.mark.parametrize("counted", [False, True])
def test_nothing_waits_for_the_device(arm, kind, counted, monkeypatch):
    """torch raises where a host waits; before that the kernels are compiled, which may."""
    heads, batch, length, dim, vocabulary = 4, 4, 256, 256, 4096
    places = decide(arm, batch, length)
    hidden = torch.randn(heads, batch, length, dim, device=arm.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, dim, device=arm.device, dtype=torch.bfloat16, requires_grad=True)
    drawn = torch.randint(vocabulary, (heads, batch, length), device=arm.device)
    targets = targets_of(arm, places.decisions, heads, drawn)
    reference = torch.rand(targets.shape, device=arm.device)
    counts = (targets != IGNORED).sum(-1).cpu() if counted else None
    td = TDWeights(*places, td_lambda=0.9 if kind == "gae" else 0.0)
    monkeypatch.setattr(rows_triton, "chunk_rows", lambda *_: 512 if kind == "two passes" else 2048)
    rows = hidden.view(-1, dim), weight, targets.view(-1)
    count = None if counts is None else int(counts.sum())

    def step() -> None:
        if kind in ("td", "gae"):
            loss = td_weighted_linear_cross_entropy(hidden, weight, targets, td, counts_nB=counts).loss
        elif kind == "weighted":
            loss, _ = weighted_linear_cross_entropy(*rows, reference.view(-1), count=count)
        elif kind == "reference":
            reference_cross_entropy(*rows, count=count)
            return
        else:
            how = {"weighting": "softmax"} if kind == "softmax" else {"k_percent": 0.6}
            loss, *_ = rho1_linear_cross_entropy(hidden, weight, targets, reference, counts_nB=counts, **how)
        loss.backward()

    torch.use_deterministic_algorithms(False)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_beside_inputs_and_gradients(arm):
    """4 heads of 8192 positions, D 4096, V 32000: one chunk of logits and the unembedding's gradient in float32."""
    needs_memory(8)
    torch.use_deterministic_algorithms(False)
    heads, batch, length, dim, vocabulary = 4, 4, 2048, 4096, 32_000
    places = decide(arm, batch, length)
    hidden = torch.randn(heads, batch, length, dim, device=arm.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, dim, device=arm.device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (heads, batch, length), device=arm.device)
    td = TDWeights(*places)
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        td_weighted_linear_cross_entropy(hidden, weight, targets, td).loss.backward()
    gradients = hidden.nbytes + weight.nbytes
    transient = torch.cuda.max_memory_allocated() - before - gradients
    print(f"transient memory: {transient / GB:.3f} GB")
    # A chunk, the float32 sum of the unembedding's gradient, scaled hidden states and what belongs to rows.
    assert transient < rows_triton._CHUNK_BYTES + 4 * vocabulary * dim + 3 * 8192 * dim * 2


def test_another_stream(arm):
    case = peaked(arm, 2000, 256, 32_000, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        hidden, weight = case.leaves()
        loss, losses = weighted_linear_cross_entropy(hidden, weight, case.targets, case.weights, scales_N=case.scales)
        loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    found = loss.detach(), losses, hidden.grad, weight.grad
    assert_as_exact_as_plain(found, plain(case), exact(case), 0.0)


def test_a_device_that_is_not_the_current_one(arm):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    second = Arm("triton", torch.device("cuda:1"))
    case = peaked(second, 500, 256, 4096, torch.bfloat16)
    hidden, weight = case.leaves()
    loss, losses = weighted_linear_cross_entropy(hidden, weight, case.targets, case.weights, scales_N=case.scales)
    loss.backward()
    assert torch.cuda.current_device() == 0
    assert_as_exact_as_plain((loss.detach(), losses, hidden.grad, weight.grad), plain(case), exact(case), 0.0)


def test_triton_is_chosen_and_compiles(arm, monkeypatch):
    from wmtp_kernels import backend

    monkeypatch.delenv("WMTP_KERNELS")
    assert backend(torch.device("cuda")) == "triton"
    assert type(rows_triton._weighted_kernel).__name__ == "JITFunction"


@pytest.mark.parametrize("vocabulary", [33, 4096, 32_001, 50_257])
def test_short(arm, vocabulary):
    """Every kernel once, at sizes that compute-sanitizer gets through; odd ones, where a wrong mask would show."""
    torch.use_deterministic_algorithms(False)  # what is not written must look so to the sanitizer, too
    heads, batch, length, dim = 2, 3, 13, 40
    places = decide(arm, batch, length)
    generator = arm.generator(0)
    hidden = torch.randn(heads, batch, length, dim, generator=generator, device=arm.device).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator, device=arm.device).bfloat16().requires_grad_()
    drawn = torch.randint(vocabulary, (heads, batch, length), generator=generator, device=arm.device)
    targets = targets_of(arm, places.decisions, heads, drawn)
    reference = torch.rand(targets.shape, generator=generator, device=arm.device)
    rows = hidden.flatten(0, 2), weight, targets.flatten()
    for counts in (None, (targets != IGNORED).sum(-1).cpu()):
        for td_lambda in (0.0, 0.9):
            td = TDWeights(*places, td_lambda=td_lambda)
            td_weighted_linear_cross_entropy(hidden, weight, targets, td, counts_nB=counts).loss.backward()
        for options in ({"k_percent": 0.5}, {"weighting": "softmax"}):
            loss, *_ = rho1_linear_cross_entropy(hidden, weight, targets, reference, counts_nB=counts, **options)
            loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_triton, "chunk_rows", lambda *_: 16)
        rho1_linear_cross_entropy(hidden, weight, targets, reference, k_percent=0.5)[0].backward()
        weighted_linear_cross_entropy(*rows, reference.flatten())[0].backward()
    reference_cross_entropy(*rows)
    assert hidden.grad is not None
    assert not hidden.grad.isnan().any()
    assert not hidden.grad[targets == IGNORED].any()
