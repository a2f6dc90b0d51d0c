"""Which checks are made, for a config or for none."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wmtp_ds.config import Resolved
from wmtp_ds.config.deepspeed_file import offloads
from wmtp_ds.doctor import machine, software
from wmtp_ds.doctor.finding import Check, Finding, examine
from wmtp_ds.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What a run asks of a machine; the defaults are those of no config in particular."""

    device: str = "auto"
    save_dir: Path = Path("checkpoints")
    tracking_uri: str = "sqlite:///mlflow.db"
    offload: bool = False
    checkpoints: int = 0

    @classmethod
    def of(cls, resolved: Resolved) -> "Needs":
        """A config's."""
        config = resolved.config
        return cls(
            device=config.runtime.device,
            save_dir=Path(config.checkpoint.save_dir),
            tracking_uri=config.mlflow.tracking_uri,
            offload=offloads(resolved.deepspeed(1), "offload_optimizer"),
            checkpoints=_checkpoint_bytes(resolved),
        )


def _checkpoint_bytes(resolved: Resolved) -> int:
    """What the checkpoints of a run take that trains its policy: float32 masters and moments, and two exports.

    0 where the model's size is not known.
    """
    from wmtp_ds.plan.reading import Sizes, kernels_on, read_setup

    kept = resolved.config.checkpoint
    try:
        setup = read_setup(resolved, ranks=1, device="cpu", sizes=Sizes(), kernels=kernels_on("cpu")).setup
    except UserError:
        return 0
    if not setup.trains_policy:
        return 0
    trained = setup.policy.parameters
    state = (4 + 8 * setup.adam + setup.b * (setup.b < 4)) * trained
    # While one is written, the oldest of those that are kept is still there.
    periodic = (kept.save_total_limit + 1) * state if kept.save_checkpoint_every else 0
    return int(periodic + (kept.save_best + kept.save_final) * setup.b * trained)


def examination(needs: Needs, *, clean: bool = False) -> Iterator[Finding]:
    """Every finding, in the order in which they are of use; with ``clean``, what killed processes left is removed."""
    checks: dict[str, Check] = {
        "python": software.python,
        "libraries": software.libraries,
        "gpu": partial(software.gpus, needs.device),
        "deepspeed import": software.deepspeed,
        "compilers": partial(software.compilers, needs.offload, needs.device),
        "loss kernels": software.kernels,
        "disk": partial(machine.disk, needs.save_dir, needs.checkpoints),
        "memory": machine.memory,
        "left in shared memory": partial(machine.leftovers, clean),
        "limits": machine.limits,
        "ports": machine.ports,
        "mlflow": partial(machine.tracking, needs.tracking_uri),
        "sandbox": machine.sandbox,
    }
    for name, check in checks.items():
        yield from examine(name, check)
