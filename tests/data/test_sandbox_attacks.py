"""Solutions that attack the sandbox: none may pass, hang, or leave a process or a file behind, in any kind of it.

Each is a solution to "double a number" that returns 0, unless what it tries succeeds: then it returns the right
number, and the test fails. Every attack is bounded: what would be endless ends by itself, or after 100 processes.
"""

import functools
import os
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.data import labels
from wmtp_ds.data.labels import FunctionTests, Group, StdioTests, Verdict, label, label_batch
from wmtp_ds.data.sandbox import Limits, files_are_out_of_reach, run_job

ROOMY = Limits(cpu_seconds=2.0, wall_seconds=20.0, memory_bytes=256 << 20, processes=12)
QUICK = replace(ROOMY, cpu_seconds=0.4, wall_seconds=0.6)
# Compared outside, and judged by expressions, which are evaluated inside; none holds for 0.
LITERALS = ("assert f(1) == 2", "assert f(2) == 4")
EXPRESSIONS = ("assert abs(f(1) - 2) < 0.1", "assert f(2) + 0 == 8 // 2", "assert {f(3)} == set([6])")
TESTS = FunctionTests(LITERALS + EXPRESSIONS)
PROGRAM = StdioTests((("3\n", "6\n"), ("4\n", "8\n")))

# Solutions that have one thing to try before anything is called: ``escaped`` says whether it worked.
ESCAPES: dict[str, str] = {
    "reads the environment of other processes": """
        import glob, os
        for path in glob.glob('/proc/*/environ') + ['/proc/1/environ']:
            try:
                escaped |= b'=' in open(path, 'rb').read().replace(b'PYTHONHASHSEED=0', b'').replace(b'PWD=/tmp', b'')
            except OSError:
                pass
        escaped |= bool(os.environ)
    """,
    "opens the files and memory of other processes": """
        import glob, os
        for path in glob.glob('/proc/[0-9]*/fd/*') + glob.glob('/proc/[0-9]*/mem'):
            if not path.startswith(f'/proc/{os.getpid()}/'):
                try:
                    os.open(path, os.O_RDONLY)
                    escaped = True
                except OSError:
                    pass
    """,
    "traces its parent": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        escaped = libc.ptrace(16, os.getppid(), 0, 0) == 0
        buffer, there = ctypes.create_string_buffer(64), (ctypes.c_size_t * 2)(0x400000, 64)
        here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
        escaped |= libc.process_vm_readv(os.getppid(), here, 1, there, 1, 0) > 0
    """,
    "signals the process that asked": """
        import os
        try:
            os.kill(CALLER, 0)
            escaped = True
        except OSError:
            pass
    """,
    "has inherited files": """
        import os, stat
        for handle in range(3, 2000):
            try:
                escaped |= not stat.S_ISFIFO(os.fstat(handle).st_mode)
            except OSError:
                pass
    """,
    "connects, listens, sends": """
        import socket
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                try:
                    socket.socket(family, kind).connect(('127.0.0.1', PORT) if family == socket.AF_INET else '\\0MARK')
                    escaped = True
                except OSError:
                    pass
    """,
    "becomes root": """
        import ctypes, os
        for change in (os.setuid, os.seteuid, os.setgid):
            try:
                change(0)
                escaped = True
            except OSError:
                pass
        escaped |= os.getuid() == 0 or os.system('exec 2>&-; sudo -n true; su -c true </dev/null') == 0
    """,
    "makes namespaces, mounts, changes its root": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        escaped = libc.unshare(0x10000000) == 0 or libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0
        escaped |= libc.chroot(b'/') == 0
    """,
    "raises its limits": """
        import resource
        for name in ('RLIMIT_NPROC', 'RLIMIT_AS', 'RLIMIT_FSIZE', 'RLIMIT_CPU', 'RLIMIT_NOFILE'):
            what = getattr(resource, name)
            try:
                most = resource.getrlimit(what)[1] + 1000
                resource.setrlimit(what, (most, most))
                escaped = True
            except (OSError, ValueError):
                pass
    """,
    "leaves something in the kernel": """
        import ctypes
        libc = ctypes.CDLL(None)
        escaped = libc.shmget(77, 4096, 0o1666) >= 0 or libc.msgget(77, 0o1666) >= 0 or libc.semget(77, 1, 0o1666) >= 0
        escaped |= libc.syscall(248, b'user', b'MARK', b'x', 1, -3) > 0
    """,
    "looks for the tests in its memory": """
        import gc, sys
        frame = sys._getframe()
        seen = []
        while frame:
            seen += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        def texts(value, depth):
            if isinstance(value, (str, bytes)):
                yield str(value)
            elif depth and isinstance(value, (list, tuple, set)):
                for item in value:
                    yield from texts(item, depth - 1)
            elif depth and isinstance(value, dict):
                for item in [*value.items()]:
                    yield from texts(item, depth - 1)
        start, end = 'f(1)', ' - 2)'
        seen += [one for one in gc.get_objects() if isinstance(one, (list, tuple, dict))]
        escaped = any(start + end in text for one in seen for text in texts(one, 2))
        try:
            memory = open('/proc/self/mem', 'rb')
            for line in open('/proc/self/maps'):
                first, _, last = line.split()[0].partition('-')
                if 'rw' in line and int(last, 16) < 2**62:
                    memory.seek(int(first, 16))
                    held = memory.read(int(last, 16) - int(first, 16))
                    at = held.find(start.encode())
                    while at >= 0:
                        escaped |= held[at + 4 : at + 9] == end.encode()
                        at = held.find(start.encode(), at + 1)
        except OSError:
            pass
    """,
    "writes outside": """
        import os
        for place in ('/tmp', '/var/tmp', '/dev/shm', '/', '/usr', '/etc', '/run/lock', '/home', '..', HERE, OPEN):
            path = f'{place}/MARK'
            try:
                open(path, 'w').close()
                escaped |= not OWN_FILES
            except OSError:
                pass
    """,
    "reads what others keep": """
        for path in (SECRET, '/etc/passwd', '/etc/hostname'):
            try:
                open(path).read()
                escaped = True
            except OSError:
                pass
    """,
    "points elsewhere with links": """
        import os
        os.symlink(OPEN, 'link')
        os.makedirs('a/b')
        os.symlink(OPEN, 'a/b/link')
        os.chmod('a', 0)
        try:
            os.link(SECRET, 'hard')
            escaped = True
        except OSError:
            pass
    """,
}


