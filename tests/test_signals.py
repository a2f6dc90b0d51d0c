"""Signals end a run between two steps."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from wmtp_ds.signals import Interruption

SECOND = """
import ctypes, os, signal, time
from wmtp_ds import signals
signals.ECHO_SECONDS = 0.5
with signals.Interruption() as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signal == signal.SIGTERM
    print("still here", flush=True)
    time.sleep(1.5)
    {more}
    os.kill(os.getpid(), signal.{second})
    time.sleep(10)
    print("not any more")
"""

# The main thread is somewhere in C, as in a collective that never ends, and runs no handler any more.
STUCK = """
    import subprocess
    subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -{second} {{os.getpid()}}"])
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(256)
    lock(mutex)
    lock(mutex)
"""

# An echo that comes while nothing of Python can run, for longer than echoes take: as when a large library is imported.
BUSY = """
import ctypes, os, signal, subprocess, time
from wmtp_ds import signals
signals.ECHO_SECONDS = 0.5
with signals.Interruption() as interruption:
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signal == signal.SIGINT
    subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -{second} {{os.getpid()}}"])
    lock, mutex, until = ctypes.PyDLL(None), ctypes.create_string_buffer(256), (ctypes.c_long * 2)(int(time.time()) + 3)
    lock.pthread_mutex_lock(mutex)
    lock.pthread_mutex_timedlock(mutex, until)
    time.sleep(0.5)
    assert interruption.signal == signal.SIGINT
    print("still here", flush=True)
"""

ORPHAN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import time
from wmtp_ds.signals import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
'''], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Interruption() as interruption:
        assert interruption.signal == 0
        os.kill(os.getpid(), number)
        assert interruption.signal == (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def ended(script: str) -> tuple[int, str, str]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 8
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("second", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_second_signal_ends_it_at_once_but_not_an_echo(second, code):
    assert ended(SECOND.format(second=second, more="")) == (code, "still here\n", "")


def test_a_second_signal_ends_a_process_that_hangs_outside_of_python():
    more = STUCK.format(second="TERM")
    assert ended(SECOND.format(second="SIGTERM", more=more)) == (143, "still here\n", "")


def test_an_echo_is_one_however_late_python_comes_to_it():
    """A launcher's SIGTERM a moment after Ctrl-C, while MLflow is imported: the run must still be saved."""
    assert ended(BUSY.format(second="TERM")) == (0, "still here\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_rank_does_not_outlive_its_launcher():
    done = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    orphan = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{orphan}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.02)
    os.kill(orphan, signal.SIGKILL)
    pytest.fail("it trains on")


@pytest.mark.parametrize(("launched", "code"), [(True, -signal.SIGTERM), (False, 0)])
def test_a_rank_whose_launcher_is_gone_already_ends(launched: bool, code: int) -> None:
    """Killed while the rank was still importing: nobody will send it a signal."""
    rank = (
        "import os, time\n"
        "while os.getppid() == int(os.environ['PARENT']): time.sleep(0.01)\n"
        "from wmtp_ds.signals import die_with_parent\n"
        "adopted = os.getppid() == 1\n"
        "child = os.fork()\n"  # its end is what the test can see
        "if not child:\n"
        "    os.getppid = lambda: 1\n"
        "    die_with_parent()\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    launcher = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=os.environ | {'PARENT': str(os.getpid())})\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "CROSS_RANK"}
    environment = kept | ({"CROSS_RANK": "0"} if launched else {})
    done = subprocess.run(
        [sys.executable, "-c", launcher, rank], env=environment, capture_output=True, text=True, timeout=60
    )
    assert int(done.stdout) == code, done.stderr
