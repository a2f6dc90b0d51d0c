"""All that a rank, its launcher and a command import, once for those of all tests (see ranks.py)."""
# ruff: noqa: E402, F401

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import matplotlib.pyplot
import mlflow.store.tracking.sqlalchemy_store
import mlflow.tracking
import transformers.models.llama.modeling_llama
import triton

import wmtp_ds.bench.measure
import wmtp_ds.cli.main
import wmtp_ds.train
from wmtp_ds.engine import saved_classes

saved_classes()  # imports DeepSpeed as a rank does

import deepspeed.launcher.launch
import deepspeed.runtime.zero.stage3
