"""What can be asked of the benchmark: one table of options, from which both command lines are made.

Nothing here imports torch, so that ``--help`` answers at once.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")


class UsageError(Exception):
    """Wrong usage: the message says what is wrong and how to mend it. Exit code 2."""


@dataclass(frozen=True)
class Option:
    """One option of either command line.

    Attributes:
        name: without dashes; with ``_`` for ``-`` a field of :class:`Settings`.
        help: one line.
        convert: the text typed -> the value; ``ValueError`` says what it must be. None for a switch.
        metavar: what to call the value in the help.
        opposite: of a switch that is on or off or left to the defaults, the name that turns it off.
    """

    name: str
    help: str
    convert: Callable[[str], Any] | None = None
    metavar: str = ""
    opposite: str = ""

    @property
    def field(self) -> str:
        """Its name in :class:`Settings`."""
        return self.name.replace("-", "_")


def _whole(minimum: int, multiple: int = 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or value % multiple:
            kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
            raise ValueError(f"{text!r} is not {kind} from {minimum} on")
        return value

    return convert


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{text!r} does not lie in (0, 1]")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return convert


def _words(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("names no arm")
    return names


OPTIONS = (
    Option("heads", "Prediction heads, stacked as rows. Default: 4.", _whole(1), "N"),
    Option("positions", "Positions of each head. Default: 8192 on a GPU, 1024 on a CPU.", _whole(1), "N"),
    Option("length", "Positions of one sequence. Default: 2048 on a GPU, 256 on a CPU.", _whole(1), "N"),
    Option("dim", "Hidden size D. Default: 4096 on a GPU, 512 on a CPU.", _whole(8, multiple=8), "N"),
    Option("vocabulary", "Vocabulary V. Default: 32000.", _whole(2), "N"),
    Option(
        "dtype", f"One of {', '.join(DTYPES)}. Default: bfloat16 on a GPU, float32 on a CPU.", _one_of(*DTYPES), "NAME"
    ),
    Option("k-percent", "Share of the targets that Rho-1 selects. Default: 0.6.", _share, "SHARE"),
    Option("rounds", "Rounds; every arm runs once in each. Default: 9 on a GPU, 5 on a CPU.", _whole(1), "N"),
    Option("arms", "Only these arms, by commas; the floor and plain torch always run. Default: all.", _words, "NAMES"),
    Option("sweep", "Also measure other numbers of positions. Default: yes.", opposite="no-sweep"),
    Option("device", "auto, cpu or cuda. Default: auto.", _one_of("auto", "cpu", "cuda"), "NAME"),
    Option("threads", "CPU threads. Default: torch's; 1 with --quick.", _whole(1), "N"),
    Option(
        "clock",
        "On a CPU, which time ratios and targets use: wall, or cpu (of the process). Default: wall.",
        _one_of("wall", "cpu"),
        "NAME",
    ),
    Option("seed", "Of the inputs and of the order of the arms. Default: 0.", _whole(0), "N"),
    Option(
        "output", "Folder for the table, CSV, JSON and plot. Default: benchmarks-out/kernels.", Path, metavar="FOLDER"
    ),
    Option("quick", "Tiny sizes that take seconds: to try the program, not the kernels."),
    Option("check", "Exit with 1 if a target is missed."),
    Option("json", "Print the results as JSON; the table goes to stderr."),
)


@dataclass(frozen=True)
class Settings:
    """What was asked; None where nothing was said. See :data:`OPTIONS`."""

    heads: int | None = None
    positions: int | None = None
    length: int | None = None
    dim: int | None = None
    vocabulary: int | None = None
    dtype: str | None = None
    k_percent: float | None = None
    rounds: int | None = None
    arms: tuple[str, ...] | None = None
    sweep: bool | None = None
    device: str | None = None
    threads: int | None = None
    clock: str | None = None
    seed: int | None = None
    output: Path | None = None
    quick: bool = False
    check: bool = False
    json: bool = False

    def arguments(self) -> str:
        """The same request as one would type it."""
        words: list[str] = []
        for option in OPTIONS:
            value = getattr(self, option.field)
            if value is True:
                words.append(f"--{option.name}")
            elif value is False and option.opposite:
                words.append(f"--{option.opposite}")
            elif value is not None and value is not False:
                words += [f"--{option.name}", ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Plan:
    """What is done: :class:`Settings` with every default filled in.

    Attributes:
        device: "cpu" or "cuda".
        check_length: positions of a sequence (two a head) at which each arm is checked before it is timed.
        sweep: numbers of positions that are measured besides ``positions``.
        bandwidth_positions: positions for the weight kernel alone.
        arms: names, or None for all.
        threads: CPU threads, or None for torch's number.
    """

    device: str
    heads: int
    positions: int
    length: int
    dim: int
    vocabulary: int
    dtype: str
    k_percent: float
    rounds: int
    sweep_rounds: int
    check_length: int
    bandwidth_positions: int
    sweep: tuple[int, ...]
    arms: tuple[str, ...] | None
    clock: str
    seed: int
    output: Path
    threads: int | None

    def length_at(self, positions: int) -> int:
        """Positions of one sequence where each head has ``positions``."""
        return min(self.length, positions)


_GPU: dict[str, Any] = {
    "positions": 8192,
    "length": 2048,
    "dim": 4096,
    "vocabulary": 32_000,
    "dtype": "bfloat16",
    "rounds": 9,
    "sweep_rounds": 5,
    "check_length": 1280,  # 10,240 rows of four heads: more than one chunk
    "bandwidth_positions": 2**26,  # far more than fits a cache
}
_CPU: dict[str, Any] = {
    "positions": 1024,
    "length": 256,
    "dim": 512,
    "vocabulary": 32_000,
    "dtype": "float32",
    "rounds": 5,
    "sweep_rounds": 2,
    "check_length": 40,
    "bandwidth_positions": 2**22,
}
_QUICK: dict[str, Any] = {
    "positions": 64,
    "length": 32,
    "dim": 64,
    "vocabulary": 512,
    "rounds": 3,
    "sweep_rounds": 2,
    "check_length": 16,
    "bandwidth_positions": 2**12,
    "threads": 1,  # products as small as these are slower on several
}
# Of --positions. The largest is for GPUs: on a CPU its plain torch would take minutes.
_SWEEP = {"cuda": (1 / 8, 1 / 4, 1 / 2, 2), "cpu": (1 / 8, 1 / 4, 1 / 2)}


def plan(settings: Settings, device: str) -> Plan:
    """Fill in the defaults of a device ("cpu" or "cuda").

    Raises:
        UsageError: if what was asked does not fit together.
    """
    values: dict[str, Any] = {"heads": 4, "k_percent": 0.6, "clock": "wall", "seed": 0, "threads": None}
    values["output"] = Path("benchmarks-out/kernels")
    values |= _GPU if device == "cuda" else _CPU
    values |= _QUICK if settings.quick else {}
    asked = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    values |= {name: value for name, value in asked.items() if value is not None and name in values}
    positions = values["positions"]
    values["length"] = length = min(values["length"], positions)
    if positions % length:
        raise UsageError(f"--positions {positions}: must be a multiple of the sequences' length, --length {length}")
    if values["output"].exists() and not values["output"].is_dir():
        raise UsageError(f"--output {values['output']}: is a file; name a folder")
    if device == "cuda" and settings.clock == "cpu":
        raise UsageError("--clock cpu: on a GPU the time is the GPU's own")
    factors = _SWEEP[device] if settings.sweep is not False else ()
    sizes = [int(positions * factor) for factor in factors]
    sweep = tuple(size for size in sizes if size and size % min(length, size) == 0)  # whole sequences
    return Plan(device=device, sweep=sweep, arms=settings.arms, **values)


def _argparse_type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def parse(arguments: Sequence[str]) -> Settings:
    """The command line ``python -m benchmarks``. Leaves the process with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the losses of wmtp_kernels against their alternatives.",
        epilog="Example: python -m benchmarks --device cpu --no-sweep",
        allow_abbrev=False,
    )
    for option in OPTIONS:
        if option.convert is not None:
            parser.add_argument(
                f"--{option.name}", type=_argparse_type(option.convert), metavar=option.metavar, help=option.help
            )
        elif option.opposite:
            parser.add_argument(f"--{option.name}", action="store_true", default=None, help=option.help)
            parser.add_argument(
                f"--{option.opposite}", dest=option.field, action="store_false", default=None, help="Do not."
            )
        else:
            parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
    return Settings(**vars(parser.parse_args(list(arguments))))
