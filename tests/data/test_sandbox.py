"""The sandbox: its limits, what code inside can see, and what is left of it afterwards.

Every attack is bounded: what would be endless ends by itself after a while, or after so many processes.
"""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.data import sandbox
from wmtp_ds.data.isolation import KINDS
from wmtp_ds.data.sandbox import FunctionRun, Limits, Verdict, run_job, run_python, sandbox_kind, stopped_by
from wmtp_ds.data.seccomp import filter_program
from wmtp_ds.errors import RunError, UserError

QUICK = Limits(cpu_seconds=1.0, wall_seconds=2.0, memory_bytes=256 << 20)


def _works(kind: str) -> bool:
    try:
        return sandbox_kind((kind,)) == kind
    except RunError:
        return False


def test_a_program_reads_and_writes(kinds: tuple[str]) -> None:
    done = run_python("import sys\nprint(input()[::-1])\nsys.stderr.write('é')\nexit(3)", "äb\nc", kinds=kinds)
    assert done.stdout.decode() == "bä\n"
    assert done.stderr.decode() == "é"
    assert (done.exit_code, done.stopped, done.truncated) == (3, None, False)


def test_an_uncaught_exception_is_exit_code_1_with_a_traceback(kinds: tuple[str]) -> None:
    done = run_python("1 / 0", kinds=kinds)
    assert done.exit_code == 1
    assert b"ZeroDivisionError" in done.stderr


def test_a_program_waits_for_its_threads_and_exit_handlers(kinds: tuple[str]) -> None:
    if kinds == ("plain",) and os.geteuid() != 0:
        pytest.skip("threads are refused there")
    program = """
        import atexit, threading
        atexit.register(lambda: print('end'))
        threading.Thread(target=lambda: print('thread')).start()
    """
    assert run_python(textwrap.dedent(program), kinds=kinds).stdout == b"thread\nend\n"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(30)",
        "import signal, time\nfor s in (1, 2, 3, 14, 15, 24, 27): signal.signal(s, signal.SIG_IGN)\ntime.sleep(30)",
        "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nfor i in range(10**12): pass",
    ],
    ids=["busy", "asleep", "deaf", "timer disarmed"],
)
def test_time_runs_out(kinds: tuple[str], program: str) -> None:
    began = time.monotonic()
    done = run_python(program, limits=Limits(cpu_seconds=0.5, wall_seconds=1.0), kinds=kinds)
    assert done.stopped is Verdict.TIMEOUT
    assert time.monotonic() - began < 15


def test_memory_runs_out(kinds: tuple[str]) -> None:
    done = run_python("x = []\nwhile True: x.append(bytearray(10**7))", limits=QUICK, kinds=kinds)
    assert done.stopped is Verdict.MEMORY


def test_output_is_cut(kinds: tuple[str]) -> None:
    limits = Limits(cpu_seconds=2.0, output_bytes=1000, file_bytes=100_000)
    done = run_python("print('x' * 5000)", limits=limits, kinds=kinds)
    assert (done.stdout, done.truncated) == (b"x" * 1000, True)
    endless = run_python("while True: print('x' * 1000)", limits=limits, kinds=kinds)
    assert len(endless.stdout) == 1000
    assert endless.exit_code != 0
    assert b"File too large" in endless.stderr


def test_files_are_limited_and_gone_afterwards(kinds: tuple[str]) -> None:
    before = set(Path(tempfile.gettempdir()).glob("wmtp-sandbox-*"))
    program = """
        import os
        print(os.listdir())
        os.makedirs('a/b')
        open('a/b/c', 'w').write('x')
        os.chmod('a/b', 0)
        os.chmod('a', 0)
        open('big', 'wb').write(b'x' * 10**7)
    """
    done = run_python(textwrap.dedent(program), kinds=kinds)
    assert done.stdout == b"[]\n"
    assert b"File too large" in done.stderr
    assert set(Path(tempfile.gettempdir()).glob("wmtp-sandbox-*")) <= before


def test_the_number_of_processes_is_limited_and_none_stays(kinds: tuple[str], traces: Any) -> None:
    program = traces.mark(
        """
        import os, time
        made = 0
        try:
            for i in range(100):  # at most: bounded where the limit should fail
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(20)
                    os._exit(0)
                made += 1
        except OSError:
            pass
        print(made)
        """
    )
    done = run_python(program, limits=Limits(processes=8, wall_seconds=5.0), kinds=kinds)
    assert int(done.stdout) < 8
    traces.assert_gone()


def test_a_daemon_does_not_outlive_the_run(kinds: tuple[str], traces: Any) -> None:
    program = traces.mark(
        """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(30)
                os._exit(0)
        except OSError:
            pass
        print('left')
        """
    )
    began = time.monotonic()
    assert run_python(program, kinds=kinds).stdout == b"left\n"
    assert time.monotonic() - began < 10
    traces.assert_gone()


def test_the_sandbox_dies_with_its_caller(kinds: tuple[str], traces: Any) -> None:
    program = traces.mark("import time\ntime.sleep(40)")
    caller = (
        f"from wmtp_ds.data.sandbox import *\nrun_python({program!r}, limits=Limits(wall_seconds=40), kinds={kinds})"
    )
    with subprocess.Popen([sys.executable, "-c", caller]) as process:
        deadline = time.monotonic() + 20
        while not traces.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert traces.processes()
        process.kill()
    traces.assert_gone()
    for leftover in Path(tempfile.gettempdir()).glob("wmtp-sandbox-*"):
        if not any(leftover.iterdir()):
            leftover.rmdir()  # the killed caller could not


