"""What runs inside the sandbox: it executes checked code and says what came of it, never whether that is right.

The *text* of this file and of the ``harness_*`` files is what the sandbox starts, so they import the standard
library alone and nothing of this package. It reads a job from standard input, runs each of its runs in processes
of their own under the limits, and writes ASCII lines ("frames") to what was standard output. The process that
executes a solution holds neither that output nor the tests; what a test compares with a literal is not even sent
in here. Frames, fields separated by one space::

    r FILES                      ready, no checked code has run; FILES 1: they are out of reach (``restrict_files``)
    v RUN STEP VALUE             a step's value, encoded (see harness_values)
    p RUN STEP LEFT RIGHT        both sides of a comparison
    t RUN STEP 0|1               the truth of a step's value; 1 only for a plain True
    x RUN STEP NAME MESSAGE      an exception (hex); STEP -1 is loading the solution
    e RUN NONCE                  the run came to its end
    o RUN TRUNCATED OUT ERR      what a program wrote (hex): standard output, end of standard error
    w RUN exit|signal|wall CODE  how the run ended
"""

from __future__ import annotations

import _signal as signal  # which `signal` wraps in enums, whose import takes as long as starting the interpreter
import gc
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False  # `typing` is slow to import, and this starts thousands of times
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from wmtp_ds.data.harness_calls import Gone, Line, TestNames, answer_call, answer_for, describe
    from wmtp_ds.data.harness_lock import adopt_orphans, filter_system_calls, hide_memory, restrict_files
    from wmtp_ds.data.harness_values import Unsendable, decode, encode

STDERR_BYTES = 2000
SOLUTION_IS_GONE = 3  # exit code of the tests' process


def emit(out: int, *fields: object) -> None:
    """Write one frame."""
    data = (" ".join(str(field) for field in fields) + "\n").encode("ascii")
    while data:
        data = data[os.write(out, data) :]


def read_exactly(handle: int, size: int) -> bytes:
    """Read ``size`` bytes of a pipe, past short reads."""
    parts = []
    while size:
        parts.append(os.read(handle, min(size, 1 << 20)))
        if not parts[-1]:
            raise EOFError
        size -= len(parts[-1])
    return b"".join(parts)


def read_message(handle: int) -> Any:
    """The next message from outside: its length in eight hexadecimal digits, then an encoded value."""
    return decode(read_exactly(handle, int(read_exactly(handle, 8), 16)).decode("ascii"), str)


def set_limits(limits: dict[str, Any]) -> None:
    """Lay the limits of one process on this one, and start its clock."""
    cpu = int(limits["cpu_seconds"]) + 2  # whole seconds: only for code that disarms the finer timer
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    # This signal ends the process when its time is up; if it is disarmed, RLIMIT_CPU and the wall clock remain.
    signal.setitimer(signal.ITIMER_PROF, limits["cpu_seconds"])


def become_solution(limits: dict[str, Any], keep: tuple[int, ...]) -> None:
    """Make this process one for checked code: no files but the three standard ones and ``keep``, and limits."""
    if limits["processes"]:
        os.setsid()  # else the group is all that it could be found by if this process's parent were stopped
    last = 2
    for handle in (*sorted(keep), 1 << 16):
        os.closerange(last + 1, handle)
        last = handle
    hide_memory(False)  # of itself: /dev/stdin and the like need it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    set_limits(limits)
    resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"], limits["processes"]))


def status_of(status: int) -> tuple[str, int]:
    """How a process ended and its exit code or signal."""
    if os.WIFSIGNALED(status):
        return "signal", os.WTERMSIG(status)
    return "exit", os.WEXITSTATUS(status)


