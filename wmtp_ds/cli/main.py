"""The ``wmtp-ds`` program: a lazy group of commands, one exit code for each kind of ending."""

import errno
import io
import sys

import click

from wmtp_ds import __version__
from wmtp_ds.cli.lazy import LazyGroup
from wmtp_ds.errors import UserError
from wmtp_ds.masking import printable

# Command -> (module:attribute, line of help). A module is imported only when its command runs, so that
# `--help` and `validate` answer without waiting for torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "validate": ("wmtp_ds.cli.validate:validate", "Check a stage config: every problem, in one run."),
    "show": ("wmtp_ds.cli.show:show", "Print the resolved config with the origin of each value."),
    "train": ("wmtp_ds.cli.train:train", "Train a stage through the DeepSpeed launcher."),
    "pipeline": ("wmtp_ds.cli.pipeline:pipeline", "Train several stages, handing the critic over."),
    "model": ("wmtp_ds.cli.model:model", "Make and inspect models."),
    "data": ("wmtp_ds.cli.data:data", "Make and import training data."),
    "bench": ("wmtp_ds.cli.bench:bench", "Measure the loss kernels and whole training steps."),
    "evaluate": ("wmtp_ds.cli.evaluate:evaluate", "Measure how good a model is: pass@k, accuracy, perplexity."),
    "weights": ("wmtp_ds.cli.weights:weights", "Show what a trained stage looks at, token by token."),
    "compare": ("wmtp_ds.cli.compare:compare", "Compare runs: config, metrics, curves, pass@k with intervals."),
    "checkpoint": ("wmtp_ds.cli.checkpoint:checkpoint", "List, verify and prune the checkpoints of runs."),
    "track": ("wmtp_ds.cli.track:track", "Work with the metrics of runs."),
    "plan": ("wmtp_ds.cli.plan:plan", "Work out the memory that a config takes."),
    "doctor": ("wmtp_ds.cli.doctor:doctor", "Look for what this machine lacks to train."),
}


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: wmtp-ds validate stage_configs/local/critic.toml",
)
@click.version_option(__version__, prog_name="wmtp-ds")
def cli() -> None:
    """Train a multi-token-prediction policy with per-token weights on DeepSpeed ZeRO-3."""


def main(args: list[str] | None = None) -> None:
    """Run the program. Exit codes: 0 done, 1 failed at run time, 2 usage or config, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name on the disk need not be text that can be encoded
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(args=args, prog_name="wmtp-ds", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written to: nothing that a traceback explains
        click.echo(printable(f"error: {error}"), err=True)
        sys.exit(2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1)  # names that no file can have
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
