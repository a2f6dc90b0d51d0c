"""Disk, memory, limits, ports, the tracking server and the sandbox."""

import contextlib
import os
import resource
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from wmtp_ds.doctor.finding import Finding
from wmtp_ds.files import nearest_folder

_GIB = 2**30
# Below which a disk is called full where nothing says how much a run needs.
_LITTLE_DISK = 10 * _GIB
_LITTLE_SHARED_MEMORY = 1 * _GIB
_FEW_FILES = 1024
# DeepSpeed's default, where `deepspeed` lets ranks meet unless it is told another.
_PORT = 29500


def disk(save_dir: Path, needed: int = 0) -> Iterator[Finding]:
    """Free space where checkpoints go, and whether one may write there.

    Args:
        save_dir: ``checkpoint.save_dir``; it need not be there yet.
        needed: bytes that a run's checkpoints take, if that is known.
    """
    name = f"disk at {save_dir}"
    place = nearest_folder(save_dir)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding(name, "failure", f"{place}: {error.strerror}", "Name another checkpoint.save_dir.")
        return
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free" + (f", a run's checkpoints take {needed / _GIB:.1f}" if needed else "")
    mend = "Free space, lower checkpoint.save_total_limit, or name another checkpoint.save_dir."
    if needed > free:
        yield Finding(name, "failure", text, mend)
    elif free < _LITTLE_DISK and not needed:
        yield Finding(name, "warning", text, mend)
    else:
        yield Finding(name, "ok", text)


def memory() -> Iterator[Finding]:
    """Main memory, and the shared memory through which ranks of one machine talk."""
    found = psutil.virtual_memory()
    yield Finding("memory", "ok", f"{found.available / _GIB:.1f} of {found.total / _GIB:.1f} GiB free")
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("shared memory", "warning", f"there is no {place}", "Mount a tmpfs there: nccl needs it.")
        return
    total = shutil.disk_usage(place).total
    if total < _LITTLE_SHARED_MEMORY:
        mend = "In a container: docker run --shm-size=8g (or --ipc=host)."
        yield Finding("shared memory", "warning", f"{total / 2**20:.0f} MiB in {place}", mend)
    else:
        yield Finding("shared memory", "ok", f"{total / _GIB:.1f} GiB in {place}")


# What is made there under these names is of use to the processes alone that have it open.
_SHARED_FILES = ("deepspeed_allreduce_buffer_*", "nccl-*", "torch_*")
_YOUNG_SECONDS = 60


