"""From a command to ranks, piece by piece; the real launcher is tested in tests/launch."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_ds import distributed
from wmtp_ds import launch as launching
from wmtp_ds import rank as ranks
from wmtp_ds.config import ConfigError
from wmtp_ds.errors import CutShortError, RunError, UserError
from wmtp_ds.launch import (
    Place,
    Request,
    check_compiler,
    check_port,
    decide,
    device_ids,
    launch,
    launch_environment,
    launcher_command,
    prepare_launch,
    resolve_device,
    train_options,
)
from wmtp_ds.meeting import Meeting, free_port
from wmtp_ds.peers import Loss, Peer, Peers
from wmtp_ds.signals import Interruption

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "mlflow")


def place(rank: int, world: int, local_rank: int | None = None, local: int | None = None) -> Place:
    return Place(rank, rank if local_rank is None else local_rank, world, world if local is None else local)


# --- who starts, who leaves, who trains ---


@pytest.mark.parametrize(
    ("where", "wanted", "expected"),
    [
        # Without the launcher: start it.
        (None, None, "launch"),
        (None, 1, "launch"),
        (None, 4, "launch"),
        # Started by it, with as many ranks as asked for, or none asked for.
        (place(0, 1), None, "train"),
        (place(0, 1), 1, "train"),
        (place(0, 4), None, "train"),
        (place(3, 4), 4, "train"),
        (place(5, 8, 1, 4), None, "train"),
        (place(5, 8, 1, 4), 4, "train"),  # two machines with four each
        # A single rank with more asked for.
        (place(0, 1), 2, "launch"),
        (place(0, 1), 64, "launch"),
        # More local ranks than asked for: the surplus leaves.
        (place(0, 4), 2, "train"),
        (place(1, 4), 2, "train"),
        (place(2, 4), 2, "leave"),
        (place(3, 4), 2, "leave"),
        (place(0, 8), 1, "train"),
        (place(1, 8), 1, "leave"),
    ],
)
def test_decide(where, wanted, expected):
    assert decide(where, Request("rho1", num_gpus=wanted)) == expected


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (place(0, 2), 4),  # fewer than asked for, and more than one
        (place(1, 2), 3),
        (place(0, 8, 0, 4), 2),  # two machines: the others would wait for ranks that left
        (place(7, 8, 3, 4), 2),
        (place(0, 8, 0, 4), 8),
        (place(0, 2, 0, 1), 2),
    ],
)
def test_decide_cannot_mend_it(where, wanted):
    request = Request("rho1", num_gpus=wanted, config=Path("a b.toml"), resume="auto", override=("training.beta=1",))
    with pytest.raises(UserError) as caught:
        decide(where, request)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"{where.world_size} ranks, {where.local_size} on this machine" in message
    # The corrected command is whole: all that was typed is in it.
    assert message.endswith(
        f"deepspeed --num_gpus {wanted} bin/train_stage.py --stage rho1 --config 'a b.toml' --resume auto "
        "--override training.beta=1"
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"LOCAL_RANK": "0"}, None),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, Place(5, 1, 8, 4)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Place(5, 1, 8, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 0, 1, 1)),
    ],
)
def test_place(environ, expected):
    assert Place.of(environ) == expected


# --- the request ---


@click.command()
@train_options
def parse(**typed: object) -> None:
    PARSED.append(Request(**typed))  # type: ignore[arg-type]


PARSED: list[Request] = []
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
PATHS = st.from_regex(r"-?[a-zA-Z0-9_ ]{1,5}(/-?[a-zA-Z0-9_ ]{1,5}){0,2}", fullmatch=True).map(Path)


@settings(deadline=None, max_examples=200)
@given(
    request=st.builds(
        Request,
        stage=TEXT,
        num_gpus=st.none() | st.integers(1, 64),
        config=st.none() | PATHS,
        critic_checkpoint=st.none() | TEXT,
        run_name=st.none() | TEXT,
        device=st.none() | TEXT,
        resume=TEXT,
        nnodes=st.none() | st.integers(1, 64),
        node_rank=st.none() | st.integers(0, 63),
        master_addr=st.none() | TEXT,
        master_port=st.none() | st.integers(1, 65535),
        override=st.lists(TEXT | st.just("data_sampling.curriculum_schedule[0].epoch_range=[0.0,0.5]")).map(tuple),
    )
)
def test_arguments_come_back_as_they_were(request):
    result = CliRunner().invoke(parse, request.arguments(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert PARSED.pop() == request


def test_both_spellings_of_num_gpus():
    for flag in ("--num_gpus", "--num-gpus"):
        assert CliRunner().invoke(parse, ["--stage", "rho1", flag, "4"]).exit_code == 0
        assert PARSED.pop() == Request("rho1", num_gpus=4)


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", ""])
def test_num_gpus_is_a_positive_number(number):
    result = CliRunner().invoke(parse, ["--stage", "rho1", "--num_gpus", number])
    assert result.exit_code == 2
    assert "--num_gpus" in result.output


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small checkout as the current directory."""
    for name in [name for name in os.environ if name.startswith("WMTP_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(checkout)
    return checkout


LOCAL = Path("stage_configs/local")


def test_load_lays_the_flags_over_the_config(here):
    request = Request(
        "verifiable",
        config=LOCAL / "verifiable.toml",
        critic_checkpoint="runs:/abc/checkpoint_best",
        device="auto",
        override=("training.beta=0.3", 'experiment.critic_checkpoint="elsewhere"', 'runtime.device="cuda"'),
    )
    config = request.load().config
    assert config.experiment.critic_checkpoint == "runs:/abc/checkpoint_best"
    assert (config.runtime.device, config.training.beta) == ("auto", 0.3)


def test_an_empty_critic_leaves_it_to_the_config(here):
    """As MLproject passes it on."""
    request = Request("verifiable", config=LOCAL / "verifiable.toml", critic_checkpoint="")
    assert request.load(checks=False).config.experiment.critic_checkpoint == "checkpoints/local-critic/checkpoint_best"


@pytest.mark.parametrize("typed", ["2024", "true", '"quoted"', "[1]", 'a "b" \\c', "a=b"])
def test_a_critic_is_taken_as_typed(here, typed):
    """It is no TOML value, though some paths look like one."""
    request = Request("verifiable", config=LOCAL / "verifiable.toml", critic_checkpoint=typed)
    assert request.load(checks=False).config.experiment.critic_checkpoint == typed


def test_the_config_of_another_stage(here):
    with pytest.raises(UserError, match=r"rho1\.toml is a config of stage 'rho1', not of 'critic'\. Pass --stage rho1"):
        Request("critic", config=LOCAL / "rho1.toml").load()


def test_the_default_config_is_the_stages(here):
    assert Request("rho1").config_path == Path("stage_configs/rho1.toml")
    with pytest.raises(ConfigError, match=r"stage_configs/rho1\.toml: "):
        Request("rho1").load()  # its models are not here
    with pytest.raises(ConfigError, match=r"stage_configs/rho2\.toml\n +does not exist"):
        Request("rho2").load()


def test_the_device_is_checked_like_any_value(here):
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        Request("rho1", config=LOCAL / "rho1.toml", device="tpu").load()
    with pytest.raises(ConfigError, match=r"mps"):
        Request("rho1", config=LOCAL / "rho1.toml", device="mps").load()


# --- what the launcher is started with ---


def test_launch_environment_takes_out_what_an_outer_launcher_set():
    outer = dict.fromkeys(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "9"
    )
    outer |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}
    kept = {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "2,3", "WMTP_TRAINING__LEARNING_RATE": "1e-4"}
    given_in = outer | kept
    assert launch_environment("cuda", given_in) == kept | {"PYTHONSAFEPATH": "1"}
    assert launch_environment("cpu", given_in) == kept | {"PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    assert given_in == outer | kept, "the caller's is left alone"


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5, 2], ["GPU-8f0c", "MIG-1a"]])
def test_launcher_command(ids):
    request = Request("rho1", num_gpus=len(ids), override=("a=b c",))
    command = launcher_command(ids, request)
    assert command[:3] == [sys.executable, "-m", "wmtp_ds.deepspeed_launcher"]
    assert command[-len(request.arguments()) - 2 :] == ["--module", "wmtp_ds.rank", *request.arguments()]
    options = dict(part.removeprefix("--").split("=", 1) for part in command[3 : -len(request.arguments()) - 2])
    assert json.loads(base64.urlsafe_b64decode(options["world_info"])) == {"node-0": ids}
    assert options["master_addr"] == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(options["master_port"])))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that torch finds so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return pretend


