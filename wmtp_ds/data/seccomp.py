"""A filter on system calls for the sandbox: no new namespaces, no mounts, no tracing, no kernel interfaces, no
sockets but pairs, and nothing that stays in the kernel after its process (System V's shared memory and the like).

A program inside a container may still ask the kernel for a user namespace of its own, in which it is root and
may mount file systems past the memory limit, and which is where most kernel exploits begin. The filter is a
classic BPF program as ``seccomp(2)`` takes it; the harness installs it before any checked code runs.
"""

import platform
import struct

_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_NEWUSER = 0x10000000
_X32 = 0x40000000  # a second set of call numbers on x86-64, which would go around the filter
_CLONE3 = 435  # its flags lie in memory, where a filter cannot look: refused as unknown, libc then uses clone

# In order: ptrace, process_vm_readv, process_vm_writev, unshare, setns, mount, umount2, pivot_root, keyctl,
# add_key, request_key, bpf, perf_event_open, userfaultfd, open_by_handle_at, socket, shmget, semget, msgget,
# mq_open; then the calls that have one number everywhere: io_uring_setup, open_tree, move_mount, fsopen, fsconfig,
# fsmount, fspick, pidfd_getfd, mount_setattr.
_EVERYWHERE = (425, 428, 429, 430, 431, 432, 433, 438, 442)
_MACHINES = {  # machine -> (audit architecture, clone, the refused calls)
    "x86_64": (
        0xC000003E,
        56,
        (101, 310, 311, 272, 308, 165, 166, 155, 250, 248, 249, 321, 298, 323, 304, 41, 29, 64, 68, 240, *_EVERYWHERE),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (117, 270, 271, 97, 268, 40, 39, 41, 219, 217, 218, 280, 241, 282, 265, 198, 194, 190, 186, 180, *_EVERYWHERE),
    ),
}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


_LEAVE_GROUP = {"x86_64": (109, 112), "aarch64": (154, 157)}  # setpgid, setsid


def filter_program(machine: str | None = None, *, keep_group: bool = False) -> bytes | None:
    """The filter as the bytes of a ``struct sock_filter`` array, or None on a machine that it was not written for.

    Args:
        machine: as ``platform.machine()`` names it; default this one.
        keep_group: whether processes may not leave their process group, where that is all they can be found by.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        return None
    architecture, clone, refused = _MACHINES[machine]
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, architecture, if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, if_false=1),
        _instruction(_RETURN, _KILL),
        _instruction(_EQUAL, _CLONE3, if_false=1),
        _instruction(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in (*refused, *(_LEAVE_GROUP[machine] if keep_group else ())):
        program += [_instruction(_EQUAL, number, if_false=1), _instruction(_RETURN, _ERRNO | _EPERM)]
    program += [
        _instruction(_EQUAL, clone, if_false=3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_HAS_BITS, _CLONE_NEWUSER, if_false=1),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)
