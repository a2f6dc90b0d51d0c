"""From a command to ranks: who starts the launcher, who leaves, and who trains.

DeepSpeed's launcher hands everything after the script to the script, so ``--num_gpus`` behind it is ours to honour:

- started without the launcher, we start it with as many ranks;
- started as a single rank with more asked for, we start it again (a CPU-only machine gets one rank otherwise);
- started with more local ranks than asked for, the surplus leaves and the rest is a world of N;
- anything else cannot be mended from inside and is an error with the command to type.

On several machines a launcher is started on each, with ``--nnodes`` and ``--node_rank``, by whatever starts commands
there (srun, ssh); or DeepSpeed's own front end starts them all from a hostfile.

Nothing here imports torch before it is known that this process trains.
"""

import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import click

from wmtp_ds.config import Resolved, load_config
from wmtp_ds.config.deepspeed_file import offloads
from wmtp_ds.errors import UserError
from wmtp_ds.meeting import MASTER_PORT, Meeting, free_port
from wmtp_ds.resume import check_resume, fit_ranks
from wmtp_ds.signals import ECHO_SECONDS, ENDING
from wmtp_ds.universal import PLACE_VARIABLES

SCRIPT = "bin/train_stage.py"
_SIGNALS = frozenset(int(number) for number in signal.Signals)
# More than any machine has GPUs; a slip of the finger must not start thousands of processes.
MAX_RANKS = 256
MAX_NODES = 4096


@dataclass(frozen=True)
class Request:
    """What was typed: see :func:`train_options`."""

    stage: str
    num_gpus: int | None = None
    config: Path | None = None
    critic_checkpoint: str | None = None
    run_name: str | None = None
    device: str | None = None
    resume: str = "never"
    override: tuple[str, ...] = ()
    nnodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def for_ranks(self) -> "Request":
        """What the ranks are to know: where they are the launcher tells them."""
        return replace(self, nnodes=None, node_rank=None, master_addr=None, master_port=None)

    def arguments(self) -> list[str]:
        """The same as command-line arguments."""
        options = {
            "--stage": self.stage,
            "--num_gpus": self.num_gpus,
            "--config": self.config,
            "--critic-checkpoint": self.critic_checkpoint,
            "--run-name": self.run_name,
            "--device": self.device,
            "--resume": self.resume,
            "--nnodes": self.nnodes,
            "--node_rank": self.node_rank,
            "--master_addr": self.master_addr,
            "--master_port": self.master_port,
        }
        given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
        return given + [part for text in self.override for part in ("--override", text)]

    @property
    def config_path(self) -> Path:
        """The config's file."""
        return self.config or Path("stage_configs") / f"{self.stage}.toml"

    def load(self, *, checks: bool = True) -> Resolved:
        """The config, of this stage.

        Args:
            checks: False leaves out what looks at files: models, data, the critic.

        Raises:
            UserError: every problem that can be known before a process group forms.
        """
        path = self.config_path
        overrides = list(self.override)
        if self.critic_checkpoint:  # "" leaves it to the config: MLproject cannot leave a parameter out
            overrides.append(f"experiment.critic_checkpoint={json.dumps(self.critic_checkpoint)}")
        if self.device is not None:
            overrides.append(f"runtime.device={json.dumps(self.device)}")
        resolved = load_config(path, overrides, checks=checks)
        if resolved.config.experiment.stage != self.stage:
            raise UserError(
                f"{path} is a config of stage {resolved.config.experiment.stage!r}, not of {self.stage!r}. "
                f"Pass --stage {resolved.config.experiment.stage}, or another --config."
            )
        return resolved


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of ``bin/train_stage.py`` and ``wmtp-ds train``."""
    options = [
        click.option("--stage", required=True, help="baseline, critic, verifiable or rho1 (or one of your own)."),
        click.option(
            "--num_gpus", "--num-gpus", type=click.IntRange(1, MAX_RANKS), help="Ranks to train with on this machine."
        ),
        click.option("--nnodes", type=click.IntRange(1, MAX_NODES), help="Machines, each of which runs this command."),
        click.option("--node_rank", "--node-rank", type=click.IntRange(0), help="This machine's number, from 0."),
        click.option("--master_addr", "--master-addr", help="The address of machine 0."),
        click.option(
            "--master_port",
            "--master-port",
            type=click.IntRange(1, 65535),
            help=f"A free port there; default: {MASTER_PORT}, or any free one where there is one machine.",
        ),
        click.option("--config", type=click.Path(path_type=Path), help="Default: stage_configs/<stage>.toml."),
        click.option("--critic-checkpoint", help="The critic's folder, file or MLflow URI (verifiable)."),
        click.option("--run-name", help="Name of the tracked run; default: experiment.name."),
        click.option("--device", help="auto, cuda or cpu; overrides runtime.device."),
        click.option(
            "--resume",
            default="never",
            show_default=True,
            help="auto: go on from the newest sound checkpoint; never; or a checkpoint's path.",
        ),
        click.option("--override", multiple=True, metavar="KEY=VALUE", help="May be repeated."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Place:
    """Where the launcher has put this process."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Place | None":
        """From the launcher's environment; None without one."""
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return None
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
        found = {name: environ[name] for name in names if name in environ}
        try:
            numbers = {name: int(value) for name, value in found.items()}
        except ValueError:
            shown = ", ".join(f"{name}={value}" for name, value in found.items())
            raise UserError(f"the launcher's variables must be whole numbers: {shown}. Unset them.") from None
        size = numbers["WORLD_SIZE"]
        local_size = numbers.get("LOCAL_SIZE", numbers.get("LOCAL_WORLD_SIZE", size))
        return cls(numbers["RANK"], numbers.get("LOCAL_RANK", 0), size, local_size)


