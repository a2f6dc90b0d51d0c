"""How well a model predicts solutions that are right: each head, given all tokens before."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wmtp_ds.evaluate.model import Model
from wmtp_ds.models.mtp import MTPLlamaForCausalLM


def predict(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 4,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Accuracy and perplexity of each head on the tokens of solutions.

    Args:
        model: in a single process; one of another architecture has one head.
        pairs: token ids of a prompt (BOS first, where there is one) and of its solution (EOS last).
        batch_size: sequences at a time.
        on_done: called with how many pairs are done since the last call.

    Returns:
        For each head k that has a target: ``token_accuracy_head_k`` (share of targets that were the likeliest token),
        ``loss_head_k`` (mean cross-entropy in nats) and ``perplexity_head_k``, its exponential; and ``tokens``, the
        targets of head 1. Head k at position i predicts token i + k; prompts are no targets.
    """
    n = model.n_future_tokens if isinstance(model, MTPLlamaForCausalLM) else 1
    device = model.device
    losses_n = torch.zeros(n, dtype=torch.float64)
    hits_n, counts_n = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]) - len(pairs[place][1]))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chosen = [pairs[place] for place in order[begin : begin + batch_size]]
            input_ids_BS, is_target_BS = _padded(chosen)
            states_nBSD, unembed = _states(model, input_ids_BS.to(device))
            for head in range(n):
                # One head's logits at a time, and of targets alone: all at once would be n times the memory.
                targets_BS, is_target = input_ids_BS[:, head + 1 :], is_target_BS[:, head + 1 :]
                states_ND = states_nBSD[head][:, : targets_BS.shape[1]][is_target.to(device)]
                targets_N = targets_BS[is_target].to(device)
                logits_NV = unembed(states_ND).float()
                losses_n[head] += _cross_entropy(logits_NV, targets_N)
                hits_n[head] += (logits_NV.argmax(-1) == targets_N).sum().cpu()
                counts_n[head] += len(targets_N)
            on_done(len(chosen))
    figures = {"tokens": float(counts_n[0])}
    for head in range(n):
        if count := int(counts_n[head]):
            loss = float(losses_n[head]) / count
            figures[f"loss_head_{head + 1}"] = loss
            figures[f"perplexity_head_{head + 1}"] = math.exp(min(loss, 700.0))
            figures[f"token_accuracy_head_{head + 1}"] = int(hits_n[head]) / count
    return figures


def _states(model: Model, input_ids_BS: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What each head's logits are made of, ``[n, B, S, ·]``, and what makes them."""
    if isinstance(model, MTPLlamaForCausalLM):
        return model.head_states(model.trunk(input_ids_BS)), model.lm_head
    # The logits themselves: some architectures scale or cap them behind the unembedding.
    return model(input_ids_BS, use_cache=False).logits[None], lambda logits: logits


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").double().sum().cpu()


def _padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, S]``, padded on the right, where no token sees it; and which are of the solution."""
    longest = max(len(prompt) + len(solution) for prompt, solution in pairs)
    input_ids_BS = torch.zeros(len(pairs), longest, dtype=torch.int64)
    is_target_BS = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, solution) in enumerate(pairs):
        end = len(prompt) + len(solution)
        input_ids_BS[row, :end] = torch.tensor([*prompt, *solution])
        is_target_BS[row, len(prompt) : end] = True
    return input_ids_BS, is_target_BS
