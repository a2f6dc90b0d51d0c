"""Plain and self-speculative decoding of the same prompts, in turn: tokens a pass of the model, and time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from wmtp_kernel_benchmarks.measure import interleaved, ratios, spread

from wmtp_ds.decoding import Completion, Limits, generate
from wmtp_ds.models.mtp import MTPLlamaForCausalLM

_ARMS = {"plain": False, "self-speculative": True}


def measure_decoding(
    policy: MTPLlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    batch_sizes: Sequence[int],
    rounds: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Decode prompts greedily both ways, ``rounds`` times in a random order.

    Args:
        policy: in evaluation mode, with extra heads; see `wmtp_ds.decoding.generate`.
        prompts: token ids of each.
        limits: when a completion is over.
        batch_sizes: completions at a time; each is measured.
        rounds: readings of each way.
        seed: of the order.
        progress: told after each round.

    Returns:
        For each batch size: ``tokens`` (end tokens included); ``seconds`` of each way (median, least, greatest);
        ``speed_up``, plain over self-speculative seconds of the same round; ``passes`` of the model behind the prompts,
        and ``tokens_per_pass`` of each row; ``different``, the completions that are not the same token for token.
    """
    device = policy.lm_head.weight.device
    found = []
    for batch_size in batch_sizes:
        last: dict[str, list[Completion]] = {}

        def decode(arm: str, size: int = batch_size, last: dict[str, list[Completion]] = last) -> None:
            last[arm] = generate(policy, prompts, limits, speculative=_ARMS[arm], batch_size=size)

        for arm in _ARMS:  # what is done for the first time
            decode(arm)
        readings = interleaved(
            {arm: lambda number, arm=arm: decode(arm) for arm in _ARMS},
            device,
            rounds,
            seed,
            progress=lambda line, size=batch_size: progress(f"batch size {size}: {line}"),
        )
        plain, speculative = last["plain"], last["self-speculative"]
        found.append(
            {
                "batch_size": batch_size,
                "tokens": sum(len(completion.tokens) + completion.ended for completion in plain),
                "seconds": {arm: asdict(spread([one.wall for one in own])) for arm, own in readings.items()},
                "speed_up": asdict(spread(ratios(readings["plain"], readings["self-speculative"], "wall"))),
                "passes": {arm: sum(completion.passes for completion in last[arm]) for arm in _ARMS},
                "tokens_per_pass": {arm: _tokens_per_pass(last[arm]) for arm in _ARMS},
                "different": sum(a.tokens != b.tokens for a, b in zip(plain, speculative, strict=True)),
            }
        )
    return found


def _tokens_per_pass(completions: Sequence[Completion]) -> float | None:
    """Of all rows; the first token of each comes with its prompt. None where there was no other."""
    passes = sum(completion.passes for completion in completions)
    yielded = sum(len(completion.tokens) + completion.ended - 1 for completion in completions)
    return yielded / passes if passes else None


def table(figures: dict[str, Any]) -> str:
    """What ``wmtp-ds bench decode`` prints."""
    lines = [
        f"{figures['model']}: {figures['heads']} heads, {figures['dtype']} on {figures['device']}, "
        f"{figures['prompts']} prompts of {figures['problems']}, greedy",
        f"{'batch':>5}  {'plain':>12}  {'self-speculative':>16}  {'speed-up [least, most]':>24}  "
        f"{'tokens a pass':>13}  {'different':>9}",
    ]
    for found in figures["batch_sizes"]:
        rates = {arm: found["tokens"] / own["median"] for arm, own in found["seconds"].items()}
        drafted = found["tokens_per_pass"]["self-speculative"]
        gain = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**found["speed_up"])
        lines.append(
            f"{found['batch_size']:>5}  {rates['plain']:>6,.0f} tok/s  {rates['self-speculative']:>10,.0f} tok/s  "
            f"{gain:>24}  {'-' if drafted is None else f'{drafted:.3f}':>13}  {found['different']:>9}"
        )
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """For the table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