def decide(place: Place | None, request: Request) -> Literal["launch", "leave", "train"]:
    """What this process is to do.

    Raises:
        UserError: where ranks and ``--num_gpus`` cannot be brought together, with the command to type instead.
    """
    wanted = request.num_gpus
    if place is None:
        return "launch"
    if request.nnodes is not None:
        raise UserError(
            "--nnodes is for commands that start the launcher, and this one was started by it. Leave it out: the "
            "launcher is told by its --hostfile."
        )
    if wanted is None or wanted == place.local_size:
        return "train"
    if place.world_size == 1:
        return "launch"
    if place.world_size == place.local_size and wanted < place.local_size:
        return "leave" if place.local_rank >= wanted else "train"
    rest = shlex.join(replace(request, num_gpus=None).arguments())
    raise UserError(
        f"--num_gpus {wanted} does not fit the launcher's {place.world_size} ranks, {place.local_size} on this "
        f"machine. Put the number before the script: deepspeed --num_gpus {wanted} {SCRIPT} {rest}"
    )


def launch_environment(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a fresh launcher: what an outer one has set is taken out."""
    outer = (*PLACE_VARIABLES, "CROSS_RANK", "CROSS_SIZE")
    environment = {name: value for name, value in environ.items() if name not in outer}
    # Ranks run as a module: without this, whatever lies in the current directory could shadow a library.
    environment["PYTHONSAFEPATH"] = "1"
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def launcher_command(ranks: Sequence[int | str], request: Request, meeting: Meeting | None = None) -> list[str]:
    """DeepSpeed's launcher of one machine for ranks on the given device ids."""
    return ranks_command(ranks, "wmtp_ds.rank", request.for_ranks().arguments(), meeting)


def ranks_command(
    ranks: Sequence[int | str], module: str, arguments: Sequence[str], meeting: Meeting | None = None
) -> list[str]:
    """The launcher for any module of ours that runs in ranks: as many on each machine, by default on this one alone."""
    meeting = meeting or Meeting(1, 0, "127.0.0.1", free_port())
    nodes = {f"node-{number}": list(ranks) for number in range(meeting.nnodes)}
    world = base64.urlsafe_b64encode(json.dumps(nodes).encode()).decode()
    launcher = [sys.executable, "-m", "wmtp_ds.deepspeed_launcher", "--log_level=critical", f"--world_info={world}"]
    address = [f"--master_addr={meeting.address}", f"--master_port={meeting.port}", f"--node_rank={meeting.node_rank}"]
    return [*launcher, *address, "--module", module, *arguments]


def check_compiler(device: str, ds_config: Mapping[str, Any]) -> None:
    """DeepSpeed compiles its CPU Adam (offload) and Triton its launchers (GPU) on first use.

    Raises:
        UserError: if one of them is needed and there is no C++ compiler, with the command that installs one.
    """
    if device == "cpu" and not offloads(ds_config, "offload_optimizer"):
        return
    if cxx_compiler() is None:
        raise UserError("DeepSpeed needs a C++ compiler: sudo apt-get install build-essential (or your system's).")


def cxx_compiler() -> str | None:
    """The C++ compiler that torch would build extensions with; None without one."""
    return next((path for name in (os.environ.get("CXX", "c++"), "g++") if (path := shutil.which(name))), None)


def check_kernels(device: str) -> None:
    """What ``WMTP_KERNELS`` asks for must run on the device.

    Raises:
        UserError: if it does not.
    """
    from wmtp_kernels import backend

    try:
        backend(device)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def check_port(place: Place, environ: Mapping[str, str]) -> None:
    """Rank 0 must be able to listen where the others will look for it.

    Raises:
        UserError: if the port is taken, or no port.
    """
    if place.rank != 0 or "MASTER_PORT" not in environ:
        return
    port = int(environ["MASTER_PORT"])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            what = f"is taken ({error.strerror})" if isinstance(error, OSError) else "is beyond 65535"
            raise UserError(
                f"port {port}, where the ranks are to meet, {what}. Choose another: "
                f"deepspeed --master_port {free_port()} {SCRIPT} …, or use wmtp-ds train, which finds a free one."
            ) from None


def device_ids(device: str, wanted: int | None, environ: Mapping[str, str]) -> list[int | str]:
    """The devices to start ranks on: ``wanted`` of them, by default every GPU, or one CPU rank.

    They become the ranks' ``CUDA_VISIBLE_DEVICES``, so where that is set already they are named as it names them
    (by index, or by the UUID of a GPU or a part of one).

    Raises:
        UserError: if there are fewer GPUs than asked for.
    """
    if device == "cpu":
        return list(range(wanted or 1))
    import torch

    count = torch.cuda.device_count()
    if (wanted or 1) > count:
        raise UserError(
            f"--num_gpus {wanted or 1}: this machine has {count} GPUs{_visible(environ)}. "
            f"Ask for at most {count}, or train on the CPU with --device cpu."
        )
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    ids: list[int | str] = [int(part) if part.isdecimal() else part for part in visible]
    if len(ids) != count or "" in ids:
        ids = list(range(count))
    return ids[: wanted or count]


def _visible(environ: Mapping[str, str]) -> str:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"


def resolve_device(wanted: str) -> str:
    """``runtime.device`` as "cuda" or "cpu".

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    if wanted == "cpu":
        return wanted
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UserError("runtime.device is cuda, but torch finds no GPU. Check nvidia-smi, or pass --device cpu.")
    return "cpu"


def prepare_launch(request: Request) -> tuple[list[str], dict[str, str]]:
    """Check everything that can be checked now; the launcher's command and environment.

    Raises:
        UserError: for a wrong config, missing files, too few GPUs, no compiler.
    """
    meeting = Meeting.of(request, os.environ)
    resolved = request.load()
    check_resume(resolved, request.resume)
    device = resolve_device(resolved.config.runtime.device)
    check_compiler(device, resolved.deepspeed(1))
    if os.environ.get("WMTP_KERNELS"):  # what is chosen without it runs: no need to import torch, which takes seconds
        check_kernels(device)
    ids = device_ids(device, request.num_gpus, os.environ)
    fit_ranks(resolved, request.resume, len(ids) * meeting.nnodes)
    return launcher_command(ids, request, meeting), launch_environment(device, os.environ)


def launch(request: Request) -> int:
    """Start the ranks under DeepSpeed's launcher, pass signals on to them, and return their exit code."""
    return run_ranks(*prepare_launch(request))


def run_ranks(command: Sequence[str], environment: Mapping[str, str], stdout: TextIO | None = None) -> int:
    """Run the launcher to its end, pass signals on to its ranks, and return their exit code.

    Args:
        command: the launcher's.
        environment: of the launcher and the ranks.
        stdout: where their standard output goes; None: where this process's goes.
    """
    # SLURM may send its warning to every process of a job, and it would end the launcher, which knows nothing of it.
    launcher = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=stdout, preexec_fn=_ignore_warning
    )
    first: list[tuple[int, float]] = []  # the signal, and when it came

    def forward(number: int, _frame: Any) -> None:
        now = time.monotonic()
        if not first:
            first.append((number, now))
        elif now - first[0][1] <= ECHO_SECONDS:
            return
        else:
            number = signal.SIGKILL
        # To the ranks alone: the launcher itself would kill them one after another.
        for child in _children(launcher.pid):
            _send(child, number)

    previous = {number: signal.signal(number, forward) for number in ENDING}
    try:
        code = launcher.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # The launcher leaves with a rank's code, which is negative if a signal has ended it.
    ended_by = -code if code < 0 else 256 - code
    if first and (ended_by in _SIGNALS or code > 128):
        return 128 + ENDING[signal.Signals(first[0][0])]
    if code < 0:
        return 128 - code
    if ended_by in _SIGNALS:
        click.echo(f"error: a rank was ended by {_meaning(ended_by)}. Go on with --resume auto.", err=True)
        return 1
    return code


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _meaning(number: int) -> str:
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"{name}: by somebody, or by the system for want of memory (dmesg tells)"
    return f"{name}: a fault in a library, or somebody's signal"


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
