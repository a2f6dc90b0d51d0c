"""What the profile of the step has shown to be waste stays out of the training loop."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from wmtp_ds.bench.sizes import SIZES
from wmtp_ds.bench.workspace import resolve
from wmtp_ds.config.deepspeed_file import merge_reference, merge_training
from wmtp_ds.models.mtp import MTPLlamaForCausalLM
from wmtp_ds.stages.base import Output

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    from wmtp_ds.bench.settings import StepSettings

    settings = StepSettings("rho1", "micro", "cpu", 1, 64, 1, 2, "sdpa")
    return resolve(settings, tmp_path, [], []).config


def test_deepspeeds_timers_do_not_wait_for_the_device(config):
    values = {"zero_optimization": {"stage": 3}}
    for merged in (merge_training(config, values, 1), merge_reference(config, config.models.reference, values)):
        assert merged["timers"]["throughput"] == {"enabled": False, "synchronized": False}
    # Who wants them has them.
    wanted = {"throughput": {"enabled": True, "synchronized": True}}
    assert merge_training(config, values | {"timers": wanted}, 1)["timers"] == wanted


@pytest.mark.parametrize("name", ["zero3", "zero3_cpu", "zero3_reference"])
def test_a_block_is_gathered_as_a_whole(name):
    """Hooks of DeepSpeed on each layer of a block take more time than a small block's computation."""
    zero = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]
    [path] = zero["leaf_module"]["classes"]
    module, _, attribute = path.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    with torch.device("meta"):
        from transformers import LlamaConfig

        policy = MTPLlamaForCausalLM(LlamaConfig.from_dict(SIZES["micro"].fields(max_length=64, attention="sdpa")))
    assert all(isinstance(block, kind) for block in (*policy.model.layers, *policy.mtp_heads))
    if name != "zero3_cpu":  # the next block is gathered while one computes
        assert zero["stage3_prefetch_bucket_size"] >= SIZES["7b"].block_matrices


def test_angles_and_mask_are_made_once_for_all_blocks(monkeypatch):
    from transformers import LlamaConfig

    policy = MTPLlamaForCausalLM(LlamaConfig.from_dict(SIZES["micro"].fields(max_length=64, attention="sdpa")))
    calls = []
    original = policy.model.rotary_emb.forward
    monkeypatch.setattr(policy.model.rotary_emb, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    policy.head_states(policy.trunk(torch.zeros(1, 8, dtype=torch.int64)))
    assert len(calls) == 2  # of the trunk, and of the heads


def test_metrics_come_to_the_host_in_one_copy(monkeypatch):
    from wmtp_ds.metrics import WindowMetrics
    from wmtp_ds.weighting.statistics import moments

    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or original(self))
    window = WindowMetrics()
    window.add(Output(torch.tensor(1.0), {"a": torch.tensor(2.0)}, {"td": moments(torch.tensor([1.0, 3.0]))}))
    metrics, _ = window.reduce(0, {"norm": torch.tensor(0.5)})
    assert len(copies) == 1
    assert (metrics["a"], metrics["td/mean"], metrics["norm"]) == (2.0, 2.0, 0.5)
