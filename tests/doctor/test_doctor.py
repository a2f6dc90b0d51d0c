"""``wmtp-ds doctor``: each check in good and in bad circumstances, and the command."""

import errno
import http.server
import importlib.metadata
import json
import mmap
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from wmtp_ds.cli.doctor import doctor
from wmtp_ds.config import load_config
from wmtp_ds.doctor import examination, machine, software
from wmtp_ds.doctor.examination import Needs
from wmtp_ds.doctor.finding import Finding, examine
from wmtp_ds.errors import RunError


def one(findings) -> Finding:
    [finding] = findings
    return finding


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def write_program(file: Path, said: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


# --- software ---


def test_this_interpreter_will_do(monkeypatch):
    assert one(software.python()).status == "ok"
    monkeypatch.setattr(software, "_OLDEST", (4, 0))
    assert one(software.python()).status == "failure"


def test_an_odd_system_is_warned_about(monkeypatch):
    monkeypatch.setattr(software.platform, "system", lambda: "Darwin")
    assert one(software.python()).status == "warning"


def test_declared_libraries_are_there():
    found = by_name(software.libraries())
    assert {"torch", "deepspeed", "transformers", "mlflow"} <= found.keys()
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["torch"].text == torch.__version__


def test_a_library_that_is_missing_or_old():
    found = by_name(software.libraries({"no-such-thing": ">=2", "torch": ">=999", "numpy": ""}))
    assert found.keys() == {"no-such-thing", "torch"}
    assert found["no-such-thing"] == Finding(
        "no-such-thing", "failure", "not installed", "pip install 'no-such-thing>=2'"
    )
    assert found["torch"].status == "failure"
    assert found["torch"].mend == "pip install 'torch>=999'"


def test_a_builds_own_tag_does_not_make_it_older(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert one(software.libraries({"torch": ">=2.13"})).status == "ok"


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there are GPUs: of each the major compute capability and the share of free memory."""

    def pretend(*kinds: tuple[int, float]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="NVIDIA X", major=kinds[i][0], minor=0)
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(kinds[i][1] * 80 * 2**30), 80 * 2**30))
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
        monkeypatch.setattr(torch.version, "cuda", "12.8")

    return pretend


def test_gpus_are_listed(gpu):
    gpu((9, 0.99), (7, 0.99), (9, 0.5))
    first, old, full, cuda = software.gpus("auto")
    assert first == Finding("gpu 0", "ok", "NVIDIA X, 80 GiB (79 free), compute capability 9.0")
    assert old.status == "warning"
    assert "bfloat16" in old.mend
    assert full.status == "warning"
    assert "nvidia-smi" in full.mend
    assert cuda == Finding("cuda", "ok", "12.8, nccl 2.27.5")


@pytest.mark.parametrize(
    ("driver", "cuda", "device", "status", "part"),
    [
        ("", None, "auto", "ok", "there is none"),
        ("", None, "cuda", "failure", "runtime.device is cuda"),
        ("570.1", None, "auto", "failure", "this build of torch cannot use them"),
        ("570.1", "12.8", "auto", "failure", "torch (CUDA 12.8) finds none"),
    ],
)
def test_no_gpu(gpu, monkeypatch, tmp_path, driver, cuda, device, status, part):
    gpu()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", str(tmp_path))
    if driver:
        write_program(tmp_path / "nvidia-smi", driver)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = one(software.gpus(device))
    assert found.status == status
    assert part in found.text
    assert driver in found.mend


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("MissingCUDAException: CUDA_HOME does not exist, unable to compile", "Set CUDA_HOME to your CUDA toolkit."),
        ("ImportError: cannot import name", "pip install --upgrade deepspeed"),
    ],
)
def test_deepspeed_that_cannot_be_imported(monkeypatch, said, mend):
    done = subprocess.CompletedProcess([], 1, "", f"Traceback\n{said}\n")
    monkeypatch.setattr(software.subprocess, "run", lambda *_, **__: done)
    assert one(software.deepspeed()) == Finding("deepspeed import", "failure", said, mend)


def test_compilers_of_this_machine():
    found = by_name(software.compilers(True, "cpu"))
    assert found["ninja"].status == "ok"
    there = any(shutil.which(name) for name in ("c++", "g++"))
    assert found["c++ compiler"].status == ("ok" if there else "failure")


@pytest.mark.parametrize(("offload", "device", "status"), [(True, "cpu", "failure"), (False, "cpu", "warning")])
def test_no_compiler(monkeypatch, offload, device, status):
    monkeypatch.setattr(software.shutil, "which", lambda *_, **__: None)
    found = by_name(software.compilers(offload, device))
    assert found["c++ compiler"].status == status
    assert "build-essential" in found["c++ compiler"].mend
    assert found["ninja"].status == status


@pytest.mark.parametrize(
    ("release", "offload", "status"),
    [("12.8", True, "ok"), ("13.0", True, "failure"), ("13.0", False, "ok"), (None, True, "failure")],
)
def test_nvcc(gpu, monkeypatch, tmp_path, release, offload, status):
    gpu((9, 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if release:
        write_program(tmp_path / "bin/nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    found = by_name(software.compilers(offload, "cuda"))["nvcc"]
    assert found.status == status
    assert release is None or release in found.text


def test_kernels_are_compared_with_torch(monkeypatch):
    found = one(software.kernels())
    assert found.status == "ok"
    import wmtp_kernels

    right = wmtp_kernels.weighted_linear_cross_entropy
    for wrong in (lambda loss: loss * 1.01, lambda loss: loss * float("nan")):
        monkeypatch.setattr(
            wmtp_kernels, "weighted_linear_cross_entropy", lambda *a, wrong=wrong: (wrong(right(*a)[0]), right(*a)[1])
        )
        assert one(software.kernels()).status == "failure"


# --- the machine ---


def free_space(monkeypatch, free: int) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(total=free, used=0, free=free))


@pytest.mark.parametrize(
    ("free", "needed", "status"),
    [(50, 0, "ok"), (5, 0, "warning"), (5, 4, "ok"), (5, 6, "failure"), (50, 60, "failure")],
)
def test_disk(monkeypatch, tmp_path, free, needed, status):
    free_space(monkeypatch, free * 2**30)
    found = one(machine.disk(tmp_path / "not/there/yet", needed * 2**30))
    assert found.status == status
    assert bool(found.mend) == (status != "ok")
    assert f"{free}.0 GiB free" in found.text
    assert not (tmp_path / "not").exists()


def test_a_disk_that_may_not_be_written_to(monkeypatch, tmp_path):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    found = one(machine.disk(tmp_path))
    assert found.status == "failure"
    assert "Read-only file system" in found.text


@pytest.mark.parametrize(("total", "status"), [(64 * 2**20, "warning"), (8 * 2**30, "ok")])
def test_shared_memory(monkeypatch, total, status):
    free_space(monkeypatch, total)
    found = by_name(machine.memory())["shared memory"]
    assert found.status == status
    assert ("--shm-size" in found.mend) == (status == "warning")


@pytest.mark.parametrize(("files", "status"), [(256, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(monkeypatch, files, status):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (files, files))
    assert by_name(machine.limits())["open files"].status == status


def test_a_port_that_is_taken():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert by_name(machine.ports(port))[f"port {port}"].status == "warning"
    assert by_name(machine.ports(port))[f"port {port}"].status == "ok"


def test_a_machine_without_an_address(monkeypatch):
    def fail(_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(machine.socket, "gethostbyname", fail)
    assert by_name(machine.ports())["host name"].status == "warning"


class Server:
    """Answers every request alike."""

    def __init__(self, status: int, body: bytes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize(("status", "expected"), [(200, "ok"), (401, "warning"), (500, "warning")])
def test_a_tracking_server(status, expected):
    with Server(status, b"{}") as server:
        found = one(machine.tracking(f"http://me:planted-secret@{server.address}"))
    assert found.status == expected
    assert "planted-secret" not in found.text + found.mend
    assert expected == "ok" or "track sync" in found.mend


def test_a_tracking_server_that_is_away():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert one(machine.tracking(f"http://127.0.0.1:{probe.getsockname()[1]}")).status == "warning"


def test_a_store_in_a_file(tmp_path, monkeypatch):
    assert one(machine.tracking(f"sqlite:///{tmp_path}/new/mlflow.db")).status == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert one(machine.tracking(f"sqlite:///{tmp_path}/mlflow.db")).status == "warning"
    assert one(machine.tracking("")).text.startswith("tracking is off")


def test_the_sandbox(monkeypatch):
    from wmtp_ds.data import sandbox

    monkeypatch.setattr(sandbox, "sandbox_kind", lambda: "plain")
    monkeypatch.setattr(sandbox, "what_is_missing", lambda: "the code can reach the network")
    assert one(machine.sandbox()).status == "warning"
    monkeypatch.setattr(sandbox, "what_is_missing", lambda: "")
    assert one(machine.sandbox()) == Finding("sandbox", "ok", "plain")

    def fail():
        raise RunError("no sandbox works on this machine.\n  for many reasons")

    monkeypatch.setattr(sandbox, "sandbox_kind", fail)
    found = one(machine.sandbox())
    assert found.status == "warning"
    assert "bubblewrap" in found.mend
    assert "\n" not in found.text


def test_shared_memory_that_killed_processes_left(tmp_path):
    """What a process has open or mapped, what is young and what is somebody else's stays."""
    names = ["deepspeed_allreduce_buffer_0_127.0.0.1_29500_0", "nccl-aB3xYz", "torch_12_34"]
    stale, mapped, opened = (tmp_path / name for name in names)
    young, other = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29501_0", tmp_path / "somebody-elses"
    for path in (stale, mapped, opened, young, other):
        path.write_bytes(bytes(8192))
        if path is not young:
            os.utime(path, (1, 1))
    (tmp_path / "nccl-link").symlink_to(other)
    descriptor = os.open(mapped, os.O_RDWR)
    memory = mmap.mmap(descriptor, 8192)
    os.close(descriptor)
    with opened.open("rb"):
        found = one(machine.leftovers(place=tmp_path))
        assert found.status == "warning"
        assert found.text.startswith("1 files, 0.0 GiB, in ")
        assert stale.name in found.text
        assert found.mend == "wmtp-ds doctor --clean"
        assert one(machine.leftovers(True, tmp_path)).text.startswith("removed 1 files")
        assert not stale.exists()
        assert all(path.exists() for path in (mapped, opened, young, other))
        assert one(machine.leftovers(True, tmp_path)).text == "nothing"
    memory.close()
    assert machine.left_in_shared_memory(tmp_path) == [mapped, opened]
    assert machine.left_in_shared_memory(tmp_path, processes=tmp_path) == [mapped, opened]


@pytest.fixture
def shared_memory():
    """A folder where files are what they are in mappings, too: not so on every file system."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tests-") as folder:
        yield Path(folder)


def test_what_a_killed_process_had_mapped_is_left(shared_memory):
    """With a real one, while it lives and after kill -9."""
    file = shared_memory / "deepspeed_allreduce_buffer_0_host_1_0"
    file.write_bytes(bytes(8192))
    os.utime(file, (1, 1))
    holds = (
        "import mmap, os, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "memory = mmap.mmap(file.fileno(), 8192)\n"
        "os.closerange(3, 256)\n"  # the mapping alone
        "print('mapped', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holds, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mapped\n"
    assert machine.left_in_shared_memory(shared_memory) == []
    process.kill()
    process.wait()
    assert machine.left_in_shared_memory(shared_memory) == [file]


# --- all of it ---


def test_a_check_that_breaks_is_a_finding():
    def broken():
        yield Finding("first", "ok", "fine")
        raise KeyError("half\ninstalled")

    first, second = examine("name", broken)
    assert first.name == "first"
    assert (second.name, second.status) == ("name", "failure")
    assert second.text == "KeyError: 'half\\ninstalled'"


def test_what_a_config_needs(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    local = Needs.of(load_config(Path("stage_configs/local/rho1.toml")))
    assert local.device == "cpu"
    assert local.save_dir == Path("checkpoints/local-rho1")
    assert not local.offload
    assert 0 < local.checkpoints < 2**30
    # 6.7 billion weights: 12 bytes of masters and moments, 2 of weights; three checkpoints while one is written, and
    # two exports of 2 bytes.
    large = Needs.of(load_config(Path("stage_configs/rho1.toml"), checks=False))
    assert large.checkpoints == pytest.approx((3 * 14 + 2 * 2) * 6.74e9, rel=0.02)
    critic = Needs.of(load_config(Path("stage_configs/critic.toml"), checks=False))
    assert critic.checkpoints == 0
    offloaded = Needs.of(
        load_config(Path("stage_configs/rho1.toml"), ['deepspeed.config="ds_configs/zero3_offload.json"'], checks=False)
    )
    assert offloaded.offload


@pytest.fixture
def findings(monkeypatch):
    """What the command is to find."""

    class Findings(list):
        cleaned = None

        def examination(self, needs, clean):
            self.cleaned = clean
            return iter(self)

    found = Findings()
    monkeypatch.setattr(examination, "examination", found.examination)
    return found


def test_the_command(findings):
    findings += [Finding("a", "ok", "fine"), Finding("b", "warning", "slow", "Wait.")]
    done = CliRunner().invoke(doctor, [], standalone_mode=False)
    assert done.return_value == 0
    assert done.output.splitlines() == [
        "ok       a: fine",
        "warning  b: slow",
        "         -> Wait.",
        "0 failures, 1 warnings",
    ]
    assert findings.cleaned is False
    assert CliRunner().invoke(doctor, ["--clean"], standalone_mode=False).return_value == 0
    assert findings.cleaned is True
    findings.append(Finding("c", "failure", "broken", "Mend it."))
    done = CliRunner().invoke(doctor, ["--json"], standalone_mode=False)
    assert done.return_value == 1
    assert [entry["status"] for entry in json.loads(done.output)] == ["ok", "warning", "failure"]


def test_every_check_is_made_on_this_machine(tmp_path, monkeypatch):
    """The real thing: nothing here fails, or these tests could not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(software, "deepspeed", lambda: iter([]))  # seconds; make demo would tell
    names = [finding.name for finding in examination.examination(Needs()) if finding.status != "failure"]
    for expected in ("python", "torch", "loss kernels", "disk at checkpoints", "memory", "loopback", "mlflow"):
        assert expected in names
    assert list(tmp_path.iterdir()) == []


def test_from_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "wmtp_ds", "doctor", "--override", "a=1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--override needs a CONFIG" in done.stderr
