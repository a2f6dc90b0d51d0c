"""Locks that a process lays on itself and its children for good, which need no rights: what root's programs
(bubblewrap, unshare) do from outside is on top of them.

Part of the program that runs in the sandbox (see ``harness``), so it imports the standard library alone, and of
`ctypes`, which is slow to import, only its core.
"""

from __future__ import annotations

import _ctypes
import os
import sys

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446  # the same on every machine
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FILE_RIGHTS_SINCE = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version
_TCP, _SIGNALS_AND_ABSTRACT_SOCKETS = 0b11, 0b11
_READABLE = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class _Bytes(_ctypes._SimpleCData):
    """A pointer to the bytes that it is made of, and keeps."""

    _type_ = "z"


def _libc(function: str, *arguments: int | bytes) -> int:
    library = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]
    return int(_ctypes.call_function(_ctypes.dlsym(library, function), arguments))


def hide_memory(hidden: bool) -> None:
    """Whether other processes of the same user are kept from this one's memory, files and environment."""
    _libc("prctl", _PR_SET_DUMPABLE, int(not hidden), 0, 0, 0)


def adopt_orphans() -> None:
    """Have what its descendants leave behind become this process's children, to be reaped by it."""
    _libc("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def filter_system_calls(program: bytes) -> None:
    """Install a filter (see ``seccomp``), and give up for good what set-user-id programs would grant.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("this kernel cannot bar set-user-id programs")
    if not program:
        return
    pointer = _Bytes(program)
    # struct sock_fprog: the number of instructions, padding, a pointer to them
    header = (len(program) // 8).to_bytes(8, sys.byteorder) + bytes(pointer)
    if _libc("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError("this kernel cannot filter system calls")


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
    rule = rights.to_bytes(8, sys.byteorder) + handle.to_bytes(4, sys.byteorder)
    _libc("syscall", _SYS_LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
    os.close(handle)


def restrict_files(private: str) -> bool:
    """Leave of the file system the interpreter and the system's libraries, to be read, and a private directory.

    By Landlock, with which go TCP, signals to processes outside, and a look into these, as far as the kernel's
    version knows how. Returns False where the kernel has none of it.
    """
    version = _libc("syscall", _SYS_LANDLOCK_CREATE, 0, 0, _LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = _FILE_RIGHTS_SINCE[max(known for known in _FILE_RIGHTS_SINCE if known <= version)]
    parts = [handled, *([_TCP] if version >= 4 else []), *([_SIGNALS_AND_ABSTRACT_SOCKETS] if version >= 6 else [])]
    attributes = b"".join(part.to_bytes(8, sys.byteorder) for part in parts)
    ruleset = _libc("syscall", _SYS_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    prefixes = {sys.base_prefix, sys.base_exec_prefix} - {"/"}
    for path in (*_READABLE, *sorted(prefixes)):
        _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
    for path in _DEVICES:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE & handled)
    _allow(ruleset, private, handled)
    done = _libc("syscall", _SYS_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done
