"""Signals end a run between two steps."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wmtp_ds.signals import Interruption

SECOND = """
import os, signal
from wmtp_ds.signals import Interruption
with Interruption() as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signal == signal.SIGTERM
    print("still here", flush=True)
    interruption._since -= 3
    os.kill(os.getpid(), signal.{second})
    print("not any more")
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
    with Interruption() as interruption:
        assert interruption.signal == 0
        os.kill(os.getpid(), number)
        assert interruption.signal == (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize(("second", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_second_signal_ends_it_at_once_but_not_an_echo(second, code):
    done = subprocess.run([sys.executable, "-c", SECOND.format(second=second)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "still here\n", "")


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