@pytest.mark.parametrize(
    ("count", "wanted", "visible", "expected"),
    [
        (4, None, None, [0, 1, 2, 3]),
        (4, 2, None, [0, 1]),
        (4, 4, None, [0, 1, 2, 3]),
        (2, None, "6,3", [6, 3]),
        (2, 1, "6, 3", [6]),
        (2, 2, "GPU-8f0c, MIG-77", ["GPU-8f0c", "MIG-77"]),
        (2, 2, "6,3,99", [0, 1]),  # one of them is not there: torch counts its own way
        (2, 2, "", [0, 1]),
    ],
)
def test_device_ids(gpus, count, wanted, visible, expected):
    gpus(count)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert device_ids("cuda", wanted, environ) == expected


@pytest.mark.parametrize(
    ("count", "wanted", "environ", "message"),
    [
        (2, 4, {}, "--num_gpus 4: this machine has 2 GPUs. Ask for at most 2, or train on the CPU with --device cpu."),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "5"}, "this machine has 1 GPUs (CUDA_VISIBLE_DEVICES=5). Ask for at most 1"),
        (0, None, {}, "--num_gpus 1: this machine has 0 GPUs"),
    ],
)
def test_too_few_gpus(gpus, count, wanted, environ, message):
    gpus(count)
    with pytest.raises(UserError) as caught:
        device_ids("cuda", wanted, environ)
    assert message in str(caught.value)


