"""Training without DeepSpeed, kernels or batches: one sequence at a time, whole logits, formulas as they are defined.

The independent reading of the definitions that the toolkit's losses are compared with.
"""

import math
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor
from torch.nn import functional as F


def tokenize(row: dict, tokenizer) -> tuple[Tensor, int]:
    """Token ids of a row and the number of them that come before the solution."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{row['instruction']}\n\n### Response:"
    )
    before = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    solution = tokenizer(row["output"], add_special_tokens=False).input_ids
    return torch.tensor([*before, *solution, tokenizer.eos_token_id]), len(before)


def head_losses(policy, ids: Tensor, start: int, hidden: Tensor) -> list[dict[int, Tensor]]:
    """For each head k: target position -> cross-entropy, for supervised targets."""
    losses = []
    for k, states in enumerate(policy.head_states(hidden)[:, 0], start=1):
        logits = states @ policy.lm_head.weight.T
        losses.append({i + k: F.cross_entropy(logits[i], ids[i + k]) for i in range(len(ids) - k) if i + k >= start})
    return losses


def td_errors(values: Tensor, start: int, reward: float, gamma: float) -> dict[int, Tensor]:
    """Position of each decision -> TD error."""
    last = len(values) - 2
    return {i: (reward if i == last else gamma * values[i + 1]) - values[i] for i in range(start - 1, last + 1)}


def gae(deltas: dict[int, Tensor], decay: float) -> dict[int, Tensor]:
    """Generalised advantages, from the last decision to the first."""
    advantages, following = {}, 0.0
    for i in sorted(deltas, reverse=True):
        following = deltas[i] + decay * following
        advantages[i] = following
    return advantages


def weights_of(advantages: list[dict[int, Tensor]], cfg) -> list[dict[int, float]]:
    """TD weights of every decision of the global batch, normalised as the config asks."""
    flat = [float(a) for sequence in advantages for a in sequence.values()]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))

    def raw(a: Tensor) -> float:
        z = (float(a) - mean) / deviation if cfg.td_normalize == "zscore" else float(a)
        return math.exp(z / cfg.beta)

    scale = 1.0
    if cfg.weight_norm == "mean1":
        scale = sum(raw(a) for sequence in advantages for a in sequence.values()) / len(flat)
    return [
        {i: min(max(raw(a) / scale, cfg.weight_clip_min), cfg.weight_clip_max) for i, a in sequence.items()}
        for sequence in advantages
    ]


def value_loss(values: Tensor, start: int, reward: float, cfg) -> list[Tensor]:
    """Squared errors against the return, decision by decision."""
    assert cfg.value_target == "return"
    assert cfg.loss_type == "mse"
    last = len(values) - 2
    return [(values[i] - cfg.gamma ** (last - i) * reward) ** 2 for i in range(start - 1, last + 1)]


def weighted_mean(parts: list[list[dict[int, Tensor]]], weights) -> Tensor:
    """(1/n) Σ_k (1/M_k) Σ w·CE; ``weights(sequence, head, target)`` is None where M_k does not count."""
    n = len(parts[0])
    total = torch.zeros(())
    for k in range(n):
        terms = [(weights(s, k, j), loss) for s, sequence in enumerate(parts) for j, loss in sequence[k].items()]
        kept = [(w, loss) for w, loss in terms if w is not None]
        if kept:
            total = total + sum(w * loss for w, loss in kept) / len(kept)
    return total / n


def rho1_loss(policy, reference, sequences, groups: list[list[int]], cfg) -> Tensor:
    """Top-k by signed excess loss; ``groups`` lists the sequences that compete, per micro-batch."""
    parts, scores = [], []
    for ids, start, _ in sequences:
        parts.append(head_losses(policy, ids, start, policy.trunk(ids[None])))
        with torch.no_grad():
            logits = reference(ids[None]).logits[0]
        scores.append({j: float(F.cross_entropy(logits[j - 1], ids[j])) for j in range(start, len(ids))})
    chosen: set[tuple[int, int, int]] = set()
    for group in groups if cfg.selection_scope == "batch" else [[s] for s in range(len(sequences))]:
        for k in range(len(parts[0])):
            found = [(s, j, parts[s][k][j].item() - scores[s][j]) for s in group for j in parts[s][k]]
            count = int((Decimal(str(cfg.k_percent)) * len(found)).to_integral_value(ROUND_CEILING))
            for s, j, _ in sorted(found, key=lambda entry: (-entry[2], entry[0], entry[1]))[:count]:
                chosen.add((s, k, j))
    return weighted_mean(parts, lambda s, k, j: 1.0 if (s, k, j) in chosen else None)


def stage_loss(stage: str, policy, head, reference, sequences, groups, cfg) -> Tensor:
    """The loss of a global batch of (ids, start, reward)."""
    if stage == "rho1":
        return rho1_loss(policy, reference, sequences, groups, cfg)
    hidden = [policy.trunk(ids[None]) for ids, _, _ in sequences]
    if stage == "critic":
        errors = [
            e
            for h, (_, start, reward) in zip(hidden, sequences, strict=True)
            for e in value_loss(head(h.detach())[0, :, 0], start, reward, cfg)
        ]
        return sum(errors) / len(errors)
    parts = [head_losses(policy, ids, start, h) for h, (ids, start, _) in zip(hidden, sequences, strict=True)]
    if stage == "baseline":
        return weighted_mean(parts, lambda s, k, j: 1.0)
    values = [head(h)[0, :, 0] for h in hidden]
    advantages = [
        td_errors(v.detach(), start, reward, cfg.gamma) for v, (_, start, reward) in zip(values, sequences, strict=True)
    ]
    if cfg.td_lambda > 0:
        advantages = [gae(deltas, cfg.gamma * cfg.td_lambda) for deltas in advantages]
    weights = weights_of(advantages, cfg)
    errors = [
        e for v, (_, start, reward) in zip(values, sequences, strict=True) for e in value_loss(v, start, reward, cfg)
    ]
    # The decision that emits target j is position j − 1.
    policy_loss = weighted_mean(parts, lambda s, k, j: weights[s][j - 1])
    return policy_loss + cfg.value_coef * sum(errors) / len(errors)
