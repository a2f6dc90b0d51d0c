"""All that a rank imports, once for the ranks of all tests (see ranks.py)."""
# ruff: noqa: F401

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.stage3
import mlflow
import transformers.models.llama.modeling_llama

import wmtp_ds.train
