"""The process of one rank: what ``bin/train_stage.py`` runs, how it is quieted, and how it ends."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from wmtp_ds.errors import CutShortError, RunError, UserError
from wmtp_ds.launch import (
    Place,
    Request,
    check_compiler,
    check_kernels,
    check_port,
    decide,
    prepare_launch,
    resolve_device,
    train_options,
)
from wmtp_ds.signals import Interruption, die_with_parent

# How long a rank that has done its work is held up by an upload that the tracker no longer waits for.
_TIDY_SECONDS = 5.0
# How long the other ranks of a node wait for local rank 0 to say what is wrong, before the launcher ends all.
_LAST_WORD_SECONDS = 20


class _RankCommand(click.Command):
    """Wrong usage is said by one rank of each node, as all else that is wrong; Ctrl-C ends with 130."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except click.ClickException as error:
            _leave(error.show, error.exit_code)
        except click.Abort:
            sys.exit(130)


def _leave(say: Callable[[], None], code: int) -> NoReturn:
    """Leave with ``code`` once local rank 0 has said why; the launcher then ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" in os.environ:
        time.sleep(_LAST_WORD_SECONDS)
    else:
        say()
    sys.exit(code)


@click.command(cls=_RankCommand, epilog="Example: deepspeed bin/train_stage.py --stage rho1 --num_gpus 4")
@train_options
@click.option("--local_rank", "--local-rank", type=int, hidden=True, help="The launcher prepends it.")
def main(local_rank: int | None, **typed: Any) -> None:
    """Train a stage: on this rank if DeepSpeed's launcher has started it, else through the launcher."""
    request, place = Request(**typed), Place.of(os.environ)
    try:
        action = decide(place, request)
        if action == "launch":
            command, environment = prepare_launch(request)
            sys.stdout.flush()
            os.execve(command[0], command, environment)
        sys.exit(0 if action == "leave" or place is None else train_rank(request, place))
    except UserError as error:
        message = f"error: {error}"
        _leave(lambda: click.echo(message, err=True), error.exit_code)


def train_rank(request: Request, place: Place) -> int:
    """Train on this rank; returns the exit code, or leaves the process where a tidy end could hang.

    Raises:
        UserError: for what is wrong before a process group forms.
    """
    finished: list[int] = []
    atexit.register(_spare_the_teardown, finished)  # before all others are registered, so that it runs behind them
    resolved = request.load()
    device = resolve_device(resolved.config.runtime.device)
    check_compiler(device, resolved.deepspeed(1))
    check_port(place, os.environ)
    if request.num_gpus is not None and place.world_size == place.local_size:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = str(request.num_gpus)
    enter_rank(device, place, resolved.config.runtime.log_level)
    check_kernels(device)  # which says what it chose
    from wmtp_ds.train import train

    finished.append(run_rank(lambda: train(resolved, run_name=request.run_name, resume=request.resume)))
    return finished[0]


def _spare_the_teardown(finished: list[int]) -> None:
    """End a process whose work is done, now that its threads and exit handlers are: while the interpreter is taken down
    a library's thread that comes back from C++ would abort it."""
    if finished:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(finished[0])


def enter_rank(device: str, place: Place, log_level: str) -> None:
    """Make this process a rank: it ends with its launcher, is quiet, and takes its share of the cores."""
    die_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored by launchers, whose children inherit that
    quiet(log_level, place)
    os.environ["DS_ACCELERATOR"] = device
    if device == "cpu":
        share_cores(int(os.environ.get("LOCAL_SIZE", "1")))


def run_rank(work: Callable[[], int]) -> int:
    """Do a rank's work; returns the exit code, or leaves the process where a tidy end could hang.

    Raises:
        UserError: for what is wrong before a process group forms.
    """
    from wmtp_ds import distributed
    from wmtp_ds.tracking import SENDING

    try:
        code = work()
    except Exception as error:
        if isinstance(error, UserError) and not distributed.initialized():
            raise
        code = _say(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Other ranks may wait in a collective that this one will never join; a tidy end would wait for them, too.
        os._exit(code)
    distributed.close()
    if any(thread.name == SENDING for thread in threading.enumerate()):
        threading.Thread(target=_end_untidily, args=(code,), daemon=True).start()
    return code


def _end_untidily(code: int) -> None:
    """End a process that is ending, but waits for the threads of an upload: S3 that does not answer takes minutes."""
    time.sleep(_TIDY_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(error: Exception) -> int:
    """Say what has ended this rank, unless another has more to say; the exit code."""
    from wmtp_ds import distributed
    from wmtp_ds.peers import Peers

    if distributed.is_loss_of_a_peer(error):
        # That rank's own error is what matters, and the launcher is about to end this one, or has asked it to end.
        if not Interruption.any_seen:
            _say_loss(error)
        return 1
    if Peers.current is not None:
        Peers.current.report_own_end(" ".join(str(error).split())[:400] or type(error).__name__)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return 1
    if distributed.is_main() or not error.everywhere:
        click.echo(f"error: {error}", err=True)
    if error.everywhere and isinstance(error, RunError):
        distributed.barrier()  # the first rank to leave ends the others: not before it is said
    return error.exit_code


def _say_loss(error: Exception) -> None:
    """Say which rank is gone. One of this machine says so itself, or its launcher does, and then ends this one."""
    from wmtp_ds import distributed
    from wmtp_ds.peers import Peers

    peers = Peers.current
    assert peers is not None, "there are other ranks, and they have met"
    loss = peers.find_loss()
    if loss is None or peers.own.node in loss.nodes:
        time.sleep(_LAST_WORD_SECONDS)
    last = " ".join(str(error).split())[:200]
    unknown = f"rank {distributed.rank()} waits in vain for another one, though all give signs of life ({last})"
    lost = f"{error.what}: " if isinstance(error, CutShortError) else ""
    peers.say(lost + (unknown if loss is None else loss.text))


def share_cores(ranks: int) -> None:
    """Ranks on one CPU share its cores; torch would give all of them to each."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def quiet(level: str, place: Place) -> None:
    """Warnings from libraries and ``level`` from us, on one rank of each node."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("wmtp_ds", "wmtp_kernels"):
        logging.getLogger(name).setLevel(level.upper())
    if place.local_rank != 0:
        logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Deprecations inside DeepSpeed's use of torch: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    main()
