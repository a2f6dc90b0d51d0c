"""A run's config as a :class:`wmtp_ds.plan.setup.Setup`, and in words what had to be assumed."""

import ast
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmtp_ds.config import Resolved
from wmtp_ds.errors import UserError
from wmtp_ds.models.config_file import read_config_fields
from wmtp_ds.plan.setup import Frozen, Setup
from wmtp_ds.plan.shape import NAMED, ModelShape, plain, size_named_in
from wmtp_ds.plan.workspace import Kernels
from wmtp_ds.plan.zero import ZeroSettings

_PLAIN = {name: plain(name) for name in NAMED}


@dataclass
class Sizes:
    """Named sizes as typed; None leaves a model's size to its folder, or to what the config calls it."""

    policy: str | None = None
    reference: str | None = None
    reward: str | None = None


@dataclass
class Reading:
    """A setup, and the sentences that say what it rests on."""

    setup: Setup
    notes: list[str] = field(default_factory=list)


def read_setup(resolved: Resolved, *, ranks: int, device: str, sizes: Sizes, kernels: Kernels) -> Reading:
    """What a config asks for.

    Args:
        resolved: the config; its files need not be there, but the DeepSpeed JSON must.
        ranks: over which states are sharded.
        device: "cuda" or "cpu".
        sizes: named sizes.
        kernels: which loss kernels run there.

    Raises:
        UserError: if a model's size cannot be known, or the DeepSpeed JSON cannot be planned.
    """
    config, training = resolved.config, resolved.config.training
    notes: list[str] = []
    policy_config = config.models.policy
    names = (policy_config.name, str(policy_config.path), *config.experiment.tags.values(), config.experiment.name)
    policy = _shape("policy", Path(policy_config.path), sizes.policy, names, NAMED, notes)
    mixed = config.runtime.mixed_precision
    reference = None
    if config.loads_reference:
        assert config.models.reference is not None
        model = config.models.reference
        assert model.path is not None
        shape = _shape("reference", model.path, sizes.reference, (model.name, str(model.path)), _PLAIN, notes)
        zero = ZeroSettings.from_json(resolved.deepspeed_reference(), str(config.deepspeed.reference_config))
        reference = Frozen(shape.with_heads(1), _bytes(model.dtype, mixed), zero)
    elif training.needs_reference:
        notes.append("reference: none in memory; its losses are read from models.reference.scores")
    reward = None
    if config.models.reward.source == "model" and training.uses_rewards:
        reward = _reward(resolved, sizes, notes)
    zero_settings = ZeroSettings.from_json(resolved.deepspeed(ranks), str(config.deepspeed.config))
    setup = Setup(
        policy=policy,
        b=_bytes(policy_config.dtype, mixed),
        zero=zero_settings,
        ranks=ranks,
        device=device,
        kernels=kernels,
        batch=training.batch_size,
        length=config.dataset.max_length,
        accumulation=training.gradient_accumulation_steps,
        packed=config.data_sampling.pack_sequences,
        checkpointing=training.gradient_checkpointing,
        adam=training.optimizer != "sgd",
        decays=training.weight_decay > 0,
        trains_policy=trains_policy(config.experiment.stage),
        value_head=config.value_head.type if training.has_value_head else "",
        needs_window=any(getattr(training, key, "none") != "none" for key in ("td_normalize", "weight_norm")),
        selects=training.needs_reference and getattr(training, "weighting", "topk") == "topk",
        reference=reference,
        reward=reward,
    )
    return Reading(setup, notes)


def _bytes(dtype: str, mixed_precision: bool) -> int:
    return 2 if mixed_precision and dtype != "float32" else 4


def _reward(resolved: Resolved, sizes: Sizes, notes: list[str]) -> Frozen:
    """The reward model, which scores rows in an engine of its own before the policy is loaded."""
    config = resolved.config
    path = config.models.reward.path
    folder = Path(path) if path is not None else Path("models.reward.path")
    shape = _shape("reward model", folder, sizes.reward, (str(folder),), _PLAIN, notes)
    zero = ZeroSettings.from_json(resolved.deepspeed_reward(), str(config.deepspeed.reference_config))
    return Frozen(shape.with_heads(1), _bytes(config.models.reward.dtype, config.runtime.mixed_precision), zero)


def _shape(
    role: str, folder: Path, typed: str | None, names: Sequence[str], known: dict[str, ModelShape], notes: list[str]
) -> ModelShape:
    """A model's shape: as typed, else from its folder, else as its name says."""
    option = {"policy": "--size", "reference": "--reference-size", "reward model": "--reward-size"}[role]
    if typed is not None:
        shape = known[typed]
        notes.append(f"{role}: size {typed} ({_count(shape)}), as {option} says")
        return shape
    if (folder / "config.json").is_file():
        fields = read_config_fields(folder)
        if fields.get("model_type") != "llama":
            raise UserError(
                f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}; only Llama-architecture models "
                f"can be planned. Name a size that comes near it: {option} {'|'.join(NAMED)}."
            )
        shape = ModelShape.from_fields(fields, str(folder / "config.json"))
        notes.append(f"{role}: {folder} ({_count(shape)})")
        return shape
    named = size_named_in(*names)
    if named is None:
        raise UserError(
            f"the {role}'s size is not known: {folder}/config.json is not there, and the config's names say none. "
            f"Add {option} {'|'.join(NAMED)}."
        )
    shape = known[named]
    source = next(name for name in names if size_named_in(name) == named)
    notes.append(
        f"{role}: {folder} is not there; size {named} ({_count(shape)}) assumed, since the "
        f"config calls it {source!r} ({option} sets another)"
    )
    return shape


def _count(shape: ModelShape) -> str:
    size = shape.parameters
    return f"{size / 1e9:.2f} billion parameters" if size >= 1e9 else f"{size / 1e6:.1f} million parameters"


def trains_policy(stage: str) -> bool:
    """Whether a stage's class says so, read from its file: importing it would import torch."""
    spec = importlib.util.find_spec(f"wmtp_ds.stages.{stage}")
    if spec is None or spec.origin is None:
        return True
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = any(isinstance(target, ast.Name) and target.id == "trains_policy" for target in targets)
            if named and isinstance(node.value, ast.Constant):
                return bool(node.value.value)
    return True


def kernels_on(device: str, environ: Any = os.environ) -> Kernels:
    """Which loss kernels run on a device: as ``wmtp_kernels.backend`` chooses."""
    wanted = environ.get("WMTP_KERNELS", "")
    if wanted == "torch" or (wanted != "triton" and device != "cuda"):
        return "torch"
    return "triton" if importlib.util.find_spec("triton") is not None else "torch"
