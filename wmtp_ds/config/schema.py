"""The schema of a run's configuration: one class a TOML table, and `RunConfig`, which holds them."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, create_model
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from wmtp_ds.config.fields import Dtype, PathText, Share, Table, Text
from wmtp_ds.config.training import TrainingConfig, training_class


def _as_tags(value: Any) -> Any:
    """A list of words is a set of tags, each of which is "true"."""
    if isinstance(value, list | tuple) and all(isinstance(tag, str) and tag for tag in value):
        return dict.fromkeys(value, "true")
    return value


class ExperimentConfig(Table):
    """``[experiment]``: what the run is."""

    # The name becomes a folder under checkpoints/.
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run: letters, digits, '.', '_' and '-'", examples=["my-run"]
    )
    stage: str = Field(description="the stage to train", examples=["baseline"])
    description: str = Field(default="", description="a sentence for the reader")
    tags: Annotated[dict[str, str], BeforeValidator(_as_tags)] = Field(
        default={}, description="tags of the tracked run: a table of texts, or a list of words"
    )
    critic_checkpoint: Text | None = Field(
        default=None,
        description="the critic's checkpoint: a folder, a file, runs:/..., mlflow-artifacts:/... or mlflow://...",
        examples=["checkpoints/critic-7b/checkpoint_best"],
    )


class ModelConfig(Table):
    """``[models.policy]``: a model folder."""

    name: str = Field(default="", description="a name for the reader")
    path: PathText = Field(description="the model's folder", examples=["storage/models/micro-policy"])
    tokenizer_path: PathText = Field(
        default_factory=lambda values: values["path"], description="the tokenizer's folder; default: path"
    )
    dtype: Dtype = Field(default="bfloat16", description="the type that the model computes in")


class ReferenceConfig(Table):
    """``[models.reference]``: a model folder, or what that model has to say, computed beforehand; or both."""

    name: str = Field(default="", description="a name for the reader")
    path: PathText | None = Field(
        default=None, description="the reference model's folder", examples=["storage/models/micro-reference"]
    )
    tokenizer_path: PathText | None = Field(
        default_factory=lambda values: values["path"], description="the tokenizer's folder; default: path"
    )
    dtype: Dtype = Field(default="bfloat16", description="the type that the model computes in")
    scores: PathText | None = Field(
        default=None,
        description="folder of the reference's losses, by `wmtp-ds data score`: the model is not loaded then",
        examples=["storage/scores/sample"],
    )


class RewardConfig(Table):
    """``[models.reward]``: where a solution's reward comes from."""

    source: Literal["is_correct", "model", "scores"] = Field(
        default="is_correct",
        description="the label in the data; a reward model; or its scores in the data (metadata.reward_score)",
    )
    path: PathText | None = Field(default=None, description="the reward model's folder")
    dtype: Dtype = Field(default="bfloat16", description="the type that the reward model computes in")
    squash: Literal["sigmoid", "zscore_sigmoid"] = Field(
        default="sigmoid",
        description="what brings scores into [0, 1]: the logistic function, of z-scores or as they are",
    )


class ModelsConfig(Table):
    """``[models]``: the models of the run."""

    policy: ModelConfig = Field(description="the model to train")
    reference: ReferenceConfig | None = Field(default=None, description="the frozen reference model")
    reward: RewardConfig = Field(default=RewardConfig(), description="the source of rewards")


class DatasetConfig(Table):
    """``[dataset]``: JSONL files of checked solutions."""

    name: Text = Field(description="name of the data, for the reader and the tracked run", examples=["sample"])
    train: PathText = Field(
        description="JSONL file of training solutions", examples=["storage/data/sample/train.jsonl"]
    )
    validation: PathText = Field(
        description="JSONL file of validation solutions", examples=["storage/data/sample/validation.jsonl"]
    )
    max_length: int = Field(default=2048, ge=2, description="tokens of a sequence, prompt and solution together")
    template: Literal["alpaca", "plain"] = Field(default="alpaca", description="how a prompt is written")
    cache_dir: str = Field(
        default="storage/cache/tokens", description="folder where the data's tokens are kept; '' keeps none"
    )
    allow_evaluation_data: bool = Field(
        default=False, description="whether rows marked as for evaluation only may be trained on"
    )


