"""A checkpoint made ready for another number of ranks: DeepSpeed's universal checkpoint, kept beside it.

DeepSpeed's own program converts: parameter by parameter, the float32 master and Adam's moments, whole. That takes as
much room as the checkpoint (twice as much while it runs) and is removed together with it.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from wmtp_ds.checkpoint_files import (
    CONVERTED,
    MANIFEST,
    PARTIAL,
    read_manifest,
    replace_folder,
    verify_manifest,
    write_manifest,
)
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.files import one_at_a_time, sha256_of
from wmtp_ds.signals import die_with_parent

_PROGRAM = "deepspeed.checkpoint.ds_to_universal"
# Where a launcher tells a process its place among the ranks.
PLACE_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Each reads a whole rank's shard into memory.
_WORKERS = 2
_REFUSED = 3  # exit code: a shard asks for code to be run


def convert(checkpoint: Path) -> Path:
    """The universal form of a sound checkpoint: made now, unless that has been done before, or is just being done.

    Returns:
        A folder of the checkpoint's name in ``.universal`` beside it.

    Raises:
        RunError: if it cannot be made, with the command that was tried.
        UserError: if a shard asks for code to be run.
    """
    with one_at_a_time(checkpoint / MANIFEST):
        manifest = read_manifest(checkpoint)
        source = sha256_of(checkpoint / MANIFEST)
        final = checkpoint.parent / CONVERTED / checkpoint.name
        return final if _is_of(final, source) else _convert(checkpoint, final, manifest, source)


def _convert(checkpoint: Path, final: Path, manifest: dict[str, Any], source: str) -> Path:
    # Names without their folders: DeepSpeed reads some characters in them as patterns.
    name = f"{CONVERTED}/{PARTIAL}{checkpoint.name}"
    partial = checkpoint.parent / name
    options = [f"--input_folder={checkpoint.name}", f"--output_folder={name}"]
    options += [f"--num_extract_workers={_WORKERS}", f"--num_merge_workers={_WORKERS}"]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "wmtp_ds.universal", str(checkpoint.parent), *options],
            # Nothing to compute: and whatever a launcher has set would have it wait for other ranks.
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            said = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            if done.returncode == _REFUSED:
                raise UserError(said[0])
            command = f"cd {checkpoint.parent} && {sys.executable} -m {_PROGRAM} {' '.join(options)}"
            raise RunError(
                f"{checkpoint} could not be converted for another number of ranks: {said[0]} (exit code "
                f"{done.returncode}). Free space, or go on with --num_gpus {manifest['world_size']}. Tried: {command}"
            )
        (partial.parent / "latest_universal").unlink(missing_ok=True)
        write_manifest(partial, step=manifest.get("step"), world_size=manifest["world_size"], source=source)
        replace_folder(partial, final)
    except OSError as error:
        raise RunError(f"{checkpoint} could not be converted for another number of ranks: {error}") from error
    return final


def _is_of(converted: Path, source: str) -> bool:
    """Whether a conversion is whole, and of the checkpoint whose manifest has this checksum."""
    try:
        return read_manifest(converted).get("source") == source and verify_manifest(converted) is None
    except UserError:
        return False


def _environment() -> dict[str, str]:
    dropped = (*PLACE_VARIABLES, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (package, kept.get("PYTHONPATH", "")) if part)
    # The program asks for whole pickles, of the checkpoint and of what it makes of it.
    return kept | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


if __name__ == "__main__":
    die_with_parent()
    os.chdir(sys.argv.pop(1))
    import torch

    from wmtp_ds.engine import saved_classes
    from wmtp_ds.shards import check_shards

    try:
        check_shards(Path(sys.argv[1].partition("=")[2]), saved_classes())
    except UserError as refusal:
        sys.stdout.write(f"{refusal}\n")
        sys.exit(_REFUSED)
    torch.serialization.add_safe_globals([*saved_classes()])  # its workers are forked
    runpy.run_module(_PROGRAM, run_name="__main__", alter_sys=True)
