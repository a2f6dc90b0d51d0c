"""The reference model's losses against a plain Llama and torch's own cross-entropy."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from wmtp_ds.data.batches import Batch
from wmtp_ds.models.loading import load_policy
from wmtp_ds.models.reference import ReferenceModel


def batch_of(ids: torch.Tensor, supervised: torch.Tensor, segments: torch.Tensor) -> Batch:
    decisions = torch.zeros_like(supervised)
    decisions[:, :-1] = supervised[:, 1:]
    return Batch(
        ids,
        supervised,
        decisions,
        torch.ones(len(ids)),
        segments.int(),
        torch.arange(len(ids)),
        torch.ones(len(ids)) > 0,
    )


def random_batch(seed: int, *, packed: bool) -> Batch:
    """Prompts of three tokens, solutions of several lengths, padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (3, 12), generator=generator)
    segments = torch.ones(3, 12, dtype=torch.int64)
    supervised = torch.zeros(3, 12, dtype=torch.bool)
    for row, end in enumerate((12, 9, 5)):
        supervised[row, 3:end] = True
        segments[row, end:] = 0
        ids[row, end:] = 0
    if packed:  # a second solution in the first sequence, supervised from its very first token
        segments[0, 7:] = 2
    return batch_of(ids, supervised, segments)


@pytest.fixture(scope="module")
def plain(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder).eval()


@pytest.fixture(scope="module")
def reference(policy_folder):
    return ReferenceModel(load_policy(policy_folder, n_future_tokens=1)).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_against_a_plain_llama(plain, reference, seed, packed):
    batch = random_batch(seed, packed=packed)
    losses = reference(batch)
    assert (losses.shape, losses.dtype) == ((3, 12), torch.float32)
    logits = plain(batch.input_ids).logits
    expected = torch.zeros(3, 12)
    for row in range(3):
        for j in range(1, 12):
            if batch.supervised[row, j] and batch.segment_ids[row, j] == batch.segment_ids[row, j - 1]:
                expected[row, j] = F.cross_entropy(logits[row, j - 1], batch.input_ids[row, j])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (losses[batch.supervised] > 0).sum() == batch.supervised.sum() - int(packed)


@torch.no_grad()
def test_only_supervised_tokens_have_a_loss(reference):
    batch = random_batch(0, packed=False)
    losses = reference(batch)
    assert torch.equal(losses != 0, batch.supervised)
    nothing = batch_of(batch.input_ids, torch.zeros_like(batch.supervised), batch.segment_ids)
    assert torch.equal(reference(nothing), torch.zeros(3, 12))


@torch.no_grad()
def test_the_first_token_and_the_first_of_a_segment_follow_nothing(reference):
    ids = torch.arange(3, 11)[None]
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    losses = reference(batch_of(ids, torch.ones(1, 8, dtype=torch.bool), segments))
    assert (losses[0] == 0).nonzero().flatten().tolist() == [0, 4]


@torch.no_grad()
def test_padding_does_not_change_losses(reference):
    batch = random_batch(1, packed=False)
    other = batch_of(batch.input_ids.masked_fill(batch.segment_ids == 0, 17), batch.supervised, batch.segment_ids)
    assert torch.equal(reference(batch), reference(other))


def test_a_reference_has_one_head(policy_folder):
    with pytest.raises(AssertionError, match="next token alone"):
        ReferenceModel(load_policy(policy_folder))
