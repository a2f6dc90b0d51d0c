"""Small setups that several tests of the plan start from."""

import json
from pathlib import Path
from typing import Any

from wmtp_ds.bench.settings import StepSettings
from wmtp_ds.bench.sizes import REFERENCES, SIZES
from wmtp_ds.bench.workspace import resolve
from wmtp_ds.plan.reading import Sizes, read_setup
from wmtp_ds.plan.setup import Frozen, Setup
from wmtp_ds.plan.shape import NAMED, ModelShape, plain
from wmtp_ds.plan.zero import ZeroSettings

LEAF = ZeroSettings(block_is_leaf=True, reduce_bucket=1_000_000)
SHAPE = ModelShape(64, 160, 3, 4, 2, 320, 4)


def setup(**changes: Any) -> Setup:
    """A small policy on two GPUs, in 16 bits."""
    defaults: dict[str, Any] = {
        "policy": SHAPE,
        "b": 2,
        "zero": LEAF,
        "ranks": 2,
        "device": "cuda",
        "kernels": "triton",
        "batch": 4,
        "length": 128,
        "accumulation": 2,
    }
    return Setup(**(defaults | changes))


def big(name: str = "7b", **changes: Any) -> Setup:
    """A named policy on four GPUs, as the production configs have it."""
    return setup(**({"policy": NAMED[name], "ranks": 4, "length": 2048, "checkpointing": True} | changes))


def frozen(name: str = "micro", **changes: Any) -> Frozen:
    """A frozen model."""
    return Frozen(plain(name), changes.get("b", 2), changes.get("zero", LEAF))


def workspace_of(record: dict[str, Any], folder: Path) -> Setup:
    """The setup of a recorded measurement: the benchmark's config and models, without weights and data."""
    settings = StepSettings(record["stage"], record["size"], "cpu", record["ranks"], record["length"], 1, 2, "sdpa")
    models = {"policy": SIZES[record["size"]]}
    if record["stage"] == "rho1":
        models["reference"] = REFERENCES[record["size"]]
    for name, shape in models.items():
        (folder / name).mkdir()
        fields = shape.fields(max_length=record["length"], attention="sdpa")
        (folder / name / "config.json").write_text(json.dumps(fields))
    dtypes = [f'models.{name}.dtype="float32"' for name in models]
    ours = [*dtypes, "training.gradient_accumulation_steps=1", *record["overrides"]]
    resolved = resolve(settings, folder, [], ours)
    return read_setup(resolved, ranks=record["ranks"], device="cpu", sizes=Sizes(), kernels="torch").setup
