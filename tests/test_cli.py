"""The program as a whole: help, exit codes, and what it takes to answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from wmtp_ds import __version__
from wmtp_ds.cli.main import COMMANDS, cli, main
from wmtp_ds.errors import RunError, UserError

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HEAVY = ("torch", "transformers", "deepspeed", "mlflow", "triton", "numpy")

# Asks every command and subcommand for help, in one process, and says which heavy libraries that has loaded.
HELP_OF_ALL = f"""
import json, sys
import click
from click.testing import CliRunner
from wmtp_ds.cli.main import cli

pages = {{}}

def ask(command, words):
    result = CliRunner().invoke(cli, [*words, "--help"], prog_name="wmtp-ds")
    pages[" ".join(words)] = [result.exit_code, result.output]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            ask(command.get_command(context, name), [*words, name])

ask(cli, [])
print(json.dumps([pages, sorted(set({HEAVY!r}) & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def help_of_all() -> tuple[dict[str, list], list[str]]:
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages, heavy = json.loads(done.stdout)
    return pages, heavy


def run(*command: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "MLFLOW_"))}
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=60)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The program in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


# --- help ---


def test_every_command_has_help_with_an_example(help_of_all):
    pages, _ = help_of_all
    assert {words.split()[0] for words in pages if words} == set(COMMANDS)
    assert {"", "model micro", "data sample", "data import mbpp", "track sync"} <= pages.keys()
    for words, (code, text) in pages.items():
        assert code == 0, (words, text)
        example = text.partition("Example: ")[2]
        assert example, f"wmtp-ds {words} --help shows no example"
        assert example.startswith(f"wmtp-ds {words}".strip()), words
        assert text.startswith("Usage: wmtp-ds"), words


def test_help_loads_no_heavy_library(help_of_all):
    pages, heavy = help_of_all
    assert len(pages) >= len(COMMANDS) + 4
    assert heavy == []


def test_every_option_says_what_it_is(help_of_all):
    for name in COMMANDS:
        stack = [(name, cli.get_command(click.Context(cli), name))]
        while stack:
            words, command = stack.pop()
            assert command is not None
            if isinstance(command, click.Group):
                stack += [(f"{words} {inner}", command.commands[inner]) for inner in command.commands]
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, f"{words} {parameter.opts[0]} has no help"


def test_the_list_of_commands_is_the_groups(help_of_all):
    text = help_of_all[0][""][1]
    for name, (_, line) in COMMANDS.items():
        assert f"  {name}" in text
        assert line.split()[0] in text
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_json_flag_is_called_json(name):
    command = cli.get_command(click.Context(cli), name)
    for parameter in getattr(command, "params", []):
        assert not any("json" in option and option != "--json" for option in parameter.opts)


# --- one program ---


def test_both_ways_to_start_it_are_one_program():
    module, program = ([sys.executable, "-m", "wmtp_ds"], [str(BIN / "wmtp-ds")])
    for arguments in (["--version"], ["--help"], ["model"], ["frobnicate"]):
        one, other = run(*module, *arguments), run(*program, *arguments)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
        if arguments == ["--version"]:
            assert one.stdout == f"wmtp-ds, version {__version__}\n"


# --- exit codes ---


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("validat", "There is no command 'validat'. Did you mean 'validate'?"),
        ("trian", "Did you mean 'train'?"),
        ("pipelin", "Did you mean 'pipeline'?"),
        ("Show", "Did you mean 'show'?"),
        ("frobnicate", f"There is no command 'frobnicate'. There are: {', '.join(COMMANDS)}."),
    ],
)
def test_an_unknown_command(capsys, typed, part):
    for arguments in ([typed], [typed, "--help"], [typed, "x.toml"]):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "")
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--frobnicate"], "No such option"),
        (["model", "mcro"], "Did you mean 'micro'?"),
        (["validate"], "Missing argument 'FILE'"),
        (["train"], "Missing option '--stage'"),
        (["pipeline"], "Missing argument 'CONFIGS...'"),
        (["show", "a.toml", "b.toml"], "unexpected extra argument"),
        (["validate", "nowhere.toml"], "error: nowhere.toml: 1 problem"),
        (["show", "nowhere.toml"], "error: nowhere.toml: 1 problem"),
        (["train", "--stage", "rho1", "--config", "nowhere.toml"], "error: nowhere.toml: 1 problem"),
        (["track", "sync", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage(capsys, arguments, part):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the config is wrong"), 2, "error: the config is wrong\n"),
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (OSError(28, "No space left on device", "x.png"), 1, "error: [Errno 28] No space left on device: 'x.png'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (click.UsageError("wrong"), 2, "Error: wrong\n"),
    ],
)
def test_each_kind_of_ending_has_its_exit_code(capsys, monkeypatch, error, code, said):
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "get_command", lambda *_: fails)
    found = call(capsys, "train")
    assert found[:2] == (code, "")
    assert found[2].endswith(said)


@pytest.mark.parametrize(("returned", "expected"), [(None, 0), (0, 0), (1, 1), (143, 143), ("text", 0)])
def test_what_a_command_returns_is_the_exit_code(capsys, monkeypatch, returned, expected):
    monkeypatch.setattr(cli, "get_command", lambda *_: click.Command("train", callback=lambda: returned))
    assert call(capsys, "train")[0] == expected


def test_a_bug_is_not_hidden(monkeypatch):
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "get_command", lambda *_: click.Command("train", callback=bug))
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_reader_that_closes_early_is_no_error():
    """`wmtp-ds show FILE | head -1`."""
    config = "stage_configs/local/baseline.toml"
    done = run("bash", "-c", f"set -o pipefail; {BIN}/wmtp-ds show {config} | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_train_passes_the_request_on(capsys, monkeypatch):
    import wmtp_ds.cli.train as command
    from wmtp_ds.launch import Request

    seen = []
    monkeypatch.setattr(command, "launch", lambda request: seen.append(request) or 143)
    arguments = ["--stage", "rho1", "--num_gpus", "4", "--override", "a=1", "--override", "b=2", "--resume", "auto"]
    assert call(capsys, "train", *arguments) == (143, "", "")
    assert seen == [Request("rho1", num_gpus=4, resume="auto", override=("a=1", "b=2"))]
