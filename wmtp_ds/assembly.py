"""Models and engines of a stage, built from its config. Every rank calls these together."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from wmtp_ds import distributed
from wmtp_ds.config import Resolved
from wmtp_ds.engine import Engine, FrozenEngine, Zero3Sharding
from wmtp_ds.handoff import ValueHeadFile, check_value_head, load_value_head, locate_critic
from wmtp_ds.mlflow_client import inherited_tracking_uri
from wmtp_ds.models.fingerprint import read_trunk_fingerprint, store_trunk_fingerprint
from wmtp_ds.models.loading import check_architecture, load_policy, read_llama_config
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.models.reward import load_reward_model, read_reward_config
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.optimization import lr_schedule, param_groups
from wmtp_ds.stages.base import Stage, StageModel

logger = logging.getLogger("wmtp_ds")

# `load_policy`, or what stands in for it where weights are random.
Loader = Callable[..., MTPLlamaForCausalLM]


def fetch_critic(resolved: Resolved) -> Path | None:
    """The critic's value head as a local file, downloaded by one rank of each node; None elsewhere.

    Raises:
        UserError: if it is not there or cannot be fetched. Called before the process group forms.
    """
    config = resolved.config
    if not config.training.needs_critic or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    assert config.experiment.critic_checkpoint is not None
    path = locate_critic(
        config.experiment.critic_checkpoint,
        tracking_uri=inherited_tracking_uri(config.mlflow.tracking_uri),
        cache_dir=Path(config.checkpoint.save_dir).parent / ".critics",
    )
    policy = Path(config.models.policy.path)
    _read_critic(resolved, path, read_llama_config(policy).hidden_size, read_trunk_fingerprint(policy))
    return path


def check_models(resolved: Resolved) -> None:
    """Say what is wrong with a model's config.json before ranks make the model together.

    Raises:
        UserError: if it is missing, damaged, or describes no model that can be built.
    """
    models = resolved.config.models
    check_architecture(Path(models.policy.path))
    if resolved.config.loads_reference:
        assert models.reference is not None
        assert models.reference.path is not None
        check_architecture(Path(models.reference.path), n_future_tokens=1)
    if resolved.config.training.uses_rewards and models.reward.source == "model":
        assert models.reward.path is not None
        read_reward_config(models.reward.path)


def _read_critic(resolved: Resolved, path: Path, hidden_size: int, fingerprint: str | None) -> ValueHeadFile:
    """A critic's value head, if it fits the policy; what cannot be compared is warned about.

    Raises:
        UserError: naming both sides of what does not fit.
    """
    wanted = resolved.config.value_head
    trained = load_value_head(path)
    problems = check_value_head(
        trained,
        hidden_size=hidden_size,
        type=wanted.type,
        activation=wanted.activation,
        trunk_fingerprint=fingerprint,
    )
    if fingerprint is not None and distributed.is_main():
        for problem in problems:
            logger.warning("%s", problem)
    return trained


def trunk_fingerprint(policy: Path) -> str:
    """The stored fingerprint of a policy's trunk; if it came without one, computed once and stored beside it."""
    fingerprint = read_trunk_fingerprint(policy)
    if fingerprint is None and distributed.is_main():
        fingerprint = store_trunk_fingerprint(policy)
    return str(distributed.broadcast_object(fingerprint))


def build_engine(
    resolved: Resolved, stage: Stage, critic: Path | None, total_steps: int, load: Loader = load_policy
) -> Engine:
    """The policy, sharded as it is loaded, with the stage's value head and loss, under an optimizer.

    Raises:
        UserError: if weights are missing or damaged, or the critic does not fit the policy.
    """
    config, training = resolved.config, resolved.config.training
    ds_config = resolved.deepspeed(distributed.world_size())
    folder = Path(config.models.policy.path)
    policy = load(folder, sharding=Zero3Sharding(ds_config))
    policy.requires_grad_(stage.trains_policy)
    if training.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    value_head = None
    if training.has_value_head:
        value_head = _build_value_head(resolved, policy.config.hidden_size, distributed.broadcast_object(critic))
        # ZeRO-3 keeps all trained weights of a rank in one buffer, of one dtype; the head computes in float32 all the
        # same, and its masters are float32.
        value_head.to(policy.lm_head.weight.dtype)
    model = StageModel(policy, value_head, stage)
    groups = param_groups(
        model,
        learning_rate=training.learning_rate,
        value_lr=training.value_lr,
        weight_decay=training.weight_decay,
    )
    return Engine(
        model,
        ds_config,
        param_groups=groups,
        optimizer=training.optimizer,
        betas=training.betas,
        schedule=lr_schedule(training.scheduler, total_steps, training.warmup_ratio),
    )


def _build_value_head(resolved: Resolved, hidden_size: int, critic: Path | None) -> ValueHead:
    wanted = resolved.config.value_head
    head = ValueHead(hidden_size, wanted.type, wanted.activation)
    if critic is not None:
        fingerprint = trunk_fingerprint(Path(resolved.config.models.policy.path))
        # Before the engine is made: its float32 masters are copies of what the weights are then.
        head.load_state_dict(_read_critic(resolved, critic, hidden_size, fingerprint).state_dict)
    return head


def build_reward(resolved: Resolved) -> FrozenEngine:
    """The frozen reward model in an engine of its own."""
    reward = resolved.config.models.reward
    assert reward.path is not None
    ds_config = resolved.deepspeed_reward()
    return FrozenEngine(load_reward_model(reward.path, sharding=Zero3Sharding(ds_config)), ds_config)


def build_reference(resolved: Resolved, load: Loader = load_policy) -> FrozenEngine | None:
    """The frozen reference model in an engine of its own; None if the stage needs none, or reads its losses."""
    if not resolved.config.loads_reference:
        return None
    reference = resolved.config.models.reference
    assert reference is not None
    assert reference.path is not None
    ds_config = resolved.deepspeed_reference()
    folder = Path(reference.path)
    policy = load(folder, sharding=Zero3Sharding(ds_config), n_future_tokens=1)
    return FrozenEngine(ReferenceModel(policy), ds_config)
