"""Completions of prompts, in batches, with a cache of keys and values; plainly or self-speculatively.

Self-speculative decoding (Gloeckle et al. 2024, section 4.1; Stern et al. 2018, "Blockwise Parallel Decoding"): heads
2..n draft the tokens behind head 1's; the next pass reads them all, and head 1 accepts those that it would have chosen.
A pass then yields 1 to n tokens, and they are head 1's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wmtp_ds.decoding.cache import SlotCache
from wmtp_ds.decoding.sampling import RowRandom, Sampling, accept, choose
from wmtp_ds.models.mtp import MTPLlamaForCausalLM


@dataclass
class Completion:
    """What was generated for a prompt.

    Attributes:
        tokens: without the prompt and the end token.
        ended: whether the model ended it; otherwise it was cut off.
        passes: of the model, behind the one that read the prompt; each one has yielded at least one token.
    """

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    passes: int = 0


@dataclass(frozen=True)
class Limits:
    """When a completion is over.

    Attributes:
        max_new_tokens: so many tokens at most, the end token included.
        end_ids: tokens that end it.
        is_done: says of the tokens so far whether they are enough; they are cut by whoever asked.
    """

    max_new_tokens: int
    end_ids: frozenset[int]
    is_done: Callable[[Sequence[int]], bool] | None = None


def generate(
    policy: MTPLlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    streams: Sequence[int] | None = None,
    speculative: bool = False,
    batch_size: int = 16,
    on_done: Callable[[int, Completion], None] = lambda number, completion: None,
) -> list[Completion]:
    """Complete prompts.

    Args:
        policy: in a single process, in evaluation mode, with an attention implementation that takes a mask.
        prompts: token ids of each, at least one token long.
        limits: when a completion is over.
        sampling: how tokens are chosen; greedily by default.
        streams: a number for each prompt: of its random numbers. By default its place.
        speculative: draft with the extra heads. Greedily the same comes out as without; at random, something of the
            same distribution.
        batch_size: completions at a time.
        on_done: called with a prompt's place and its completion as soon as it is over.

    Returns:
        A completion for each prompt, in their order. With the same seed and stream a prompt gets the same
        completion whatever it is batched with, but for rounding.

    Raises:
        ValueError: it is to be speculative, and the policy has no extra heads; or a prompt is empty.
    """
    if speculative and policy.n_future_tokens < 2:
        raise ValueError("self-speculative decoding drafts with the extra heads, and the model has none")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must have a token")
    sampling = sampling or Sampling()
    streams = range(len(prompts)) if streams is None else streams
    completions = [Completion() for _ in prompts]
    # Alike lengths together: a batch lasts as long as its longest.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = _Batch(policy, [prompts[i] for i in chosen], limits, sampling, [streams[i] for i in chosen],
                           policy.n_future_tokens if speculative else 1)  # fmt: skip
            batch.read_prompts([prompts[i] for i in chosen])
            while batch.rows:
                for place, completion in batch.harvest():
                    completions[chosen[place]] = completion
                    on_done(chosen[place], completion)
                if batch.rows:
                    batch.step()
    return completions


class _Batch:
    """Rows that are completed together.

    Between steps each row has read all of its tokens but the last, which is in ``_last_B``; ``_drafts_Bm`` are the
    heads' guesses at what follows it.
    """

    def __init__(
        self,
        policy: MTPLlamaForCausalLM,
        prompts: Sequence[Sequence[int]],
        limits: Limits,
        sampling: Sampling,
        streams: Sequence[int],
        heads: int,
    ):
        self._policy, self._limits, self._sampling, self._heads = policy, limits, sampling, heads
        self._device = policy.lm_head.weight.device
        self._random = RowRandom(sampling.seed, streams)
        capacity = max(map(len, prompts)) + limits.max_new_tokens + heads
        self._cache = SlotCache(len(prompts), capacity, self._device)
        self._completions = [Completion() for _ in prompts]
        self.rows = list(range(len(prompts)))  # the places of those that are not over
        self._last_B: Tensor
        self._drafts_Bm: Tensor
        self._q_BmV: Tensor | None  # what the drafts were drawn with, where it is random

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """The pass over the prompts, and what follows each."""
        lengths = [len(prompt) for prompt in prompts]
        tokens_BS = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        states = self._read(tokens_BS.to(self._device))
        self._cache.advance(lengths)
        last_B = torch.tensor(lengths, device=self._device) - 1
        logits_BnV = self._logits_at(states, last_B)
        chosen_Bn, probabilities_BnV = self._choose(logits_BnV)
        self._drafts_Bm = chosen_Bn[:, 1:]
        self._q_BmV = None if probabilities_BnV is None else probabilities_BnV[:, 1:]
        self._take(chosen_Bn[:, :1], [1] * len(prompts))

    def step(self) -> None:
        """One pass over each row's last token and its drafts."""
        read_Bn = torch.cat([self._last_B[:, None], self._drafts_Bm], 1)
        states = self._read(read_Bn)
        accepted_B, next_B = self._verify(self._policy.lm_head(states[0]))
        for row in self.rows:
            self._completions[row].passes += 1
        accepted = accepted_B.tolist()
        new_Bn = torch.cat([self._drafts_Bm, next_B[:, None]], 1)
        new_Bn.scatter_(1, accepted_B[:, None], next_B[:, None])
        self._cache.advance([number + 1 for number in accepted])
        if self._heads > 1:
            self._drafts_Bm, self._q_BmV = self._choose(self._logits_at(states[1:], accepted_B))
        self._take(new_Bn, [number + 1 for number in accepted])

    def harvest(self) -> list[tuple[int, Completion]]:
        """The rows that are over, with their places; they are part of the batch no longer."""
        over = [self._is_over(self._completions[row]) for row in self.rows]
        done = [(row, self._completions[row]) for row, is_over in zip(self.rows, over, strict=True) if is_over]
        if done:
            kept = [place for place, is_over in enumerate(over) if not is_over]
            self.rows = [self.rows[place] for place in kept]
            if kept:
                self._cache.keep(kept)
                self._random.keep(kept)
                chosen = torch.tensor(kept, device=self._device)
                self._last_B, self._drafts_Bm = self._last_B[chosen], self._drafts_Bm[chosen]
                self._q_BmV = None if self._q_BmV is None else self._q_BmV[chosen]
        return done

    def _is_over(self, completion: Completion) -> bool:
        limits = self._limits
        if completion.ended or len(completion.tokens) >= limits.max_new_tokens:
            return True
        return limits.is_done is not None and limits.is_done(completion.tokens)

    def _read(self, tokens_Bq: Tensor) -> Tensor:
        """What the unembedding reads, of each head, ``[n, B, q, D]``."""
        self._cache.expect(tokens_Bq.shape[1])
        return self._policy.head_states(self._policy.trunk(tokens_Bq, self._cache), self._cache, heads=self._heads)

    def _logits_at(self, states_nBqD: Tensor, place_B: Tensor) -> Tensor:
        """Each head's logits at one place of each row, ``[B, n, V]``."""
        rows_B = torch.arange(len(place_B), device=self._device)
        logits: Tensor = self._policy.lm_head(states_nBqD[:, rows_B, place_B].transpose(0, 1))
        return logits

    def _choose(self, logits_BnV: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token of each distribution, and the distributions themselves where they are random."""
        if self._sampling.is_greedy:
            return logits_BnV.argmax(-1), None
        probabilities_BnV = self._sampling.probabilities(logits_BnV)
        uniform_Bn = self._random.draw(logits_BnV.shape[1], self._device)
        return choose(probabilities_BnV, uniform_Bn), probabilities_BnV

    def _verify(self, logits_BnV: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts of each row head 1 accepts, and its token behind them."""
        if not self._sampling.is_greedy:
            probabilities_BnV = self._sampling.probabilities(logits_BnV)
            q_BmV = probabilities_BnV[:, :0] if self._q_BmV is None else self._q_BmV
            uniform_Bn = self._random.draw(logits_BnV.shape[1], self._device)
            return accept(self._drafts_Bm, q_BmV, probabilities_BnV, uniform_Bn)
        own_Bn = logits_BnV.argmax(-1)
        accepted_B = (self._drafts_Bm == own_Bn[:, :-1]).long().cumprod(1).sum(1)
        return accepted_B, own_Bn.gather(1, accepted_B[:, None]).squeeze(1)

    def _take(self, tokens_Bn: Tensor, counts: Sequence[int]) -> None:
        """Add the first tokens of each row to its completion, as far as it goes."""
        for row, tokens, count in zip(self.rows, tokens_Bn.tolist(), counts, strict=True):
            completion = self._completions[row]
            for token in tokens[:count]:
                if self._is_over(completion):
                    break
                if token in self._limits.end_ids:
                    completion.ended = True
                else:
                    completion.tokens.append(token)
        last_B = torch.tensor(counts, device=self._device) - 1
        self._last_B = tokens_Bn.gather(1, last_B[:, None]).squeeze(1)