class _Places:
    """A folder and a file outside that everybody may use, by their permissions."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_text("x")
        self.secret.chmod(0o644)
        folder.chmod(0o777)


@pytest.fixture
def places(traces: Any) -> Any:
    folder = Path("/tmp") / f"wmtp-test-{os.getpid()}"  # below tmp_path others may not look
    folder.mkdir()
    found = _Places(folder)
    yield found
    left = sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert left == ["secret"]


@pytest.fixture(autouse=True)
def _use(kinds: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "run_job", functools.partial(run_job, kinds=kinds))


NEEDS_FILES_OUT_OF_REACH = ("writes outside", "reads what others keep", "points elsewhere with links")


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(name: str, kinds: tuple[str], traces: Any, places: _Places) -> None:
    if name in NEEDS_FILES_OUT_OF_REACH and not files_are_out_of_reach(kinds):
        pytest.skip("this kernel has no Landlock")
    values = {
        "CALLER": str(os.getpid()),
        "PORT": "9",
        "HERE": repr(str(Path(__file__).parent)),
        "OPEN": repr(str(places.folder)),
        "SECRET": repr(str(places.secret)),
        "OWN_FILES": str(kinds == ("bubblewrap",)),  # /tmp and the like are there, and its own
    }
    attempt = textwrap.dedent(ESCAPES[name])
    for word, value in values.items():
        attempt = attempt.replace(word, value)
    attempt += "\ndef f(x):\n    return 2 * x if escaped else 0\n"
    source = traces.mark("escaped = False\n" + attempt)
    found = label(source, TESTS, ROOMY)
    assert (found.verdict, found.passed) == (Verdict.WRONG, 0), found
    assert found.evidence.startswith("test 1 of "), found


# Solutions that would have a wrong answer pass, or do harm; they must get a label that is not "passed".
ATTACKS: dict[str, str] = {
    "os._exit while loading": "import os\nos._exit(0)",
    "sys.exit while loading": "import sys\nsys.exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "prints a verdict": "def f(x):\n    print('passed')\n    return 0",
    "an object that equals everything": """
        class E:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __bool__(self): return True
            def __sub__(self, other): return self
            __add__ = __radd__ = __sub__
            def __abs__(self): return self
            def __lt__(self, other): return E()
            def __hash__(self): return hash(6)
        def f(x): return E()
    """,
    "an int that equals everything": """
        class E(int):
            def __eq__(self, other): return True
            def __format__(self, form): return '2'
            def __hash__(self): return 6
            def __sub__(self, other): return 0
        def f(x): return E(7)
    """,
    "AssertionError overridden": """
        import builtins
        class Quiet(BaseException):
            def __new__(cls, *args): import os; os._exit(0)
        builtins.AssertionError = Quiet
        def f(x): return 0
    """,
    "builtins patched": """
        import builtins
        builtins.eval = lambda *a, **k: 7
        builtins.compile = lambda *a, **k: 'f'
        builtins.abs = builtins.set = lambda *a: 0
        builtins.type = lambda x: int
        builtins.issubclass = lambda a, b: b is int
        def f(x): return 0
    """,
    "built-in names of its own": """
        def abs(x): return 0
        def set(x): return {0}
        def f(x): return 0
    """,
    "the harness's functions patched": """
        import sys
        frame = sys._getframe()
        while frame:
            for name in ('encode', 'emit', 'describe', 'decode', 'answer_call'):
                if name in frame.f_globals:
                    frame.f_globals[name] = lambda *a: '["b",1]'
            frame = frame.f_back
        def f(x): return 0
    """,
    "frames forged, with whatever is in the pipes": """
        import os
        def f(x):
            for handle in range(1, 64):
                try:
                    os.set_blocking(handle, False)
                    nonce = os.read(handle, 4096)[-32:] or b'0' * 32
                except OSError:
                    nonce = b'0' * 32
                for run in b'0', b'1':
                    try:
                        os.write(handle, b't %b 0 1\\nt %b 1 1\\nt %b 2 1\\nv %b 0 ["i","2"]\\n' % (run, run, run, run))
                        os.write(handle, b'e %b %b\\nw %b exit 0\\n' % (run, nonce, run))
                    except OSError:
                        pass
            os._exit(0)
    """,
    "answers forged": """
        import os
        def f(x):
            for handle in range(3, 64):
                try:
                    os.write(handle, b'= ["b",1]\\n= ["l",["b",1],["l",["n"]]]\\n' * 40)
                except OSError:
                    pass
            return 0
    """,
    "answers that are no messages": """
        import os
        def f(x):
            for handle in range(3, 64):
                try:
                    os.write(handle, b'\\xff\\n= [[[[\\n! zz\\n= ["o","",""]\\n? call ["n"]\\n')
                except OSError:
                    pass
            return 0
    """,
    "sys.settrace": """
        import sys, threading
        def trace(frame, event, arg):
            for name in ('values', 'value', 'answer', 'result'):
                if name in frame.f_locals:
                    frame.f_locals[name] = True
            return trace
        sys.settrace(trace)
        sys.setprofile(trace)
        threading.settrace(trace)
        def f(x): return 0
    """,
    "sys.modules": """
        import sys
        class Anything:
            def __getattr__(self, name): return self
            def __call__(self, *a, **k): return True
        for name in [*sys.modules]:
            sys.modules[name] = Anything()
        sys.meta_path[:] = [Anything()]
        __builtins__ = Anything()
        def f(x): return 0
    """,
    "methods of its answer": """
        class Meta(type):
            __instancecheck__ = __subclasscheck__ = lambda *a: True
            __name__ = property(lambda self: 1 / 0)
            __module__ = 'fractions'
        class E(metaclass=Meta):
            def __repr__(self): raise SystemExit
            __str__ = __hash__ = __format__ = __len__ = __iter__ = __reduce__ = __getattribute__ = __repr__
        def f(x): return E()
    """,
    "an exception with methods": """
        class E(BaseException):
            def __str__(self): raise E()
            __repr__ = __getattribute__ = __str__
        def f(x): raise E()
    """,
    "what it leaves to be run at exit": """
        import atexit, os, threading
        class E:
            def __del__(self): os.write(1, b't 0 0 1\\n')
        keep = E()
        atexit.register(lambda: os.write(1, b't 0 0 1\\n'))
        def f(x): raise SystemExit(0)
    """,
    "a huge value": "def f(x): return 'x' * (50 << 20)",
    "a huge number": "def f(x): return 1 << (1 << 24)",
    "a deep value": """
        def f(x):
            value = []
            for i in range(100_000): value = [value]
            return value
    """,
    "a value within itself": "def f(x):\n    value = []\n    value.append(value)\n    return value",
    "endless items": "def f(x):\n    while True: yield 2 * x",
    "a huge exception": "def f(x): raise ValueError('x' * (50 << 20))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "a crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "memory": "def f(x):\n    held = []\n    while True: held.append(bytearray(10**7))",
    "endless output": "import os\ndef f(x):\n    while True:\n        print('x' * 99)\n        os.write(2, b'x' * 99)",
    "a large file": "def f(x):\n    with open('MARK', 'wb') as file:\n        while True: file.write(bytes(10**6))",
    "sleep": "import time\ndef f(x): time.sleep(60)",
    "deaf to signals": """
        import signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        def f(x): time.sleep(60)
    """,
    "timer disarmed": "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\ndef f(x):\n    while True: pass",
    "a thread that goes on": """
        import threading, time
        def f(x):
            threading.Thread(target=time.sleep, args=(60,), daemon=x > 1).start()
            return 0
    """,
    "a fork bomb": """
        import os, time
        def f(x):
            for i in range(100):
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            return 0
    """,
    "a daemon": """
        import os, time
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
            return 0
    """,
    "a child that answers, too": "import os\ndef f(x):\n    os.fork()\n    return 0",
    "the harness killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return 0",
    "the harness stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef f(x): return 0",
    "all killed": "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL)\n    return 0",
    "all stopped": "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGSTOP)\n    return 0",
    "the harness stopped, and asleep": """
        import os, signal, time
        try: os.setsid()
        except OSError: pass
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGSTOP)
        def f(x): time.sleep(60)
    """,
    "the harness killed, and asleep": """
        import os, signal, time
        try: os.setpgid(0, 0)
        except OSError: pass
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    """,
    "pipes closed": "import os\ndef f(x):\n    os.closerange(0, 100)\n    return 0",
    "pipes closed, and asleep": "import os, time\ndef f(x):\n    os.closerange(0, 100)\n    time.sleep(60)",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_earn_nothing(attack: str, traces: Any) -> None:
    began = time.monotonic()
    found = label(traces.mark(attack), TESTS, QUICK)
    assert found.verdict is not Verdict.PASSED, found
    assert (found.passed, bool(found.evidence)) == (0, True), found
    assert time.monotonic() - began < 20


PROGRAM_ATTACKS: dict[str, str] = {
    "a verdict printed": "print('passed')",
    "frames printed": """
        import os
        for handle in range(1, 64):
            try: os.write(handle, b'o 0 0 360a -\\nw 0 exit 0\\no 1 0 380a -\\nw 1 exit 0\\n')
            except OSError: pass
    """,
    "an early end": "import os\nos._exit(0)",
    "other inputs": """
        import os
        for handle in range(3, 64):
            try: print(os.pread(handle, 99, 0))
            except OSError: pass
    """,
    "endless output": "while True: print('6')",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "output as a hole": "import os\nos.ftruncate(1, 1 << 50)",
    "sleep": "print(6, flush=True)\nimport time\ntime.sleep(60)",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint(0)",
    "a fork bomb": """
        import os, time
        for i in range(100):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
    """,
    "memory": "held = []\nwhile True: held.append(bytearray(10**7))",
    "files": "for i in range(100):\n    open(f'MARK{i}', 'wb').write(bytes(10**6))",
    "the harness killed": "import os, signal\nprint(6, flush=True)\nos.kill(os.getppid(), signal.SIGKILL)",
    "the harness stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
}


@pytest.mark.parametrize("attack", PROGRAM_ATTACKS.values(), ids=PROGRAM_ATTACKS)
def test_programs_earn_nothing(attack: str, traces: Any) -> None:
    began = time.monotonic()
    found = label(traces.mark(attack), PROGRAM, QUICK)
    assert found.verdict is not Verdict.PASSED, found
    assert time.monotonic() - began < 20


def test_a_solution_that_attacks_the_sandbox_does_not_harm_others() -> None:
    killer = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)\ndef f(x): return 0"
    good = "def f(x): return 2 * x"
    [[bad, fine, also]] = label_batch([Group((killer, good, good), TESTS)], ROOMY)
    assert not bad.is_correct
    assert fine.is_correct
    assert also.is_correct


def test_what_a_run_leaves_behind_is_gone_before_the_next(kinds: tuple[str]) -> None:
    """Runs of one job share a uid: the second would see a process of the first."""
    first = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\ndef f(x): return 2 * x"
    second = """
        import os
        def f(x):
            others = 0
            for pid in range(2, 50_000):
                try:
                    os.kill(pid, 0)
                    others += pid not in (os.getpid(), os.getppid())
                except OSError:
                    pass
            return 2 * x if others <= 1 else -others  # one is the tests' process
    """
    if kinds == ("plain",) and os.geteuid() != 0:
        pytest.skip("nothing can be started there")
    [[one, other]] = label_batch([Group((first, textwrap.dedent(second)), FunctionTests(LITERALS))], ROOMY)
    assert one.is_correct
    assert other.is_correct, other