def wait_run(solution: int, tests: int, wall_seconds: float, caller: int) -> tuple[str, int]:
    """Wait for a run's processes, at most ``wall_seconds``; how it ended and its exit code or signal.

    Args:
        solution: the process with the checked code.
        tests: the process that drives it; its end is the run's end. 0 for none.
        wall_seconds: then both are killed.
        caller: the pipe from the process that asked for the job: when that dies, so does everything here.
    """
    watch = select.poll()
    watch.register(caller, 0)  # only "hung up", which is always told
    deadline = time.monotonic() + wall_seconds
    running = {pid for pid in (solution, tests) if pid}
    ended: dict[int, tuple[str, int]] = {}
    while True:
        for pid in tuple(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                ended[pid] = status_of(status)
        # Where the tests say that the solution is gone, it is about to be.
        tests_done = tests in ended and ended[tests] != ("exit", SOLUTION_IS_GONE)
        left = deadline - time.monotonic()
        if not running or tests_done or left <= 0 or watch.poll(0):
            break
        signal.sigtimedwait([signal.SIGCHLD], min(left, 0.5))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if watch.poll(0):
        os._exit(1)
    if tests_done and ended[tests] == ("exit", 0):
        return "exit", 0
    return ended.get(solution) or (ended[tests] if tests_done else ("wall", 0))


def new_module(name: str) -> dict[str, Any]:
    """The namespace of an empty module, registered, as dataclasses and typing expect."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def run_solution(source: str, line: Line) -> NoReturn:
    """The process that executes a solution: it does what the tests' process asks for."""
    namespace = new_module("solution")
    answer = answer_for(namespace)

    def answer_or_load(verb: str, value: Any) -> Any:
        if verb != "load":
            return answer(verb, value)
        exec(compile(source, "<solution>", "exec", dont_inherit=True), namespace)
        return None

    line.answer = answer_or_load
    line.serve()


def run_tests(out: int, run: int, steps: list[tuple[str, ...]], nonce: str, line: Line) -> None:
    """The process that holds the tests: it has the solution loaded, goes through the steps and tells of each."""
    if relay(out, run, -1, line, "load", ""):
        return
    names = TestNames(line)
    for number, (kind, *texts) in enumerate(steps):
        if kind == "value":
            relay(out, run, number, line, "value", texts[0])
            continue
        text, *_, where = texts
        told = kind == "exec" and where != "tests"
        if told and (relay(out, run, number, line, "exec", text) or where == "solution"):
            continue
        try:
            judge(out, run, number, names, kind, texts)
        except Gone:
            raise
        except BaseException as error:
            if not told:
                emit(out, "x", run, number, *describe(error))
    emit(out, "e", run, nonce)


def relay(out: int, run: int, step: int, line: Line, verb: str, text: str) -> bool:
    """Have the solution's process do something and pass on what came of it; whether it raised."""
    kind, *parts = line.ask_text(verb, text).split(" ")
    if (kind, len(parts)) == ("!", 2):
        emit(out, "x", run, step, *parts)
        return True
    if (kind, len(parts)) != ("=", 1):
        raise Gone
    if step >= 0:
        emit(out, "v", run, step, parts[0])
    return False


def judge(out: int, run: int, number: int, names: TestNames, kind: str, texts: list[str]) -> None:
    """A step that this process does itself: ("truth", expression), ("pair", left, right), ("exec", code).

    Tests that give the solution objects of their own cannot be done here: they run where the solution is.
    """
    if kind == "exec":
        text, where = texts
        try:
            exec(compile(text, "<test>", "exec", dont_inherit=True), names)
            if where == "tests":
                names.untold.append(text)
        except Unsendable:
            names.lacking = True
            if where == "tests":
                names.at_the_solution("exec", text)
        if where == "tests":
            emit(out, "v", run, number, '["n"]')
        return
    *texts, modules, lent = texts
    names.lent = frozenset(lent.split())
    for name in modules.split():
        names.setdefault(name, __import__(name))
    values = [evaluate(text, names) for text in texts]
    if kind == "truth":
        emit(out, "t", run, number, int(values[0] is True))
    else:
        emit(out, "p", run, number, *[encode(value) for value in values])


def evaluate(text: str, names: TestNames) -> Any:
    """The value of a test's expression."""
    if not names.lacking:
        try:
            return eval(compile(text, "<test>", "eval", dont_inherit=True), names)
        except Unsendable:
            pass
    return names.at_the_solution("value", text)


def function_run(inbox: int, out: int, run: int, source: str, limits: dict[str, Any]) -> bool:
    """A solution and its tests, in a process each; whether the next run may follow."""
    most = 4 * limits["output_bytes"]
    (solution_reads, tests_write), (tests_read, solution_writes) = os.pipe(), os.pipe()
    solution = os.fork()  # before the tests are read: its memory shall not hold them
    if solution == 0:
        become_solution(limits, (solution_reads, solution_writes))
        line = Line(solution_reads, solution_writes, answer_call, most)
        line.sends_all = True
        run_solution(source, line)
    os.close(solution_reads)
    os.close(solution_writes)
    told, tell = os.pipe()
    tests = os.fork()
    if tests == 0:
        code = 1
        try:
            set_limits(limits)
            steps, nonce = read_message(inbox)
            os.write(tell, b"1")
            run_tests(out, run, steps, nonce, Line(tests_read, tests_write, answer_call, most))
            code = 0
        except Gone:
            code = SOLUTION_IS_GONE
        finally:
            os._exit(code)
    for handle in (tests_read, tests_write, tell):
        os.close(handle)
    in_step = os.read(told, 1) == b"1"  # or the tests' process was killed before it had read its part of the job
    os.close(told)
    how, code = wait_run(solution, tests, limits["wall_seconds"], inbox)
    emit(out, "w", run, how, code)
    return in_step


def memory_file(content: bytes = b"") -> int:
    """An anonymous file; what the checked code writes to it counts against the limit on file sizes."""
    handle = os.memfd_create("stream")
    while content:
        content = content[os.write(handle, content) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def run_program(source: str, files: tuple[int, ...], notes: int) -> NoReturn:
    """Run a program as a script with its own standard streams; it leaves through the interpreter's normal exit."""
    for number, handle in enumerate(files):
        os.dup2(handle, number)
        os.close(handle)
    sys.argv = ["program.py"]
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), new_module("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        os.write(notes, " ".join(describe(error)).encode("ascii"))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    sys.exit(0)


def program_run(inbox: int, out: int, run: int, source: str, stdin: bytes, limits: dict[str, Any]) -> bool:
    """A program with its input; whether the next run may follow."""
    files = (memory_file(stdin), memory_file(), memory_file())
    notes = memory_file()  # the exception that ended it
    pid = os.fork()
    if pid == 0:
        become_solution(limits, (*files, notes))
        run_program(source, files, notes)
    how, code = wait_run(pid, 0, limits["wall_seconds"], inbox)
    error = os.pread(notes, 1 << 12, 0).split(b" ")
    if len(error) == 2 and all(part.isalnum() or part == b"-" for part in error):
        emit(out, "x", run, 0, *(part.decode("ascii") for part in error))
    size = os.fstat(files[1]).st_size
    written = os.pread(files[1], limits["output_bytes"], 0)
    errors = os.pread(files[2], STDERR_BYTES, max(0, os.fstat(files[2]).st_size - STDERR_BYTES))
    emit(out, "o", run, int(size > limits["output_bytes"]), written.hex() or "-", errors.hex() or "-")
    emit(out, "w", run, how, code)
    for handle in (*files, notes):
        os.close(handle)
    return how != "wall"  # the same program would sleep through its other inputs, too


def end_stragglers() -> None:
    """End and reap what a run left behind, or it could meddle with the next.

    Only where no process but those of this sandbox can be meant: in a PID namespace, or under a uid of its own.
    """
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except OSError:
        pass  # there is none, or no more


def main() -> None:
    """Read the job and run it."""
    inbox, out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        job = read_message(inbox)
        os.close(os.open(sys.executable, os.O_RDONLY))  # else it runs with the library of another interpreter
        hide_memory(True)
        adopt_orphans()
        filter_system_calls(job["filter"])
        files_are_safe = job["own_files"] or restrict_files(os.getcwd())
    except OSError as error:
        sys.exit(str(error))
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)
    os.close(nothing)
    os.environ.clear()
    builtins: Any = __builtins__
    builtins.exit = builtins.quit = sys.exit  # `site`, which is not loaded, would define them
    for name in job["preload"]:
        __import__(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # wait_run asks for it
    gc.freeze()  # what is here by now is nothing that a run's end has to look through, page by page
    emit(out, "r", int(files_are_safe))
    for number in range(job["runs"]):
        source, stdin = read_message(inbox)
        if stdin is None:
            goes_on = function_run(inbox, out, number, source, job["limits"])
        else:
            goes_on = program_run(inbox, out, number, source, stdin, job["limits"])
        if job["alone"]:
            end_stragglers()
        if not goes_on:
            break


if __name__ == "__main__":
    main()
