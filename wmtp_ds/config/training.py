"""The ``training`` table: one class a stage, and the registry of stages that declaring such a class fills.

A further stage is one more subclass here (and its file under ``wmtp_ds/stages``): the class says which fields the
stage has, what it needs, and where its defaults differ. Nothing else in the configuration knows a stage by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from wmtp_ds.config.fields import Share, Table

_STAGES: dict[str, type["TrainingConfig"]] = {}


class TrainingConfig(Table):
    """The fields that every stage has.

    Subclasses name their stage, ``class X(TrainingConfig, stage="x")``; one without a stage is a mixin of fields.
    """

    stage: ClassVar[str] = ""
    # What the stage needs besides the policy and its data: tables and keys that only such stages may set.
    needs_reference: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    has_value_head: ClassVar[bool] = False
    uses_rewards: ClassVar[bool] = False
    reads_frozen_models: ClassVar[bool] = False  # follows from those above
    bounds_value_variance: ClassVar[bool] = False
    # Where the stage's defaults differ.
    default_correct_ratio: ClassVar[float] = 1.0
    default_early_stopping: ClassVar[Mapping[str, object]] = {
        "monitor": "loss",
        "patience": 100,
        "min_delta": 1e-5,
    }

    n_epochs: float = Field(gt=0, description="passes over the sampled rows; fractions are allowed", examples=[1.0])
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after this many optimizer steps", examples=[100]
    )
    batch_size: int = Field(ge=1, description="sequences that one GPU reads at once", examples=[4])
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="micro-batches of one optimizer step")
    learning_rate: float = Field(gt=0, le=1, description="peak learning rate", examples=[1e-5])
    value_lr: float = Field(
        default_factory=lambda values: values["learning_rate"],
        gt=0,
        le=1,
        description="peak learning rate of the value head; default: learning_rate",
        examples=[1e-4],
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimizer")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of the first and second moment"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="what the learning rate does after the warm-up"
    )
    warmup_ratio: Share = Field(default=0.0, description="share of the steps in which the learning rate rises")
    max_grad_norm: float = Field(default=1.0, ge=0, description="clip gradients to this norm; 0 turns it off")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    log_interval: int = Field(default=10, ge=1, description="optimizer steps between two log lines")
    eval_interval: int = Field(default=100, ge=1, description="optimizer steps between two evaluations")

    def __init_subclass__(cls, *, stage: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, stage: str = "", **kwargs: Any) -> None:
        # pydantic hands the class keywords to both hooks, and this one runs once the fields are known.
        super().__pydantic_init_subclass__(**kwargs)
        if not stage:
            return
        if stage in _STAGES:
            raise TypeError(f"stage {stage!r} is declared twice: {_STAGES[stage].__name__} and {cls.__name__}")
        cls.stage = stage
        cls.reads_frozen_models = cls.needs_reference or cls.uses_rewards
        _STAGES[stage] = cls


def stage_names() -> tuple[str, ...]:
    """The stages that exist, in the order of their declaration."""
    return tuple(_STAGES)


def training_class(stage: str) -> type[TrainingConfig]:
    """The config class of a stage.

    Raises:
        KeyError: no such stage.
    """
    return _STAGES[stage]


def unregister_stage(stage: str) -> None:
    """Forget a stage. For tests that declare one.

    Raises:
        KeyError: no such stage.
    """
    del _STAGES[stage]


class _ValueLoss(TrainingConfig):
    """What every stage that trains a value head has."""

    has_value_head = True
    uses_rewards = True
    default_correct_ratio = 0.5

    gamma: Share = Field(default=1.0, description="discount of the value one token later")
    loss_type: Literal["mse", "huber", "mae"] = Field(default="mse", description="the value loss")
    value_target: Literal["return", "gae"] = Field(
        default="return", description="what the value head learns: the discounted reward, or value plus advantage"
    )
    gae_lambda: Share = Field(default=0.95, description="lambda of the target 'gae'")


class BaselineTraining(TrainingConfig, stage="baseline"):
    """Uniform weights: nothing besides the common fields."""


class CriticTraining(_ValueLoss, stage="critic"):
    """The value head alone, over a frozen trunk."""

    bounds_value_variance = True
    default_early_stopping: ClassVar[Mapping[str, object]] = {
        "monitor": "value_loss",
        "patience": 10,
        "min_delta": 1e-4,
    }


class VerifiableTraining(_ValueLoss, stage="verifiable"):
    """TD-error weights (AWR/IQL) from a value head that a critic run has trained."""

    needs_critic = True

    beta: float = Field(gt=0, description="temperature of the weights: smaller is more extreme", examples=[0.9])
    value_coef: float = Field(ge=0, description="factor of the value loss beside the policy loss", examples=[0.5])
    weight_clip_min: float = Field(ge=0, description="lower bound of a token's weight", examples=[0.1])
    weight_clip_max: float = Field(gt=0, description="upper bound of a token's weight", examples=[5.0])
    td_lambda: Share = Field(default=0.0, description="above 0: GAE of this lambda in place of the TD error")
    td_normalize: Literal["none", "zscore"] = Field(
        default="none", description="normalise the TD errors over the global batch"
    )
    weight_norm: Literal["none", "mean1"] = Field(
        default="none", description="rescale the weights to mean 1 over the global batch"
    )
    value_grad_to_trunk: bool = Field(default=True, description="let the value loss train the trunk, too")
    shuffle_weights: bool = Field(
        default=False, description="a control: deal each solution's weights to other tokens of it, at random"
    )


class Rho1Training(TrainingConfig, stage="rho1"):
    """Selection by excess loss over a frozen reference model (Rho-1)."""

    needs_reference = True

    temperature: float = Field(gt=0, description="temperature of the weighting 'softmax'", examples=[1.0])
    k_percent: float = Field(gt=0, le=1, description="share of the targets that 'topk' selects", examples=[0.6])
    excess: Literal["signed", "absolute", "reference"] = Field(
        default="signed", description="score of a token: the excess loss, its absolute value, the reference loss"
    )
    weighting: Literal["topk", "softmax"] = Field(
        default="topk", description="select the highest scores, or weigh the heads softly"
    )
    selection_scope: Literal["batch", "sequence"] = Field(
        default="batch", description="the group in which 'topk' selects: the micro-batch or each sequence"
    )
