"""The process group, seen from above: every function also works in a single process without one."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wmtp_ds.errors import UserError


def initialized() -> bool:
    """Whether a process group has formed."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which alone speaks, logs and writes exports."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, as a new tensor."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all ranks, as a new tensor."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def gather_equal(tensor: Tensor) -> Tensor:
    """Every rank's tensor, stacked: all of one shape ``[...]`` -> ``[ranks, ...]``, on all ranks."""
    if world_size() == 1:
        return tensor.detach()[None]
    gathered = tensor.new_empty(world_size() * tensor.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(gathered, tensor.detach().flatten())
    return gathered.view(world_size(), *tensor.shape)


def _reduce(tensor: Tensor, operation: Any) -> Tensor:
    result = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result, op=operation)
    return result


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value``, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_arrays(tensor: Tensor) -> Tensor:
    """Concatenate every rank's tensor along dimension 0, which may differ in length; on all ranks."""
    if world_size() == 1:
        return tensor
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank, on all ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank; the others wait for up to a day.

    Raises:
        UserError: on every rank, what ``work`` raises on rank 0.
    """
    if world_size() == 1:
        return work()
    # Of its own, because ranks that wait for another longer than the timeout of the group at large give up.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = work()
        except UserError as error:
            error.everywhere = True
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=patient)
    dist.destroy_process_group(patient)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def caught(failures: list[str]) -> Iterator[None]:
    """What goes wrong with files inside becomes a text in ``failures``: the ranks must go on to where they agree."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failures.append(str(error) or type(error).__name__)


def failures_of_all(failures: list[str]) -> list[str]:
    """What has gone wrong on any rank, the same on all of them: "rank 1: …"."""
    return [f"rank {number}: {text}" for number, texts in enumerate(gather_objects(failures)) for text in texts]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an error, or what caused it, says no more than that another rank is gone (gloo's words, and NCCL's)."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|remote process exited"
    r"|Application timeout caused pair closure|Socket Timeout|Timed out waiting \d+ms|ncclRemoteError"
    r"|failed to recv, got 0 bytes"
)


def close() -> None:
    """Leave the process group."""
    if initialized():
        dist.destroy_process_group()
