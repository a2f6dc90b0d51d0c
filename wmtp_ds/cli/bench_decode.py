"""``wmtp-ds bench decode``: how much faster the extra heads make decoding."""

import json
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.evaluate import positive_numbers


@click.command(epilog="Example: wmtp-ds bench decode checkpoints/mbpp-baseline --problems mbpp:test.jsonl")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--problems",
    required=True,
    metavar="mbpp:FILE|humaneval|FILE.jsonl",
    help="Whose prompts to complete, as in wmtp-ds evaluate.",
)
@click.option(
    "--prompt",
    type=click.Choice(["alpaca", "plain", "completion"]),
    default="alpaca",
    show_default=True,
    help="The template that the model was trained with; or completion: it goes on with the function's beginning.",
)
@click.option("--limit", type=click.IntRange(min=1), default=32, show_default=True, help="So many problems at most.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Of a completion.")
@click.option(
    "--batch-size",
    "batch_sizes",
    default="1,8",
    show_default=True,
    callback=positive_numbers,
    metavar="N[,N…]",
    help="Completions at a time.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Readings of each way.")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="To compute on."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def decode(
    model: Path,
    problems: str,
    prompt: str,
    limit: int,
    max_new_tokens: int,
    batch_sizes: tuple[int, ...],
    rounds: int,
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Complete prompts plainly and self-speculatively, in turn, and compare tokens a pass and time.

    Decoding is greedy, and both ways give the same tokens; completions that differ, by rounding, are counted.
    """
    import torch

    from wmtp_ds.bench.decode import device_name, measure_decoding, table
    from wmtp_ds.decoding import Limits
    from wmtp_ds.evaluate.model import check_heads, find_model, load_model
    from wmtp_ds.evaluate.problems import read_problems
    from wmtp_ds.evaluate.samples import COMPLETION, Prompter, check_beginnings
    from wmtp_ds.launch import resolve_device
    from wmtp_ds.models.mtp import MTPLlamaForCausalLM

    place = find_model(model)
    check_heads(place)
    problem_set = read_problems(problems).first(limit)
    check_beginnings(problem_set.problems, prompt)
    policy, tokenizer = load_model(place, device=torch.device(resolve_device(device)), dtype=dtype)
    assert isinstance(policy, MTPLlamaForCausalLM), "it has extra heads"
    prompter = Prompter(tokenizer, prompt)
    figures: dict[str, Any] = {
        "model": str(place.folder),
        "heads": policy.n_future_tokens,
        "problems": problem_set.name,
        "prompts": len(problem_set.problems),
        "device": device_name(policy.lm_head.weight.device),
        "dtype": str(policy.lm_head.weight.dtype).removeprefix("torch."),
        "batch_sizes": measure_decoding(
            policy,
            [prompter.tokens(problem) for problem in problem_set.problems],
            Limits(max_new_tokens, prompter.end_ids, prompter.is_over if prompt == COMPLETION else None),
            batch_sizes=batch_sizes,
            rounds=rounds,
            progress=lambda line: click.echo(line, err=True),
        ),
    }
    click.echo(json.dumps(figures) if as_json else table(figures))
