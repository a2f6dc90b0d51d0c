"""The ways to shut a process in that this machine offers, from the strongest: how each is started.

- ``bubblewrap``: a file system of its own (the interpreter read-only, an empty ``/tmp``), no network, no sight
  of other processes.
- ``namespaces``: no network and no sight of other processes; the machine's own file system.
- ``plain``: a process of this machine like any other.

On top of each come the locks that the process inside lays on itself (``harness_lock``): a filter on system calls,
and, outside bubblewrap, Landlock, which leaves of the file system what the interpreter needs. Started by root,
each of them runs the checked code under a uid that nothing else on the machine has, because a limit on processes
does not bind root, and a uid of its own makes the count exact.
"""

import functools
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("bubblewrap", "namespaces", "plain")
TMPFS_BYTES = 16 << 20
_NOBODY = 65534
# The hash seed is fixed, so that a solution that prints a set gets the same verdict every time.
_PYTHON_FLAGS = ("-B", "-P", "-s", "-S", "-X", "utf8", "-c")
_PYTHON_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Start:
    """How one sandboxed process is started, and what has to be cleaned up after it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    uid: int | None = None  # what the process runs as, where that is not our own uid
    switch_user: bool = False  # the caller changes to ``uid`` (otherwise the command does)
    directory: Path | None = None  # private, to be removed


class UnavailableError(Exception):
    """This machine lacks what the kind of sandbox needs."""


def fresh_uid() -> int | None:
    """A uid that nothing else uses, for one run; None unless we are root and such a uid exists here."""
    if os.geteuid() != 0:
        return None
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        first, count = max(((int(inside), int(size)) for inside, _, size in ranges), key=lambda pair: pair[1])
    except (OSError, ValueError):
        first, count = 0, 65536
    if count < 4:
        raise UnavailableError("running as root, and there is no other uid to run the checked code under")
    return first + count // 4 + secrets.randbelow(count // 4)


@functools.cache
def interpreters() -> tuple[str, ...]:
    """Python interpreters to try, ours first; others where an unprivileged uid cannot reach ours."""
    found = [os.path.realpath(sys.executable), *map(shutil.which, ("/usr/bin/python3", "/usr/local/bin/python3"))]
    return tuple(dict.fromkeys(path for path in found if path))


def _needed(program: str) -> str:
    path = shutil.which(program, path="/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin")
    if path is None:
        raise UnavailableError(f"{program} is not installed")
    return path


def _drop_to(uid: int) -> list[str]:
    return [_needed("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--"]


@functools.cache
def _bubblewrap_mounts() -> tuple[str, ...]:
    """Mount options: the system's programs and libraries and our interpreter, read-only, at their own paths."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib32", "/lib64", "/bin", "/sbin"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    if os.path.exists("/etc/ld.so.cache"):
        options += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for prefix in dict.fromkeys(map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix))):
        if prefix in ("/", "/usr") or prefix.startswith("/usr/"):
            continue
        # bubblewrap would give the folders above the permissions they have outside, where a home is private.
        for parent in reversed(Path(prefix).parents[:-1]):
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", prefix, prefix]
    return (*options, "--proc", "/proc", "--dev", "/dev")


def _bubblewrap(python: list[str], uid: int | None) -> Start:
    command = [_needed("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    # As process 1 of its namespace, the harness is bubblewrap's own child, which bubblewrap waits for; its usual
    # process 1 outlives it, and stays behind as a zombie where the machine's init does not reap (containers).
    command += ["--unshare-cgroup-try", "--die-with-parent", "--as-pid-1"]
    if uid is None:
        command += ["--unshare-user", "--disable-userns", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    else:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += _bubblewrap_mounts()
    command += ["--perms", "1777", "--size", str(TMPFS_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]  # of a size without limit, and ours where we are not root
    for name, value in _PYTHON_ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--", *([] if uid is None else _drop_to(uid)), *python]
    # The environment of bubblewrap itself may be readable inside, whatever it sets there: it is empty.
    return Start(command, uid=uid)


def start_of(kind: str, interpreter: str, program: str) -> Start:
    """How to start ``program`` (Python source text) with ``interpreter`` (a path) in a sandbox of that kind.

    Raises:
        UnavailableError: this machine lacks what the kind needs.
    """
    python = [interpreter, *_PYTHON_FLAGS, program]
    uid = fresh_uid()
    if kind == "bubblewrap":
        return _bubblewrap(python, uid)
    command = python
    if kind == "namespaces":
        command = [_needed("unshare"), "--fork", "--kill-child", "--pid", "--mount-proc", "--net", "--ipc", "--uts"]
        command += ["--user", "--map-current-user"] if uid is None else _drop_to(uid)
        command += python
    directory = Path(tempfile.mkdtemp(prefix="wmtp-sandbox-"))
    if uid is not None:
        os.chown(directory, uid, uid)
    switch_user = kind == "plain" and uid is not None
    return Start(command, _PYTHON_ENVIRONMENT, uid=uid, switch_user=switch_user, directory=directory)
