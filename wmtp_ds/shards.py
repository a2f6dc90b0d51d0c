"""DeepSpeed's shards are pickles: here they are read as data. Nothing in them is run, whoever wrote them.

DeepSpeed asks `torch.load` for whole pickles. ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` overrules that, for all of its callers:
then tensors, plain types and the few classes that a shard of ours holds are all that is made.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from wmtp_ds.errors import UserError

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def plain_data_only(classes: Sequence[type]) -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain types and ``classes`` alone, whatever its caller asks for.

    Raises:
        UserError: a file asks for something else.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(_refused("a shard of the checkpoint", " ".join(str(error).split())[:300])) from None
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_shards(folder: Path, classes: Sequence[type]) -> None:
    """Look through the shards of a checkpoint for code; their tensors are not read.

    Raises:
        UserError: one asks for code to be run, or is no file of `torch.save`.
    """
    allowed = {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}
    for file in sorted(folder.rglob("*.pt")):
        try:
            foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - allowed
        except Exception as error:  # whatever a damaged file makes of torch
            why = f"it is no file of torch.save ({' '.join(str(error).split())[:100]})"
            raise UserError(_refused(str(file), why)) from None
        if foreign:
            raise UserError(_refused(str(file), f"it asks for {', '.join(sorted(foreign)[:4])} to be run"))


def _refused(what: str, why: str) -> str:
    return f"{what} was not read: {why}. Code in a checkpoint is never run: resume from one that wmtp-ds made."