def left_in_shared_memory(place: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> list[Path]:
    """This user's files of which no process has any open or mapped: those that it was made for were killed.

    Others than this user's processes cannot use them: they are made for nobody else to read.
    """
    now, own = time.time(), os.getuid()
    found = {}
    for path in (path for pattern in _SHARED_FILES for path in place.glob(pattern)):
        with contextlib.suppress(OSError):
            status = path.lstat()
            # A young one may be about to be opened by the others that it is made for.
            if stat.S_ISREG(status.st_mode) and status.st_uid == own and now - status.st_mtime > _YOUNG_SECONDS:
                found[status.st_ino, status.st_dev] = path
    for process in processes.glob("[0-9]*"):
        if not found:
            break
        for inode in _files_of(process):
            found.pop(inode, None)
    return sorted(found.values())


def _files_of(process: Path) -> Iterator[tuple[int, int]]:
    """(inode, device) of each file that a process has open or mapped."""
    with contextlib.suppress(OSError):
        if process.stat().st_uid != os.getuid():
            return
        # Also by name: mappings outlive the descriptors that they were made with.
        for line in (process / "maps").read_text(errors="replace").splitlines():
            parts = line.split(maxsplit=5)
            if len(parts) == 6 and parts[4] != "0":
                major, minor = (int(number, 16) for number in parts[3].split(":"))
                yield int(parts[4]), os.makedev(major, minor)
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                status = descriptor.stat()
                yield status.st_ino, status.st_dev


def leftovers(clean: bool = False, place: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory that killed processes have left, of which a machine collects gigabytes.

    Args:
        clean: remove it.
        place: where it lies.
    """
    left = left_in_shared_memory(place)
    size = 0
    for path in left:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
            if clean:
                path.unlink()
    text = f"{len(left)} files, {size / _GIB:.1f} GiB, in {place} of processes that are gone"
    if not left:
        yield Finding("left in shared memory", "ok", "nothing")
    elif clean:
        yield Finding("left in shared memory", "ok", f"removed {text}")
    else:
        yield Finding(
            "left in shared memory", "warning", f"{text}, {left[0].name} among them", "wmtp-ds doctor --clean"
        )


def limits() -> Iterator[Finding]:
    """Limits of this shell that runs meet."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield Finding("open files", "warning", f"at most {files}", "ulimit -n 65536")
    else:
        yield Finding("open files", "ok", "unlimited" if files == resource.RLIM_INFINITY else f"at most {files}")
    cores = len(os.sched_getaffinity(0))
    yield Finding("processors", "ok", f"{cores} of {os.cpu_count()} may be used")


def ports(port: int = _PORT) -> Iterator[Finding]:
    """Ranks can meet: on the loopback address, on DeepSpeed's own port, and under this machine's name."""
    with socket.socket() as listener, socket.socket() as caller:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        caller.settimeout(5)
        caller.connect(listener.getsockname())
        yield Finding("loopback", "ok", "ranks on this machine can meet")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            yield Finding(f"port {port}", "ok", "free")
        except OSError as error:
            mend = "wmtp-ds train finds a free one; with deepspeed itself: --master_port ANOTHER."
            yield Finding(f"port {port}", "warning", f"taken ({error.strerror})", mend)
    try:
        yield Finding("host name", "ok", f"{socket.gethostname()} is {socket.gethostbyname(socket.gethostname())}")
    except OSError:
        mend = "For runs on many nodes, name this one in /etc/hosts or in the DNS."
        yield Finding("host name", "warning", f"{socket.gethostname()} has no address", mend)


def tracking(uri: str, seconds: int = 5) -> Iterator[Finding]:
    """MLflow answers, or its store can be written.

    Args:
        uri: ``mlflow.tracking_uri``.
        seconds: how long a server may take.
    """
    from wmtp_ds import mlflow_client

    if not uri:
        yield Finding("mlflow", "ok", "tracking is off (mlflow.tracking_uri is empty)")
        return
    shown = mlflow_client.mask_secrets(mlflow_client.clean_tracking_uri(uri))
    if uri.startswith("sqlite:///"):
        yield from _store(Path(uri.removeprefix("sqlite:///").partition("?")[0]), shown)
        return
    if urlsplit(uri).scheme not in ("http", "https"):
        yield Finding("mlflow", "ok", f"{shown} (not asked)")
        return
    try:
        client = mlflow_client.connect(mlflow_client.clean_tracking_uri(uri), timeout=seconds)
        client.search_experiments(max_results=1)
        yield Finding("mlflow", "ok", f"{shown} answers")
    except Exception as error:  # whatever MLflow and its transport raise
        mend = "Runs go on without it; when it is back: wmtp-ds track sync RUN_FOLDER."
        yield Finding("mlflow", "warning", f"{shown}: {mlflow_client.explain(error)}", mend)


def _store(file: Path, shown: str) -> Iterator[Finding]:
    place = nearest_folder(file)
    if os.access(place, os.W_OK):
        yield Finding("mlflow", "ok", f"{shown} ({'there' if file.exists() else 'to be made'})")
    else:
        yield Finding("mlflow", "warning", f"{shown}: {place} may not be written to", "Name another tracking_uri.")


def sandbox() -> Iterator[Finding]:
    """Whether solutions can be run against their tests, and what keeps them in."""
    from wmtp_ds.data.sandbox import sandbox_kind, what_is_missing
    from wmtp_ds.errors import RunError

    mend = "Install bubblewrap (sudo apt-get install bubblewrap). docs/sandbox.md says more."
    try:
        kind, missing = sandbox_kind(), what_is_missing()
    except RunError as error:
        text = str(error).splitlines()[0]
        yield Finding("sandbox", "warning", f"{text} Training does not need it; data label does.", mend)
        return
    if missing:
        yield Finding("sandbox", "warning", f"{kind}: {missing}", mend)
    else:
        yield Finding("sandbox", "ok", kind)