def test_cpu_ranks_are_as_many_as_wanted(gpus):
    gpus(0)
    assert device_ids("cpu", 4, {}) == [0, 1, 2, 3]
    assert device_ids("cpu", None, {}) == [0]


def test_resolve_device(gpus):
    gpus(0)
    assert [resolve_device(wanted) for wanted in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match=r"runtime\.device is cuda, but torch finds no GPU\. .*--device cpu"):
        resolve_device("cuda")
    gpus(1)
    assert [resolve_device(wanted) for wanted in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


def test_check_compiler(monkeypatch, tmp_path):
    plain = {"zero_optimization": {"stage": 3}}
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    check_compiler("cpu", offload)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"C\+\+ compiler: sudo apt-get install build-essential"):
        check_compiler("cpu", offload)
    monkeypatch.setenv("CXX", "")
    with pytest.raises(UserError, match="compiler"):
        check_compiler("cuda", plain)
    check_compiler("cpu", plain)  # nothing is compiled there
    for name in ("g++", "my-c++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("CXX", name)
        check_compiler("cpu", offload)
        (tmp_path / name).unlink()


def test_check_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environ = {"MASTER_PORT": str(port)}
        with pytest.raises(UserError, match=rf"port {port}, where the ranks are to meet, is taken .*--master_port \d+"):
            check_port(place(0, 2), environ)
        check_port(place(1, 2), environ)  # rank 0 alone listens
    check_port(place(0, 2), environ)
    check_port(place(0, 2), {})
    with pytest.raises(UserError, match=r"port 99999, .*is beyond 65535"):
        check_port(place(0, 2), {"MASTER_PORT": "99999"})


def test_free_port():
    port = free_port()
    check_port(place(0, 1), {"MASTER_PORT": str(port)})
    assert port >= 1024


def test_prepare_launch(here, gpus):
    gpus(0)
    request = Request("rho1", num_gpus=3, config=LOCAL / "rho1.toml")
    command, environment = prepare_launch(request)
    world = next(part for part in command if part.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"node-0": [0, 1, 2]}
    assert environment["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match="torch finds no GPU"):
        prepare_launch(Request("rho1", config=LOCAL / "rho1.toml", device="cuda"))
    gpus(2)
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        prepare_launch(Request("rho1", num_gpus=3, config=LOCAL / "rho1.toml", device="cuda"))


LAUNCHED = """
import runpy, sys
run, runpy.run_module = runpy.run_module, lambda name, **_: print(name, sys.modules.get("mlflow", "to be had"))
run("wmtp_ds.deepspeed_launcher", run_name="__main__")
"""


def test_deepspeeds_launcher_starts_without_mlflow():
    """Which its autotuner would import: a third of its start."""
    done = subprocess.run([sys.executable, "-c", LAUNCHED], capture_output=True, text=True, check=True)
    assert done.stdout == "deepspeed.launcher.launch None\n"


# --- starting it and passing signals on ---


def start(monkeypatch: pytest.MonkeyPatch, script: str) -> int:
    """`launch` with a small program in the launcher's place."""
    monkeypatch.setattr(launching, "prepare_launch", lambda _: ([sys.executable, "-c", script], dict(os.environ)))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code = launch(Request("rho1"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return code


@pytest.mark.parametrize(("number", "part"), [(9, "SIGKILL: by somebody, or by the system"), (11, "SIGSEGV: a fault")])
def test_a_rank_that_a_signal_has_ended_is_told_of(monkeypatch, capsys, number, part):
    assert start(monkeypatch, f"import sys; sys.exit(-{number})") == 1
    assert f"error: a rank was ended by {part}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(2)", 2),
        ("import sys; sys.exit(143)", 143),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_launch_returns_the_exit_code(monkeypatch, script, expected):
    assert start(monkeypatch, script) == expected


LAUNCHER = """
import subprocess, sys, pathlib
rank = '''
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path("signal").write_text(str(number))
    if {patient}:
        return
    sys.exit({code})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
pathlib.Path("ready").write_text("")
time.sleep(30)
time.sleep(30)
'''
sys.exit(subprocess.call([sys.executable, "-c", rank]))
"""


@pytest.mark.parametrize(
    ("number", "patient", "code", "expected"),
    [
        (signal.SIGTERM, False, 143, 143),
        (signal.SIGINT, False, 130, 130),
        (signal.SIGUSR1, False, 143, 143),
        (signal.SIGTERM, True, 0, 143),
        (signal.SIGTERM, False, 1, 1),  # it could not save
        (signal.SIGTERM, False, 0, 0),  # it was done
    ],
)
def test_a_signal_reaches_the_ranks_and_a_second_one_ends_them(monkeypatch, tmp_path, number, patient, code, expected):
    """But no echo of it: Ctrl-C of `mlflow run` comes from the terminal, and as SIGTERM from MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "ECHO_SECONDS", 0.5)
    over, impatient = threading.Event(), threading.Event()

    def wait_for(file: str) -> None:
        deadline = time.monotonic() + 20
        while not Path(file).exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def interrupt() -> None:
        wait_for("ready")
        os.kill(os.getpid(), number)
        if patient:
            wait_for("signal")
            os.kill(os.getpid(), signal.SIGTERM)
            if not over.wait(1.0):
                impatient.set()
                os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    assert start(monkeypatch, LAUNCHER.format(patient=patient, code=code)) == expected
    over.set()
    thread.join()
    assert time.monotonic() - began < 20
    assert impatient.is_set() is patient
    assert Path("signal").read_text() == str(int(number))


# --- the process of one rank ---


@pytest.fixture
def rank_environment(here, gpus, monkeypatch):
    """Set the launcher's variables; None takes them away."""
    gpus(0)
    monkeypatch.setattr(ranks, "_LAST_WORD_SECONDS", 0.2)

    def set_place(where: Place | None) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if where is not None:
            for name, value in zip(
                ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"), vars(where).values(), strict=True
            ):
                monkeypatch.setenv(name, str(value))

    return set_place


def run_rank(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        ranks.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


RHO1 = ("--stage", "rho1", "--config", str(LOCAL / "rho1.toml"))


def test_a_rank_trains(rank_environment, monkeypatch):
    seen = []
    monkeypatch.setattr(ranks, "train_rank", lambda request, where: seen.append((request, where)) or 143)
    rank_environment(place(1, 2))
    assert run_rank("--local_rank=1", *RHO1, "--num_gpus", "2") == 143
    assert seen == [(Request("rho1", num_gpus=2, config=LOCAL / "rho1.toml"), place(1, 2))]


def test_a_surplus_rank_leaves_before_it_reads_anything(rank_environment, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "train_rank", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(Request, "load", lambda *_, **__: pytest.fail("it reads the config"))
    rank_environment(place(3, 4))
    assert run_rank("--local_rank=3", *RHO1, "--num_gpus", "2") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("where", [None, place(0, 1)], ids=["no launcher", "one rank"])
def test_the_launcher_is_started_in_place_of_this_process(rank_environment, monkeypatch, where):
    started = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((path, command, environment))
        sys.exit(0)

    monkeypatch.setattr(os, "execve", execve)
    rank_environment(where)
    assert run_rank(*RHO1, "--num_gpus", "4") == 0
    ((path, command, environment),) = started
    assert path == command[0] == sys.executable
    assert command[-9:] == ["wmtp_ds.rank", *Request("rho1", num_gpus=4, config=LOCAL / "rho1.toml").arguments()]
    assert "RANK" not in environment


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ("--stage", "critic", "--config", str(LOCAL / "rho1.toml")),
            "error: stage_configs/local/rho1.toml is a config",
        ),
        (("--stage", "rho1", "--config", "nowhere.toml"), "error: nowhere.toml: 1 problem"),
        ((*RHO1, "--override", "training.learning_rat=1"), 'did you mean "training.learning_rate"'),
        ((*RHO1, "--num_gpus", "3"), "error: --num_gpus 3 does not fit the launcher's 2 ranks"),
        ((*RHO1, "--num_gpus", "0"), "Error: Invalid value for '--num_gpus'"),
        (("--config", "x"), "Error: Missing option '--stage'"),
        ((*RHO1, "--frobnicate"), "Error: No such option"),
        ((*RHO1, "more"), "Error: Got unexpected extra argument"),
    ],
)
def test_what_is_wrong_is_said_once(rank_environment, capsys, arguments, part):
    rank_environment(place(0, 2))
    assert run_rank("--local_rank=0", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert "Traceback" not in err
    rank_environment(place(1, 2))
    began = time.monotonic()
    assert run_rank("--local_rank=1", *arguments) == 2
    assert time.monotonic() - began >= 0.2, "local rank 0 gets its time to speak"
    assert capsys.readouterr() == ("", "")


def test_a_run_error_ends_with_1(rank_environment, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise RunError("the disk is full")

    monkeypatch.setattr(ranks, "train_rank", fail)
    rank_environment(place(0, 2))
    assert run_rank("--local_rank=0", *RHO1) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:4242")


def wrapped() -> RunError:
    """As a checkpoint that is cut short wraps what has stopped it."""
    error = CutShortError("step_2 was not finished", LOST)
    error.__cause__ = LOST
    return error


class FakePeers:
    """Of rank 0 on machine 0."""

    own = Peer(0, 0, "box-0", 1)

    def __init__(self, loss: Loss | None = None):
        self.loss, self.said, self.reported = loss, [], []

    def find_loss(self) -> Loss | None:
        return self.loss

    def say(self, text: str) -> None:
        self.said.append(text)

    def report_own_end(self, words: str) -> None:
        self.reported.append(words)


@pytest.mark.parametrize("error", [LOST, wrapped()])
@pytest.mark.parametrize(
    ("loss", "said", "waits"),
    [
        (None, "rank 0 waits in vain for another one, though all give signs of life (", True),
        (Loss("rank 1 (node 0, box-0): no sign of life", [0]), "rank 1 (node 0, box-0): no sign", True),
        # Another machine's launcher has no word here: nothing to wait for.
        (Loss("rank 2 (node 1, box-1): no sign of life", [1]), "rank 2 (node 1, box-1): no sign", False),
    ],
)
def test_a_rank_that_lost_another_leaves_it_the_word(monkeypatch, error, loss, said, waits):
    monkeypatch.setattr(ranks, "_LAST_WORD_SECONDS", 0.2)
    monkeypatch.setattr(Interruption, "any_seen", False)
    monkeypatch.setattr(Peers, "current", peers := FakePeers(loss))
    began = time.monotonic()
    assert ranks._say(error) == 1
    assert (time.monotonic() - began >= 0.2) is waits
    before = "step_2 was not finished: " if isinstance(error, CutShortError) else ""
    assert peers.said[0].startswith(before + said)
    assert peers.reported == []


@pytest.mark.parametrize(
    "words",
    [
        "[../gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:4242",
        "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete",
        "[/pytorch/gloo/transport/tcp/pair.cc:451] Application timeout caused pair closure",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_the_words_of_gloo_and_nccl_for_a_peer_that_is_gone(words):
    assert distributed.is_loss_of_a_peer(RuntimeError(words))
    assert not distributed.is_loss_of_a_peer(ValueError(words))


def test_a_rank_that_was_asked_to_end_says_nothing_of_others(monkeypatch, capsys):
    monkeypatch.setattr(Interruption, "any_seen", True)
    monkeypatch.setattr(Peers, "current", peers := FakePeers())
    assert ranks._say(LOST) == 1
    assert (capsys.readouterr().err, peers.said) == ("", [])


@pytest.mark.parametrize("error", [RuntimeError("shapes do\n not fit"), RunError("shapes do not fit"), KeyError()])
def test_other_machines_hear_of_a_ranks_own_error(monkeypatch, capsys, error):
    monkeypatch.setattr(Peers, "current", peers := FakePeers())
    assert ranks._say(error) == 1
    assert peers.reported == ["KeyError" if isinstance(error, KeyError) else "shapes do not fit"]
    assert peers.said == []


def test_a_ranks_own_error_is_said_whole(capsys):
    assert ranks._say(RuntimeError("shapes do not fit")) == 1
    assert "RuntimeError: shapes do not fit" in capsys.readouterr().err
    assert ranks._say(RunError("the disk is full")) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_ctrl_c_ends_with_130(rank_environment, monkeypatch, capsys):
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "train_rank", interrupt)
    rank_environment(place(0, 1))
    assert run_rank(*RHO1) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_rank_of_a_world_that_shrank(rank_environment, monkeypatch):
    """Two of four ranks are left: they are a world of two, and the process group must know."""
    import wmtp_ds.train

    seen = []
    monkeypatch.setattr(ranks, "die_with_parent", lambda: None)
    monkeypatch.setattr(ranks, "share_cores", lambda count: seen.append(("cores shared by", count)))
    monkeypatch.setattr(ranks, "quiet", lambda *_: None)
    monkeypatch.setattr(wmtp_ds.train, "train", lambda *_, **__: seen.append(os.environ["WORLD_SIZE"]) or 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    rank_environment(place(1, 4))
    assert ranks.train_rank(Request("rho1", num_gpus=2, config=LOCAL / "rho1.toml"), place(1, 4)) == 0
    assert seen == [("cores shared by", 2), "2"]
    assert os.environ["LOCAL_SIZE"] == "2"


# --- many machines ---

TWO = Request("rho1", num_gpus=3, nnodes=2, node_rank=1, master_addr="first", master_port=1234, resume="auto")


def options_of(command: list[str]) -> dict[str, str]:
    return dict(part.removeprefix("--").split("=", 1) for part in command[3 : command.index("--module")])


def test_the_launcher_of_one_machine_of_two():
    command = launcher_command([0, 1, 2], TWO, Meeting.of(TWO, {}))
    options = options_of(command)
    assert json.loads(base64.urlsafe_b64decode(options["world_info"])) == {"node-0": [0, 1, 2], "node-1": [0, 1, 2]}
    assert (options["node_rank"], options["master_addr"], options["master_port"]) == ("1", "first", "1234")
    # The ranks know from the launcher where they are.
    assert command[command.index("--module") + 2 :] == Request("rho1", num_gpus=3, resume="auto").arguments()


def test_where_ranks_meet():
    assert Meeting.of(replace(TWO, master_port=None), {}) == Meeting(2, 1, "first", 29500)
    # A script for many machines runs on one, too.
    assert Meeting.of(replace(TWO, nnodes=1, node_rank=0), {}) == Meeting(1, 0, "127.0.0.1", 1234)
    alone = Meeting.of(Request("rho1"), {})
    assert (alone.nnodes, alone.node_rank, alone.address) == (1, 0, "127.0.0.1")
    assert alone.port >= 1024
    options = options_of(launcher_command([0], Request("rho1")))
    assert (options["node_rank"], options["master_addr"]) == ("0", "127.0.0.1")


@pytest.mark.parametrize(
    ("changes", "environ", "said"),
    [
        ({"node_rank": None}, {}, "--nnodes 2 needs --node_rank: --node_rank numbers the machines from 0"),
        ({"master_addr": None}, {}, "--nnodes 2 needs --master_addr"),
        ({"node_rank": 2}, {}, "--node_rank 2: with --nnodes 2 it is at most 1."),
        ({"nnodes": None}, {}, "--node_rank needs --nnodes"),
        ({"nnodes": None, "node_rank": None}, {}, "--master_addr needs --nnodes"),
        ({"nnodes": 1, "node_rank": 1}, {}, "--node_rank 1: with --nnodes 1 it is at most 0."),
        ({}, {"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 of these commands, and --nnodes is 2"),
        (
            {"nnodes": None, "node_rank": None, "master_addr": None},
            {"SLURM_STEP_NUM_TASKS": "2"},
            "srun has started 2 of these commands, and --nnodes is 1",
        ),
    ],
)
def test_half_of_a_meeting_is_refused(here, monkeypatch, changes, environ, said):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        prepare_launch(replace(TWO, config=LOCAL / "rho1.toml", **changes))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("environ", [{}, {"SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": ""}])
def test_one_command_a_machine_is_right_under_slurm(environ):
    assert Meeting.of(TWO, environ).nnodes == 2


def test_a_resume_counts_the_ranks_of_all_machines(here, monkeypatch):
    seen = []
    monkeypatch.setattr(launching, "fit_ranks", lambda resolved, resume, ranks: seen.append(ranks))
    command, _ = prepare_launch(replace(TWO, stage="baseline", config=LOCAL / "baseline.toml", resume="never"))
    assert seen == [6]
    assert options_of(command)["node_rank"] == "1"


def test_machines_are_the_launchers_matter():
    with pytest.raises(UserError, match="--nnodes is for commands that start the launcher"):
        decide(place(0, 2), TWO)


def test_before_anything_else_machines_are_compared(here, monkeypatch):
    """As soon as ranks can talk to each other."""
    import wmtp_ds.train as training

    def refuse(resolved, folder, data, critic):
        assert folder.root == Path("checkpoints/compared")
        assert folder._lock is not None
        assert len(data.train)
        raise UserError("two machines")

    started = []
    monkeypatch.setattr(training.engine, "start", lambda device, patience: started.append(patience))
    monkeypatch.setattr(training, "check_machines", refuse)
    overrides = ('checkpoint.save_dir="checkpoints/compared"', "runtime.peer_timeout=7")
    resolved = Request("baseline", config=LOCAL / "baseline.toml", override=overrides).load()
    with pytest.raises(UserError, match="two machines"):
        training.train(resolved)
    assert started == [7.0]


# --- the script itself, as a user runs it ---

WATCH = f"""
import os, runpy, sys
sys.argv = sys.argv[1:]
os.execve = lambda *_: sys.exit(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def run_script(cwd: Path, *arguments: str, watch: bool = False) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "MLFLOW_", "RANK"))}
    script = [sys.executable, *(["-c", WATCH] if watch else []), "bin/train_stage.py", *arguments]
    return subprocess.run(script, cwd=cwd, env=kept, capture_output=True, text=True, timeout=60)


def test_without_a_model_it_says_which_path_and_which_command_at_once(tmp_path):
    for name in ("stage_configs", "ds_configs", "bin"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    began = time.monotonic()
    done = run_script(tmp_path, "--stage", "rho1", "--num_gpus", "4")
    seconds = time.monotonic() - began
    assert (done.returncode, done.stdout) == (2, "")
    assert seconds < 8
    for part in (
        "error: stage_configs/rho1.toml: 4 problems",
        "storage/models/meta-llama-mtp does not exist",
        "put the model there: a folder with config.json (n_future_tokens), safetensors and tokenizer; "
        "to try without it: wmtp-ds model micro, then --config stage_configs/local/rho1.toml",
        "storage/models/ref-sheared-llama-2.7b does not exist",
        "put the model there: a folder with config.json, safetensors and tokenizer",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    done = run_script(tmp_path, "--stage", "rho1", "--config", "stage_configs/local/rho1.toml", watch=True)
    assert done.returncode == 2
    assert "storage/models/micro-policy does not exist" in done.stderr
    assert "wmtp-ds model micro" in done.stderr
    assert done.stdout == "HEAVY []\n", "it stops before any library is loaded"


def test_a_launch_needs_no_heavy_library(checkout):
    """Seconds before the launcher is started, which imports them itself."""
    options = ("--override", 'mlflow.tracking_uri=""', "--override", 'checkpoint.save_dir="checkpoints/watched"')
    done = run_script(checkout, "--stage", "rho1", "--config", "stage_configs/local/rho1.toml", *options, watch=True)
    assert (done.returncode, done.stdout) == (0, "HEAVY []\n"), done.stderr


def test_its_help_needs_no_heavy_library(tmp_path):
    done = run_script(REPOSITORY, "--help", watch=True)
    assert done.returncode == 0
    assert "Example: deepspeed bin/train_stage.py --stage rho1 --num_gpus 4" in done.stdout
    assert done.stdout.endswith("HEAVY []\n")
    assert "--local_rank" not in done.stdout


TORN_DOWN = """
import atexit, os, sys
from unittest.mock import Mock
from wmtp_ds import rank
from wmtp_ds.launch import Place

for name in ("resolve_device", "check_compiler", "check_port", "check_kernels", "enter_rank"):
    setattr(rank, name, lambda *arguments: None)
rank.run_rank = lambda work: 0

class Library:
    def __del__(self):
        os.abort()

loaded = Library()
place = Place.of({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"})
code = rank.train_rank(Mock(num_gpus=None), place)
atexit.register(print, "handled", end="")
sys.exit(code)
"""


def test_a_fault_while_the_interpreter_is_taken_down_is_no_fault_of_the_run() -> None:
    done = subprocess.run([sys.executable, "-c", TORN_DOWN], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled"), done.stderr