def test_nothing_of_our_environment_can_be_read(kinds: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMTP_TEST_SECRET", "hunter2")
    program = """
        import glob, os
        print(dict(os.environ))
        for path in glob.glob('/proc/*/environ'):
            try:
                print(open(path).read())
            except OSError:
                pass
    """
    done = run_python(textwrap.dedent(program), kinds=kinds)
    assert done.stdout.startswith(b"{}\n")
    if kinds != ("plain",):  # there, our own processes may be in sight
        assert b"hunter2" not in done.stdout


def test_the_user_is_no_root(kinds: tuple[str]) -> None:
    uid = int(run_python("import os\nprint(os.getuid())", kinds=kinds).stdout)
    assert uid != 0
    if os.geteuid() == 0:
        again = int(run_python("import os\nprint(os.getuid())", kinds=kinds).stdout)
        assert uid > 1000
        assert again != uid


def test_the_network_is_out_of_reach(kinds: tuple[str]) -> None:
    if kinds == ("plain",) and filter_program() is None:
        pytest.skip("no filter on this machine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run_python(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", kinds=kinds)
    assert done.exit_code == 1
    assert b"Error" in done.stderr


@pytest.mark.skipif(not _works("bubblewrap"), reason="bubblewrap does not work here")
def test_bubblewrap_has_a_file_system_of_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    tmp_path.chmod(0o777)
    program = f"""
        import os
        print(os.path.exists({str(secret)!r}), os.getcwd())
        for place in ('/usr/x', '/x', '/etc/x', '/dev/x', {str(tmp_path / "new")!r}):
            try:
                open(place, 'w').write('x')
                print('wrote', place)
            except OSError:
                pass
    """
    done = run_python(textwrap.dedent(program), kinds=("bubblewrap",))
    assert done.stdout == b"False /tmp\n"
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.skipif(not _works("bubblewrap") or filter_program() is None, reason="no filter on this machine")
def test_bubblewrap_refuses_new_namespaces_and_tracing() -> None:
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.unshare(0x10000000), ctypes.get_errno())
        print(libc.ptrace(0, 0, 0, 0), ctypes.get_errno())
        print(libc.clone(0, 0, 0x10000000 | 17, 0) >= 0)
        print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0), ctypes.get_errno())
    """
    done = run_python(textwrap.dedent(program), kinds=("bubblewrap",))
    assert done.stdout == b"-1 1\n-1 1\nFalse\n-1 1\n"


def test_a_filter_is_written_for_machines_that_are_known() -> None:
    for machine in ("x86_64", "aarch64"):
        program = filter_program(machine)
        assert program is not None
        assert len(program) % 8 == 0
        kept = filter_program(machine, keep_group=True)
        assert kept is not None
        assert len(kept) == len(program) + 2 * 16
    assert filter_program("riscv64") is None


def test_runs_of_one_job_do_not_disturb_each_other(kinds: tuple[str]) -> None:
    """Changes to modules and endless loops stay in their own process."""
    spoiler = FunctionRun("import math\nmath.gcd = lambda *a: 7\ndef f(): return math.gcd(4, 6)", (("value", "f()"),))
    endless = FunctionRun("def f():\n    while True: pass", (("value", "f()"),))
    good = FunctionRun("import math\ndef f(): return math.gcd(4, 6)", (("value", "f()"),))
    runs = [spoiler, endless, good]
    reports = run_job(runs, Limits(cpu_seconds=0.5), preload=["math"], kinds=kinds)
    assert reports[0].steps[0].values == (7,)
    assert stopped_by(reports[1]) is Verdict.TIMEOUT
    assert reports[2].steps[0].values == (2,)
    assert [report.complete for report in reports] == [True, False, True]


def test_a_source_with_anything_in_it_arrives(kinds: tuple[str]) -> None:
    texts = ["'", '"""', "\\", "\udc80", "\0", "é", "\r\n"]
    runs = [FunctionRun(f"x = {text!r}", (("value", "x"),)) for text in texts]
    assert [report.steps[0].values[0] for report in run_job(runs, kinds=kinds)] == texts
    [report] = run_job([FunctionRun("x = '\udc80'", (("value", "x"),))], kinds=kinds)
    assert report.steps[-1].error == "UnicodeEncodeError"


def test_without_any_sandbox_nothing_runs() -> None:
    with pytest.raises(UserError, match=r"no sandbox works .*bubblewrap"):
        run_python("print(1)", kinds=())


def test_the_kind_is_one_of_those_described() -> None:
    assert sandbox_kind() in KINDS


def test_a_kind_whose_limit_on_processes_does_not_hold_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = "def f(): return 2\ndef forks(): return 8"
    monkeypatch.setattr(sandbox, "_TRIAL", trial)
    with pytest.raises(UserError, match="limit on processes does not bind"):
        sandbox._choose.__wrapped__(("plain",))
    monkeypatch.setattr(sandbox, "_TRIAL", trial.replace("8", "3"))
    assert sandbox._choose.__wrapped__(("plain",))[0] == "plain"


def test_a_large_input_arrives_whole(kinds: tuple[str]) -> None:
    """Larger than the limit on files, which is for what the program writes."""
    done = run_python("print(len(open('/dev/stdin').read()))", "x" * (6 << 20), kinds=kinds)
    assert done.stdout == b"6291456\n"


def test_what_is_missing_is_told() -> None:
    assert sandbox.what_is_missing(("plain",)).startswith("the code can see this machine's processes")
