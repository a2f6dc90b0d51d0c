"""Completions by models of other architectures: transformers' own loop and caches, our choice of tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from wmtp_ds.decoding.generate import Completion, Limits
from wmtp_ds.decoding.sampling import RowRandom, Sampling, choose

# Whose recurrent state takes in padding, too, whatever the mask says, or mixes the rows of a batch.
_ONE_AT_A_TIME = frozenset(("recurrent_gemma", "rwkv"))


class _Draw(LogitsProcessor):
    """Leaves of each row's tokens the one that is drawn: what transformers then finds to be the likeliest."""

    def __init__(self, sampling: Sampling, streams: Sequence[int]):
        self._sampling, self._random = sampling, RowRandom(sampling.seed, streams)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self._random.draw(1, scores.device).squeeze(1)
        drawn_B = choose(self._sampling.probabilities(scores), uniform_B)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B[:, None], 0.0)


class _IsDone(StoppingCriteria):
    """Ends rows that have enough."""

    def __init__(self, is_done: Callable[[Sequence[int]], bool], prompt: int):
        self._is_done, self._prompt = is_done, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        done = [self._is_done(row) for row in input_ids[:, self._prompt :].tolist()]
        return torch.tensor(done, device=input_ids.device)


def generate_by_transformers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    streams: Sequence[int] | None = None,
    batch_size: int = 16,
    on_done: Callable[[int, Completion], None] = lambda number, completion: None,
) -> list[Completion]:
    """Complete prompts; see `wmtp_ds.decoding.generate`, which this is for next-token models of any kind.

    Raises:
        ValueError: a prompt is empty.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must have a token")
    sampling = sampling or Sampling()
    streams = range(len(prompts)) if streams is None else streams
    completions = [Completion() for _ in prompts]
    if model.config.model_type in _ONE_AT_A_TIME:
        batch_size = 1
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        found = _batch(model, [prompts[i] for i in chosen], limits, sampling, [streams[i] for i in chosen])
        for number, completion in zip(chosen, found, strict=True):
            completions[number] = completion
            on_done(number, completion)
    return completions


def _batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Limits, sampling: Sampling, streams: Sequence[int]
) -> list[Completion]:
    longest, pad = max(map(len, prompts)), min(limits.end_ids, default=0)
    # On the left, so that all rows go on at the same place.
    ids_BS = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=limits.max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(limits.end_ids) or None,
    )
    draw = [] if sampling.is_greedy else [_Draw(sampling, streams)]
    stop = [] if limits.is_done is None else [_IsDone(limits.is_done, longest)]
    with torch.inference_mode():
        out_BS = model.generate(  # type: ignore[operator]
            ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(draw),
            stopping_criteria=StoppingCriteriaList(stop),
        )
    return [_completion(row, limits) for row in out_BS[:, longest:].tolist()]


def _completion(tokens: Sequence[int], limits: Limits) -> Completion:
    """A row without what fills it up after its end."""
    found = Completion()
    for token in tokens:
        found.ended = token in limits.end_ids
        if found.ended:
            break
        found.tokens.append(token)
        if limits.is_done is not None and limits.is_done(found.tokens):
            break
    found.passes = len(found.tokens) + found.ended - 1
    return found
