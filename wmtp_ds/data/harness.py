"""What runs inside the sandbox: it executes checked code and says what came of it, never whether that is right.

The *text* of this file is what the sandbox starts (``python -c``), so it imports the standard library alone and
nothing of this package. It reads one job from standard input, runs each of the job's runs in a forked child of
its own under the limits, and writes ASCII lines ("frames") to what was standard output; the expected results
never come in here. Frames, fields separated by one space::

    r                            ready: the interpreter is up, no checked code has run
    v RUN STEP VALUE             a step's value, encoded (see encode)
    p RUN STEP LEFT RIGHT        both sides of a comparison
    t RUN STEP 0|1               the truth of a step's value; 1 only for a plain True
    x RUN STEP NAME MESSAGE      an exception (hex); STEP -1 is loading the solution
    m RUN STEP                   out of memory
    e RUN NONCE                  the run came to its end; the nonce is read only then
    o RUN TRUNCATED OUT ERR      what a program wrote (hex): standard output, end of standard error
    w RUN exit|signal|wall CODE  how the child ended
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # `typing` is slow to import, and this file starts thousands of times
if TYPE_CHECKING:
    from typing import Any, NoReturn

NONCE_BYTES = 32
STDERR_BYTES = 2000


def encode(value: Any) -> str:
    """A value as JSON of tagged lists, by its base class: no method of the checked code decides its equality."""
    kind = type(value)
    if value is None:
        return '["n"]'
    if kind is bool:
        return f'["b",{int(value)}]'
    if issubclass(kind, int):
        return f'["i","{int.__format__(value, "x")}"]'
    if issubclass(kind, float):
        return f'["f","{float.hex(value)}"]'
    if kind is complex:
        return f'["c","{value.real.hex()}","{value.imag.hex()}"]'
    if issubclass(kind, str):
        return f'["s","{str.encode(value, "utf-8", "surrogatepass").hex()}"]'
    if kind in (bytes, bytearray):
        return f'["y","{value.hex()}"]'
    for tag, base in (("l", list), ("t", tuple), ("e", set), ("z", frozenset)):
        if issubclass(kind, base):
            return f'["{tag}"{"".join("," + encode(item) for item in base.__iter__(value))}]'
    if issubclass(kind, dict):
        return f'["d"{"".join(f",{encode(key)},{encode(item)}" for key, item in dict.items(value))}]'
    if kind in (type({}.keys()), type({}.items())):  # these equal sets
        return f'["e"{"".join("," + encode(item) for item in value)}]'
    if kind.__module__ in ("fractions", "decimal"):
        above, below = value.as_integer_ratio()
        return f'["q","{above:x}","{below:x}"]'
    return f'["o","{kind.__name__.encode("utf-8", "replace").hex()}"]'


def emit(out: int, *fields: object) -> None:
    """Write one frame."""
    data = (" ".join(str(field) for field in fields) + "\n").encode("ascii")
    while data:
        data = data[os.write(out, data) :]


def emit_exception(out: int, run: int, step: int, error: BaseException) -> None:
    """Say that a step raised; the message belongs to the checked code, so even asking for it may raise."""
    if isinstance(error, MemoryError):
        emit(out, "m", run, step)
        return
    try:
        message = str(error)[:300].encode("utf-8", "replace").hex()
    except BaseException:
        message = ""
    emit(out, "x", run, step, type(error).__name__.encode("utf-8", "replace").hex(), message or "-")


def read_exactly(handle: int, size: int) -> bytes:
    """Read ``size`` bytes of a pipe, past short reads."""
    data = b""
    while len(data) < size:
        chunk = os.read(handle, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def set_limits(limits: dict[str, Any]) -> None:
    """Lay the limits on this process; children inherit them. Processes are limited in the child."""
    cpu = int(limits["cpu_seconds"]) + 2  # whole seconds: only for code that disarms the finer timer
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))


def start_child(limits: dict[str, Any], nonce: bytes) -> tuple[int, int]:
    """Fork. In the child: start its clock and return (0, a pipe that holds the nonce); in the parent: (pid, -1)."""
    reader, writer = os.pipe()
    os.write(writer, nonce)
    os.close(writer)
    pid = os.fork()
    if pid:
        os.close(reader)
        return pid, -1
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"], limits["processes"]))
    # This signal ends the process unless the checked code disarms it; then RLIMIT_CPU and the wall clock remain.
    signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])
    return 0, reader


def wait_child(pid: int, wall_seconds: float, caller: int) -> tuple[str, int]:
    """Wait for the child, at most ``wall_seconds``; how it ended and its exit code or signal.

    ``caller`` is the pipe from the process that asked for the job: when that dies, so do child and harness.
    """
    watch = select.poll()
    watch.register(caller, 0)  # only "hung up", which is always told
    deadline = time.monotonic() + wall_seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        left = deadline - time.monotonic()
        if left <= 0 or watch.poll(0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if left > 0:
                os._exit(1)
            return "wall", 0
        signal.sigtimedwait([signal.SIGCHLD], min(left, 0.5))
    if os.WIFSIGNALED(status):
        return "signal", os.WTERMSIG(status)
    return "exit", os.WEXITSTATUS(status)


def new_module(name: str) -> dict[str, Any]:
    """The namespace of an empty module, registered, as dataclasses and typing expect."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def run_function(out: int, run: int, source: str, steps: list[tuple[str, ...]], nonce_pipe: int) -> NoReturn:
    """Load a solution, then evaluate the steps of its tests in its namespace."""
    namespace = new_module("solution")
    try:
        exec(compile(source, "<solution>", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        emit_exception(out, run, -1, error)
        os._exit(0)
    for number, (kind, *texts) in enumerate(steps):
        try:
            if kind == "exec":
                exec(compile(texts[0], "<test>", "exec", dont_inherit=True), namespace)
                emit(out, "v", run, number, encode(None))
                continue
            values = [eval(compile(text, "<test>", "eval", dont_inherit=True), namespace) for text in texts]
            if kind == "truth":
                emit(out, "t", run, number, int(type(values[0]) is bool and values[0]))
            else:
                emit(out, "v" if kind == "value" else "p", run, number, *[encode(value) for value in values])
        except BaseException as error:
            emit_exception(out, run, number, error)
    emit(out, "e", run, read_exactly(nonce_pipe, NONCE_BYTES).decode("ascii"))
    os._exit(0)


def run_program(out: int, run: int, source: str, files: tuple[int, ...]) -> NoReturn:
    """Run a program as a script with its own standard streams; it leaves through the interpreter's normal exit."""
    for number, handle in enumerate(files):
        os.dup2(handle, number)
    sys.argv = ["program.py"]
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), new_module("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        emit_exception(out, run, 0, error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    sys.exit(0)


def memory_file(content: bytes = b"") -> int:
    """An anonymous file; what the checked code writes to it counts against the limit on file sizes."""
    handle = os.memfd_create("stream")
    while content:
        content = content[os.write(handle, content) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def report_program(out: int, run: int, files: tuple[int, ...], limit: int) -> None:
    """Send what a program wrote to its standard output (up to the limit) and the end of its standard error."""
    size = os.fstat(files[1]).st_size
    written = os.pread(files[1], limit, 0)
    errors = os.pread(files[2], STDERR_BYTES, max(0, os.fstat(files[2]).st_size - STDERR_BYTES))
    emit(out, "o", run, int(size > limit), written.hex() or "-", errors.hex() or "-")
    for handle in files:
        os.close(handle)


def end_stragglers() -> None:
    """As process 1 of a PID namespace: end and reap what a run left behind, or it could meddle with the next."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except OSError:
        pass  # there is none, or no more


def main() -> None:
    """Read the job and run it."""
    job = eval(read_exactly(0, int(read_exactly(0, 8), 16)))
    nonces, out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)
    os.environ.clear()
    builtins: Any = __builtins__
    builtins.exit = builtins.quit = sys.exit  # `site`, which is not loaded, would define them
    limits = job["limits"]
    for name in job["preload"]:
        __import__(name)
    stdins = [memory_file(run[2]) if run[0] == "program" else -1 for run in job["runs"]]
    set_limits(limits)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # wait_child asks for it
    emit(out, "r")
    for number, (kind, source, detail) in enumerate(job["runs"]):
        files = (stdins[number], memory_file(), memory_file()) if kind == "program" else ()
        pid, nonce_pipe = start_child(limits, read_exactly(nonces, NONCE_BYTES))
        if pid == 0:
            os.close(nonces)
            if kind == "program":
                run_program(out, number, source, files)
            run_function(out, number, source, detail, nonce_pipe)
        how, code = wait_child(pid, limits["wall_seconds"], nonces)
        if job["own_pids"]:
            end_stragglers()
        if files:
            report_program(out, number, files, limits["output_bytes"])
        emit(out, "w", number, how, code)
        if how == "wall" and kind == "program":
            break  # the same program would sleep through its other inputs, too


if __name__ == "__main__":
    main()
