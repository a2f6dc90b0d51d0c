"""Does a model find right solutions likelier than wrong ones? The figure that weights on tokens should move first.

A wrong solution is a right one with an edit. Each held-out wrong solution is paired with the right one of its problem
that has most in common with it, and the two are compared from the first token on in which they differ.
"""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import corpora
import torch
from transformers import PreTrainedTokenizerBase

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.evaluate.model import find_model, load_model
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

_BATCH = 32


def preference(model: Path, file: Path, device: str) -> dict[str, float]:
    """Of head 1, over all pairs of a data file.

    Returns:
        ``share``: of the pairs whose right solution is likelier from the first difference on (ties count half);
        ``log odds``: the mean difference of those log-probabilities, in nats; ``pairs``: how many there are.
    """
    policy, tokenizer = load_model(find_model(model), device=torch.device(device))
    assert isinstance(policy, MTPLlamaForCausalLM)
    encoder = TextEncoder(tokenizer)
    rows = corpora.read_rows(file)
    sequences = [sequence(row, encoder) for row in rows]
    losses = _log_probabilities(policy, sequences)
    wins, odds = [], []
    for right, wrong in pairs(rows, [solution for _, solution in sequences]):
        first = first_difference(sequences[right][1], sequences[wrong][1])
        apart = math.fsum(losses[right][first:]) - math.fsum(losses[wrong][first:])
        odds.append(apart)
        wins.append(0.5 if apart == 0 else float(apart > 0))
    return {"share": sum(wins) / len(wins), "log odds": sum(odds) / len(odds), "pairs": len(odds)}


def pairs(rows: Sequence[dict[str, Any]], solutions: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Places of the nearest right solution and of a wrong one of the same problem, for each wrong one that has any."""
    right: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if row["is_correct"]:
            right.setdefault(row["problem_id"], []).append(place)
    found = []
    for wrong, row in enumerate(rows):
        if not row["is_correct"] and (others := right.get(row["problem_id"])):
            near = [_matcher(solutions[place], solutions[wrong]).ratio() for place in others]
            found.append((others[near.index(max(near))], wrong))
    return found


def edits(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[list[bool]]:
    """Of each token of each row's solution, its end token too: whether a wrong solution has it otherwise.

    That is: otherwise than the nearest right one of the same problem. Where only something is missing, it is the token
    after that.
    """
    encoder = TextEncoder(tokenizer)
    solutions = [sequence(row, encoder)[1] for row in rows]
    found = [[False] * len(solution) for solution in solutions]
    for right, wrong in pairs(rows, solutions):
        for kind, _, _, begin, end in _matcher(solutions[right], solutions[wrong]).get_opcodes():
            if kind != "equal":
                for place in range(begin, max(end, begin + 1)):
                    found[wrong][place] = True
    return found


def _matcher(a: Sequence[int], b: Sequence[int]) -> SequenceMatcher[int]:
    return SequenceMatcher(None, a, b, autojunk=False)


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """The place of the first token in which two sequences differ; the shorter one's length if it begins the other."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sequence(row: dict[str, Any], encoder: TextEncoder) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, BOS first, and of the solution, EOS last."""
    asked = Row(
        problem_id=row["problem_id"], instruction=row["instruction"], input=row["input"], output=row["output"],
        is_correct=row["is_correct"],
    )  # fmt: skip
    prompt, solution = encoder([get_template(corpora.TEMPLATE)(asked), row["output"]])
    return [encoder.bos_id, *prompt], [*solution, encoder.eos_id]


def _log_probabilities(
    policy: MTPLlamaForCausalLM, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """Head 1's log-probability of each token of each solution, in nats."""
    found: list[list[float]] = []
    with torch.inference_mode():
        for begin in range(0, len(sequences), _BATCH):
            chosen = sequences[begin : begin + _BATCH]
            longest = max(len(prompt) + len(solution) for prompt, solution in chosen)
            ids_BS = torch.zeros(len(chosen), longest, dtype=torch.int64)
            for row, (prompt, solution) in enumerate(chosen):
                ids_BS[row, : len(prompt) + len(solution)] = torch.tensor([*prompt, *solution])
            states_BSD = policy.head_states(policy.trunk(ids_BS.to(policy.device)), heads=1)[0]
            for row, (prompt, solution) in enumerate(chosen):
                places = slice(len(prompt) - 1, len(prompt) + len(solution) - 1)
                logits_LV = policy.lm_head(states_BSD[row, places]).double()
                targets_L = torch.tensor(solution, device=logits_LV.device)
                found.append(logits_LV.log_softmax(-1).gather(1, targets_L[:, None]).squeeze(1).tolist())
    return found
