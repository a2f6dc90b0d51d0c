"""The state of a rank's random numbers, in plain types and tensors.

Rows come from a plan that is a pure function of config and seed, so nothing that a step reads depends on these; they
matter where a model's own config asks for dropout.
"""

import hashlib
import random
from typing import Any

import torch

from wmtp_ds import distributed


def seed_random(seed: int) -> None:
    """Begin the streams of Python and of every torch device."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """This rank's state."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, Any] | None, device: torch.device, origin: tuple[int, int]) -> None:
    """Go on with a rank's state; without one (another number of ranks), begin a stream of this rank's own.

    Args:
        state: what `random_state` returned on this rank.
        device: this rank's.
        origin: seed and step, which a new stream depends on, besides the rank.
    """
    if state is None:
        digest = hashlib.sha256(repr((*origin, distributed.rank(), distributed.world_size())).encode()).digest()
        seed_random(int.from_bytes(digest[:8], "big"))
        return
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
