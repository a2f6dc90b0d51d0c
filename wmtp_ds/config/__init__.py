"""The configuration of a run: schema, layers, checks. Nothing here imports torch, transformers, deepspeed or mlflow."""

from wmtp_ds.config.errors import ConfigError, Origin, Problem
from wmtp_ds.config.load import load_config
from wmtp_ds.config.resolved import Resolved
from wmtp_ds.config.schema import (
    CheckpointConfig,
    CurriculumPhase,
    DataSamplingConfig,
    DatasetConfig,
    DeepSpeedConfig,
    EarlyStoppingConfig,
    ExperimentConfig,
    MlflowConfig,
    ModelConfig,
    ModelsConfig,
    ReferenceConfig,
    RewardConfig,
    RunConfig,
    RuntimeConfig,
    StabilityConfig,
    ValueHeadConfig,
)
from wmtp_ds.config.training import (
    BaselineTraining,
    CriticTraining,
    Rho1Training,
    TrainingConfig,
    VerifiableTraining,
    stage_names,
    training_class,
)

__all__ = [
    "BaselineTraining",
    "CheckpointConfig",
    "ConfigError",
    "CriticTraining",
    "CurriculumPhase",
    "DataSamplingConfig",
    "DatasetConfig",
    "DeepSpeedConfig",
    "EarlyStoppingConfig",
    "ExperimentConfig",
    "MlflowConfig",
    "ModelConfig",
    "ModelsConfig",
    "Origin",
    "Problem",
    "ReferenceConfig",
    "Resolved",
    "RewardConfig",
    "Rho1Training",
    "RunConfig",
    "RuntimeConfig",
    "StabilityConfig",
    "TrainingConfig",
    "ValueHeadConfig",
    "VerifiableTraining",
    "load_config",
    "stage_names",
    "training_class",
]
