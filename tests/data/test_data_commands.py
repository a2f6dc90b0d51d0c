"""``wmtp-ds data``: its commands, and the progress of long ones."""

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

from wmtp_ds.cli.data import COMMANDS, data
from wmtp_ds.cli.main import main
from wmtp_ds.cli.progress import progress


def test_every_command_that_is_listed_is_there() -> None:
    assert data.list_commands(click.Context(data)) == list(COMMANDS)
    for name, (target, _) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        command = data.get_command(click.Context(data), name)
        assert command is getattr(importlib.import_module(module), attribute)
        assert command is not None
        assert command.name == name
    assert data.get_command(click.Context(data), "none") is None


def test_help_lists_them_without_importing_any() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from wmtp_ds.cli.data import COMMANDS, data\n"
        "text = CliRunner().invoke(data, ['--help']).output\n"
        "assert all(f'  {name} ' in text and line.split()[0] in text for name, (_, line) in COMMANDS.items()), text\n"
        "print([name for name in sys.modules if name.startswith('wmtp_ds.cli.data_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "imprt"])
    assert end.value.code == 2
    assert "There is no command 'imprt'. Did you mean 'import'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["data", "frobnicate"])
    assert f"There is no command 'frobnicate'. There are: {', '.join(COMMANDS)}." in capsys.readouterr().err


def test_progress_prints_four_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", "sheep") as (start, advance):
        start(103)
        for _ in range(100):
            advance(1)
        advance(3)
    err = capsys.readouterr().err.splitlines()
    assert err == [f"counting: {n} of 103 sheep" for n in (26, 52, 78, 103)]


def test_progress_of_nothing_and_in_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting") as (start, advance):
        advance(1)
        start(0)
        advance(0)
    assert capsys.readouterr().err == ""
    with progress("counting") as (start, advance):
        start(8)
        advance(8)
    assert capsys.readouterr().err == "counting: 8 of 8 problems\n"


@pytest.mark.parametrize("what", ["jsonl", "mbpp", "humaneval", "codecontests"])
def test_an_import_does_not_replace_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    source = tmp_path / "data" / "rows.jsonl"
    source.parent.mkdir()
    source.write_text("mine")
    (tmp_path / "link").symlink_to("data")
    for output in (tmp_path / "data", tmp_path / "link", tmp_path):
        with pytest.raises(SystemExit) as end:
            main(["data", "import", what, "--input", str(source), "--output", str(output), "--force"])
        assert end.value.code == 2
        assert f"{source}: lies in {output}, which the import replaces" in capsys.readouterr().err
    assert source.read_text() == "mine"


@pytest.mark.parametrize(
    "args",
    [
        ["label", "--input", "a", "--output", "b", "--limit-seconds", "inf"],
        ["label", "--input", "a", "--output", "b", "--limit-factor", "nan"],
        ["label", "--input", "a", "--output", "b", "--float-tolerance", "inf"],
        ["import", "jsonl", "--input", "a", "--output", "b", "--validation-fraction", "nan"],
        ["import", "mbpp", "--input", "a", "--output", "b", "--validation-fraction", "nan"],
        ["import", "codecontests", "--input", "a", "--output", "b", "--validation-fraction", "nan"],
    ],
)
def test_numbers_that_are_none(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", *args])
    assert end.value.code == 2
    assert f"Invalid value for '{args[-2]}': {args[-1]} is not a number." in capsys.readouterr().err
