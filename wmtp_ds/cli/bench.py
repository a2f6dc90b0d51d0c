"""``wmtp-ds bench``: measure the kernels, whole training steps, and decoding."""

import importlib
from typing import Any

import click
from wmtp_kernel_benchmarks.options import OPTIONS, Option, Settings, UsageError

# Sub-command -> module:attribute, of those that are imported only when they are used.
_LAZY = {"step": "wmtp_ds.cli.bench_step:step", "decode": "wmtp_ds.cli.bench_decode:decode"}


class _BenchGroup(click.Group):
    """A group some of whose commands live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the help."""
        return [*self.commands, *_LAZY]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command if need be; None if there is none of that name."""
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _LAZY[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_BenchGroup, epilog="Example: wmtp-ds bench kernels --quick")
def bench() -> None:
    """Measure the loss kernels, whole training steps, and decoding."""


class _Converted(click.ParamType):
    """The type of an option of the benchmark, which says itself what it takes."""

    def __init__(self, option: Option) -> None:
        self.name = option.metavar
        self._convert = option.convert

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        assert self._convert is not None
        try:
            return self._convert(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def _click_option(option: Option) -> click.Option:
    if option.convert is not None:
        names = [f"--{option.name}", option.field]
        return click.Option(names, type=_Converted(option), metavar=option.metavar, help=option.help)
    switch = f"--{option.name}" + (f"/--{option.opposite}" if option.opposite else "")
    default = None if option.opposite else False
    return click.Option([switch, option.field], is_flag=True, default=default, help=option.help)


def _kernels(**values: Any) -> int:
    """Time the losses of wmtp_kernels against plain torch and other libraries.

    All of them run in one process, in turn, and each is checked against float64 first. What cannot run here is listed
    with the reason. `python -m benchmarks` in the folder kernels/ is the same program.
    """
    from wmtp_kernel_benchmarks.run import run

    from wmtp_ds.errors import UserError

    try:
        return run(Settings(**values), "wmtp-ds bench kernels")
    except UsageError as error:
        raise UserError(str(error)) from None


bench.add_command(
    click.Command(
        "kernels",
        callback=_kernels,
        params=[_click_option(option) for option in OPTIONS],
        help=_kernels.__doc__,
        epilog="Example: wmtp-ds bench kernels --device cpu --no-sweep",
    )
)
