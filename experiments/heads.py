"""One, two or four heads, at equal compute: what do more heads bring and cost?

Models of as many trunk blocks learn from the same correct solutions. A step of a model with more heads computes more,
so it takes fewer of them: multiply-adds of all blocks and unembeddings are counted, and steps times that is the same
for all arms. Decoding: `wmtp-ds bench decode`, greedy, tokens a pass of the model and the ratio of wall times against
plain decoding.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
from intervals import over_seeds
from matplotlib.axes import Axes
from runs import Run, do
from sizes import Size
from solving import solve_all

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.models.loading import read_llama_config

TITLE = "Heads at equal compute"
HEADS = (1, 2, 4)


def cost_per_token(folder: Path, supervised: float = 1.0) -> float:
    """Multiply-adds of a forward pass for each token: blocks and unembeddings, attention over the context left out.

    Args:
        folder: of the model.
        supervised: the share of tokens that are learned, and alone unembedded.
    """
    config = read_llama_config(folder)
    heads = getattr(config, "n_future_tokens", None) or 1
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    read_heads = config.num_key_value_heads or config.num_attention_heads
    attention = hidden * size * (2 * config.num_attention_heads + 2 * read_heads)
    block = attention + 3 * hidden * config.intermediate_size
    return (config.num_hidden_layers + heads - 1) * block + supervised * heads * hidden * config.vocab_size


def supervised_share(files: corpora.Files, folder: Path) -> float:
    """The share of right solutions' tokens, end tokens included, in their prompts and solutions together."""
    encoder, template = TextEncoder(corpora.tokenizer_of(folder)), get_template(corpora.TEMPLATE)
    learned = total = 0
    for row in corpora.read_rows(files.train):
        asked = Row(problem_id="", instruction=row["instruction"], input=row["input"], output="", is_correct=True)
        prompt, solution = encoder([template(asked), row["output"]])
        learned += len(solution) + 1
        total += len(prompt) + len(solution) + 2
    return learned / total


def study(size: Size, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train all arms, solve problems with each, and time both ways of decoding; figures of each, one a seed."""
    files = corpora.problems(size)
    problems = corpora.held_out(size, files)
    most = corpora.policy(size, files, seeds[0], max(HEADS))
    supervised = supervised_share(files, most)
    budget = size.heads_steps * cost_per_token(most, supervised)
    arms: dict[int, list[Run]] = {}
    for heads in HEADS:
        models = [corpora.policy(size, files, seed, heads) for seed in seeds]
        steps = round(budget / cost_per_token(models[0], supervised))
        arms[heads] = [
            Run(
                f"heads-{heads}-{seed}",
                size,
                "baseline",
                {
                    "training.max_steps": steps,
                    "training.eval_interval": steps,
                    "runtime.seed": seed,
                    "models.policy.path": model,
                }
                | files.settings(),
            )
            for seed, model in zip(seeds, models, strict=True)
        ]
    do([run for runs in arms.values() for run in runs], workers)
    return {
        "figures": {str(heads): _figures(runs, heads, problems, size) for heads, runs in arms.items()},
        "commands": {str(heads): runs[0].command for heads, runs in arms.items()},
    }


def _figures(runs: Sequence[Run], heads: int, problems: Path, size: Size) -> dict[str, Any]:
    summaries = [run.summary() for run in runs]
    figures: dict[str, Any] = {
        "steps": summaries[0]["steps"],
        "seconds": [summary["seconds"] for summary in summaries],
        "loss, head 1": [summary["val/loss_head_1"] for summary in summaries],
        "pass@1": [one["pass@1"] for one in solve_all([run.model for run in runs], problems, corpora.TEMPLATE)],
    }
    if heads > 1:
        timed = [_timed(run.model, problems, size) for run in runs]
        for name, read in (
            ("tokens a pass", lambda one: one["tokens_per_pass"]["self-speculative"]),
            ("speed-up", lambda one: one["speed_up"]["median"]),
            ("different", lambda one: one["different"]),
        ):
            figures[name] = {str(one["batch_size"]): [] for one in timed[0]}
            for found in timed:
                for one in found:
                    figures[name][str(one["batch_size"])].append(read(one))
    return figures


def _timed(model: Path, problems: Path, size: Size) -> list[dict[str, Any]]:
    """What ``wmtp-ds bench decode`` finds for each batch size."""
    program = str(Path(sys.executable).with_name("wmtp-ds"))
    options = ["--prompt", corpora.TEMPLATE, "--device", size.device, "--rounds", "5", "--limit", "16", "--json"]
    command = [program, "bench", "decode", str(model), "--problems", str(problems), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    found: list[dict[str, Any]] = json.loads(done.stdout)["batch_sizes"]
    return found


def table(results: dict[str, Any]) -> str:
    """Loss, pass@1, and the speed of self-speculative decoding."""
    figures = results["figures"]
    sizes = list(figures[str(max(HEADS))]["speed-up"])
    lines = [
        "| heads | steps | seconds | loss, head 1 | pass@1 | "
        + " | ".join(f"tokens a pass, batch {one} | speed-up, batch {one}" for one in sizes)
        + " |",
        "|---|---|---|---|---|" + "---|---|" * len(sizes),
    ]
    for heads, own in figures.items():
        speeds = [
            over_seeds(own[name][one]).text(2) if name in own else "1"
            for one in sizes
            for name in ("tokens a pass", "speed-up")
        ]
        loss, solved = over_seeds(own["loss, head 1"]).text(4), over_seeds(own["pass@1"]).text(3)
        seconds = over_seeds(own["seconds"]).text(0)
        lines.append(f"| {heads} | {own['steps']} | {seconds} | {loss} | {solved} | {' | '.join(speeds)} |")
    different = sum(sum(values) for own in figures.values() for values in own.get("different", {}).values())
    lines.append(
        f"\nOf all completions that were decoded both ways, {different} differ (they must not, but for rounding). Each "
        "arm's learning rate has its own cosine over its own steps, and none was tuned."
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], axis: Axes) -> None:
    """Speed-up of decoding by heads."""
    figures = {heads: own for heads, own in results["figures"].items() if "speed-up" in own}
    for one in next(iter(figures.values()))["speed-up"]:
        found = [over_seeds(own["speed-up"][one]) for own in figures.values()]
        axis.errorbar(
            list(figures), [mean.mean for mean in found], [mean.half or 0 for mean in found], label=f"batch size {one}",
            fmt="o", capsize=4,
        )  # fmt: skip
    axis.axhline(1, color="grey", linewidth=1)
    axis.set_xlabel("heads")
    axis.set_ylabel("plain over self-speculative time")
    axis.legend()