class CurriculumPhase(Table):
    """One item of ``data_sampling.curriculum_schedule``."""

    epoch_range: tuple[Share, Share] = Field(
        description="begin and end of the phase in fractions of the run", examples=[(0.0, 0.3)]
    )
    difficulty_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        description="weight of each of data_sampling.difficulty_bins; one that is not named weighs 0",
        examples=[{"low": 0.7, "medium": 0.3}],
    )


Difficulty = Annotated[int, Field(ge=1)]


class DataSamplingConfig(Table):
    """``[data_sampling]``: which rows are read, and in which mixture."""

    n_samples: int | None = Field(
        default=None, ge=1, description="rows of one epoch; default: all eligible rows", examples=[1000]
    )
    correct_ratio: Share = Field(default=1.0, description="share of correct solutions; default: the stage's")
    balance_correct: bool = Field(default=True, description="draw correct_ratio exactly")
    difficulty_range: tuple[Difficulty, Difficulty] | None = Field(
        default=None, description="lowest and highest difficulty to read; default: all rows", examples=[(1, 11)]
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="seed of the draw")
    curriculum_learning: bool = Field(default=False, description="follow curriculum_schedule")
    difficulty_bins: dict[str, tuple[Difficulty, Difficulty]] = Field(
        default={"low": (1, 3), "medium": (4, 7), "high": (8, 11)},
        description="names for ranges of difficulty, both ends included",
    )
    curriculum_schedule: tuple[CurriculumPhase, ...] = Field(
        default=(), description="phases of the run, each with its weights of the difficulties"
    )
    pack_sequences: bool = Field(
        default=False, description="several solutions in one row of up to dataset.max_length tokens"
    )


class ValueHeadConfig(Table):
    """``[value_head]``: the head that predicts whether the solution will turn out correct."""

    type: Literal["linear", "mlp"] = Field(default="linear", description="the head's shape")
    activation: Literal["sigmoid", "none"] = Field(default="sigmoid", description="what is applied to its output")


class EarlyStoppingConfig(Table):
    """``[early_stopping]``: when to stop before the last step. The defaults depend on the stage."""

    enabled: bool = Field(default=False, description="stop early at all")
    mode: Literal["any", "all", "loss_only"] = Field(default="any", description="which conditions must hold")
    monitor: Literal["loss", "value_loss"] = Field(default="loss", description="the loss that must improve")
    patience: int = Field(default=100, ge=1, description="checks without improvement before it has converged")
    min_delta: float = Field(default=1e-5, ge=0, description="a smaller improvement is none")
    grad_norm_threshold: float = Field(default=50.0, gt=0, description="a gradient norm above it is unstable")
    grad_norm_window_size: int = Field(default=10, ge=1, description="gradient norms that are looked at")
    grad_norm_threshold_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.7, description="share of the window above the threshold that is unstable"
    )
    variance_min: float | None = Field(
        default=None, ge=0, description="lowest variance of the predicted values", examples=[0.001]
    )
    variance_max: float | None = Field(
        default=None, ge=0, description="highest variance of the predicted values", examples=[0.2]
    )


class StabilityConfig(Table):
    """``[stability]``: what happens when numbers go bad."""

    max_skipped_steps: int = Field(
        default=5, ge=0, description="steps in a row without finite loss and gradient that stop the run; 0: never"
    )
    spike_factor: float = Field(
        default=0.0, ge=0, description="a loss above this many times the running median is a spike; 0: none is"
    )
    spike_window: int = Field(default=50, ge=2, description="losses of which the median is taken")
    on_spike: Literal["warn", "rollback"] = Field(
        default="warn", description="what a spike leads to: a line, or going back to the last checkpoint"
    )
    max_rollbacks: int = Field(default=3, ge=0, description="rollbacks; the spike after the last one stops the run")


