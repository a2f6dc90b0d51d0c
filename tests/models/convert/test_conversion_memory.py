"""Peak memory of import and export: at most 1.5 times the largest shard, as the kernel counts it.

The models have some 250 MB in shards of at most 140 MB, so a conversion that holds the model, or two shards, fails.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import LLAMA, RELEASE, divide, release_state

# Each job is done with a small model first, so that what libraries load once does not count; then measured.
MEASURE = """
import ctypes, json, re, sys
from pathlib import Path
import torch
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model

trim = lambda: ctypes.CDLL(None).malloc_trim(0)

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def convert(source, destination, kind, options):
    if "dtype" in options:
        options = options | {"dtype": getattr(torch, options["dtype"])}
    {"import": import_model, "export": export_model}[kind](Path(source), Path(destination), force=True, **options)

grown = {}
for name, (small, large, kind, options) in json.loads(sys.argv[1]).items():
    result = Path(large + "-result")
    convert(small, result, kind, options)
    trim()  # memory that an earlier job has given back would hide what this one takes
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    convert(large, result, kind, options)
    peak = memory("VmHWM") - before
    files = [file for folder in (Path(large), result) for file in folder.iterdir()]
    grown[name] = peak / max(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pth"))
print(json.dumps(grown))
"""
SHARDS = {"shard_bytes": 60_000_000}
JOBS = {
    "import to another dtype": ("small", "large", "import", SHARDS | {"dtype": "bfloat16"}),
    "import with copies": ("small-plain", "large-plain", "import", SHARDS),
    "import with new heads": ("small-plain", "large-plain", "import", SHARDS | {"heads": "random"}),
    "export to hf": ("small", "large", "export", SHARDS | {"format": "hf"}),
    "export to meta": ("small", "large", "export", {"format": "meta"}),
    "import of pickled shards": ("small-pickled", "large-pickled", "import", SHARDS),
    "import of Meta's shards": ("small-release", "large-release", "import", SHARDS),
    "export of Meta's shards": ("small-release", "large-release", "export", {"format": "meta"}),
}


def write_folder(folder: Path, tokenizer: Path, heads: int, *, pickled: bool = False, **sizes: int) -> None:
    """A model in shards of some 30 to 65 MB, without ever making it."""
    folder.mkdir()
    config = LLAMA | sizes | {"num_key_value_heads": 4, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config | ({"n_future_tokens": heads} if heads > 1 else {})))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    d, f = config["hidden_size"], config["intermediate_size"]
    blocks = [f"model.layers.{number}" for number in range(config["num_hidden_layers"])]
    blocks += [f"mtp_heads.{number}" for number in range(heads - 1)]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for block in blocks:
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (d, f), f"{block}.input_layernorm.weight": (d,)}
        shapes |= {f"{block}.post_attention_layernorm.weight": (d,)}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > 30_000_000:
            shards.append({})
        shards[-1][name] = torch.full(shape, 0.5)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"part-{number}.{'bin' if pickled else 'safetensors'}"
        torch.save(shard, folder / file) if pickled else save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def write_release(folder: Path, tokenizer: Path, feed_forward: int, **sizes: int) -> None:
    """Meta's layout in two shards."""
    folder.mkdir()
    params = RELEASE | {"n_kv_heads": 4} | sizes
    for rank, part in enumerate(divide(release_state(params, feed_forward, torch.float32, 0), 2, 1)):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder)


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tokenizer_folder, sentencepiece_file):
    """Growth of the peak in each job, in units of the largest file of weights read or written."""
    root = tmp_path_factory.mktemp("memory")
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 16000}
    for size, sizes in (("small", {}), ("large", large)):
        write_folder(root / size, tokenizer_folder, 2, **sizes)
        write_folder(root / f"{size}-plain", tokenizer_folder, 1, **sizes)
        write_folder(root / f"{size}-pickled", tokenizer_folder, 1, pickled=True, **sizes)
    write_release(root / "small-release", sentencepiece_file, 176)
    sizes = {"dim": 1024, "vocab_size": 16000, "multiple_of": 256, "n_layers": 3, "n_future_tokens": 2}
    write_release(root / "large-release", sentencepiece_file, 2816, **sizes)
    assert sum(path.stat().st_size for path in (root / "large").iterdir()) > 250e6
    jobs = {name: (str(root / small), str(root / large), *rest) for name, (small, large, *rest) in JOBS.items()}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(jobs)], capture_output=True, text=True)
    shutil.rmtree(root)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("job", JOBS)
def test_peak_memory(grown, job):
    assert grown[job] < 1.5, f"{grown[job]:.2f} times the largest shard"