class CheckpointConfig(Table):
    """``[checkpoint]``: what is saved, where and how often."""

    save_dir: PathText = Field(
        default=Path("checkpoints/${experiment.name}"),  # the layers interpolate it
        description="folder of the run's checkpoints",
    )
    save_checkpoint_every: float = Field(
        default=1.0, ge=0, description="epochs between two checkpoints to resume from; 0: none"
    )
    save_best: bool = Field(default=True, description="export the weights of the lowest val/loss")
    save_final: bool = Field(default=True, description="export the weights of the last step")
    save_total_limit: int = Field(default=3, ge=1, description="checkpoints that are kept to resume from")


def _refuse_mps(value: Any) -> Any:
    if value == "mps":
        raise ValueError("mps is refused: ZeRO-3 needs collectives, and no torch backend has them for MPS tensors")
    return value


class RuntimeConfig(Table):
    """``[runtime]``: the machine and the seed."""

    device: Annotated[Literal["auto", "cuda", "cpu"], BeforeValidator(_refuse_mps)] = Field(
        default="auto", description="where to train"
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="seed of initialisation and dropout")
    mixed_precision: bool = Field(
        default=True, description="compute in the model's dtype with float32 masters; false: float32 throughout"
    )
    peer_timeout: float = Field(
        default=1800.0, ge=1, le=7 * 86400, description="seconds that a rank waits for another before it gives up"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="how much is said")


class DeepSpeedConfig(Table):
    """``[deepspeed]``: the JSON files that DeepSpeed gets, without what the TOML owns."""

    config: PathText = Field(
        default=Path("ds_configs/zero3.json"),
        description="DeepSpeed's JSON for the trained model",
    )
    reference_config: PathText = Field(
        default=Path("ds_configs/zero3_reference.json"),
        description="DeepSpeed's JSON for a frozen model, reference or reward",
    )


class MlflowConfig(Table):
    """``[mlflow]``: where the run is tracked."""

    tracking_uri: str = Field(default="sqlite:///mlflow.db", description="MLflow's store; '' turns tracking off")
    experiment: Text = Field(default="wmtp-ds", description="MLflow's experiment")
    s3_artifacts: Annotated[str, StringConstraints(pattern=r"^(s3://[^/\s@]+(/[^\s@]*)?)?$")] = Field(
        default="", description="s3://bucket/prefix, without credentials, for artifacts; '' leaves it to MLflow"
    )
    parent_run_id: str = Field(default="", description="MLflow run under which this one is nested; '' for none")
    log_weights: bool = Field(
        default=True, description="a page at every evaluation: a histogram of weights, and one solution shaded by them"
    )


class RunConfig(BaseSettings):
    """The whole configuration of one run, frozen.

    `wmtp_ds.config.load_config` makes it. The layers are merged before, because each value's origin must be known
    by then; so the model reads no source by itself, but names the environment's prefix and delimiter.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        env_prefix="WMTP_",
        env_nested_delimiter="__",
    )

    experiment: ExperimentConfig
    models: ModelsConfig
    dataset: DatasetConfig
    data_sampling: DataSamplingConfig
    training: TrainingConfig
    value_head: ValueHeadConfig = ValueHeadConfig()  # only stages with a value head read it
    early_stopping: EarlyStoppingConfig
    stability: StabilityConfig
    checkpoint: CheckpointConfig
    runtime: RuntimeConfig
    deepspeed: DeepSpeedConfig
    mlflow: MlflowConfig

    @property
    def loads_reference(self) -> bool:
        """Whether the reference model is in memory: the stage needs its losses, and they are not computed yet."""
        reference = self.models.reference
        return self.training.needs_reference and (reference is None or reference.scores is None)

    @property
    def reference_dtype(self) -> str:
        """What the reference computes in, ``runtime.mixed_precision`` considered; "" without one."""
        reference = self.models.reference
        if reference is None:
            return ""
        return reference.dtype if self.runtime.mixed_precision else "float32"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The merged layers, handed over as arguments, are the only source."""
        return (init_settings,)


def run_config_class(stage: str | None) -> type[RunConfig]:
    """`RunConfig` whose ``training`` table is the stage's; with the common fields alone where the stage is None.

    Raises:
        KeyError: no such stage.
    """
    return _with_training(training_class(stage)) if stage else RunConfig


@cache
def _with_training(training: type[TrainingConfig]) -> type[RunConfig]:
    return create_model(f"{training.__name__}Run", __base__=RunConfig, training=(training, ...))
