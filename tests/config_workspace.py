"""A small world on disk for configurations: hand-made models, data, DeepSpeed files and a critic."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from wmtp_ds.config import ConfigError, Problem, Resolved, load_config

HIDDEN, VOCABULARY, BLOCKS, HEADS = 4, 6, 3, 2
INNER, QUERIES, KEYS = 8, 2, 1  # so the keys of a block have one head of two
TRUNK = "ab" * 32

STAGE_PARTS = {
    "baseline": "",
    "critic": "",
    "verifiable": "beta = 0.9\nvalue_coef = 0.5\nweight_clip_min = 0.1\nweight_clip_max = 5.0\n",
    "rho1": "temperature = 1.0\nk_percent = 0.6\n",
}


def write_safetensors(path: Path, shapes: Mapping[str, list[int]], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of float32 zeros, written byte by byte."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def block_shapes(prefix: str) -> dict[str, list[int]]:
    """The tensors of a Llama block."""
    shapes = {
        "self_attn.q_proj": [4, 4],
        "self_attn.k_proj": [2, 4],
        "self_attn.v_proj": [2, 4],
        "self_attn.o_proj": [4, 4],
        "mlp.gate_proj": [8, 4],
        "mlp.up_proj": [8, 4],
        "mlp.down_proj": [4, 8],
        "input_layernorm": [4],
        "post_attention_layernorm": [4],
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


class Workspace:
    """A folder with everything that a valid configuration names; tests break one thing at a time."""

    def __init__(self, root: Path):
        self.root = root
        for model in ("policy", "reference"):
            self.write_model(f"models/{model}", heads=HEADS if model == "policy" else 1)
        self.write_rows("data/train.jsonl", 30)
        self.write_rows("data/validation.jsonl", 3)
        self.write_json("ds/zero3.json", {"zero_optimization": {"stage": 3}})
        self.write_json("ds/reference.json", {"zero_optimization": {"stage": 3}})
        self.write_critic()

    def path(self, name: str) -> Path:
        return self.root / name

    def write(self, name: str, text: str) -> Path:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def write_json(self, name: str, value: object) -> Path:
        return self.write(name, json.dumps(value, indent=1))

    def write_rows(self, name: str, count: int) -> Path:
        rows = [
            {"problem_id": str(i), "instruction": "add", "output": f"x = {i}", "is_correct": i % 2 == 0}
            for i in range(count)
        ]
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_model(self, name: str, heads: int = HEADS, tokens: Iterable[str] = "abcdef") -> None:
        config = {
            "model_type": "llama",
            "num_hidden_layers": BLOCKS,
            "n_future_tokens": heads,
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_attention_heads": QUERIES,
            "num_key_value_heads": KEYS,
        }
        self.write_json(f"{name}/config.json", config)
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self.write_json(f"{name}/tokenizer.json", {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}})
        self.write_json(f"{name}/trunk_fingerprint.json", {"sha256": TRUNK})
        shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
        shapes["lm_head.weight"] = [VOCABULARY, HIDDEN]
        for index in range(BLOCKS):
            shapes |= block_shapes(f"model.layers.{index}")
        for index in range(heads - 1):
            shapes |= block_shapes(f"mtp_heads.{index}")
        write_safetensors(self.path(f"{name}/model.safetensors"), shapes)

    def edit_json(self, name: str, **changes: object) -> None:
        """Set keys of a JSON file; None removes one."""
        content = json.loads(self.path(name).read_text()) | changes
        self.write_json(name, {key: value for key, value in content.items() if value is not None})

    def edit_weights(self, name: str, changes: Mapping[str, list[int] | None]) -> None:
        """Set shapes of tensors of a model's folder; None removes one."""
        path = self.path(f"{name}/model.safetensors")
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        shapes = {tensor: entry["shape"] for tensor, entry in header.items()} | changes
        write_safetensors(path, {tensor: shape for tensor, shape in shapes.items() if shape is not None})

    def write_critic(self, name: str = "critic/value_head.safetensors", hidden: int = HIDDEN, **changes: str) -> None:
        metadata = {
            "hidden_size": str(hidden),
            "type": "linear",
            "activation": "sigmoid",
            "trunk_fingerprint": TRUNK,
        } | changes
        shapes = {"norm.weight": [hidden], "output.weight": [1, hidden], "output.bias": [1]}
        write_safetensors(self.path(name), shapes, {key: value for key, value in metadata.items() if value})

    def text(self, stage: str) -> str:
        """A valid config of a stage."""
        critic = 'critic_checkpoint = "critic"\n' if stage == "verifiable" else ""
        reference = '[models.reference]\npath = "models/reference"\ndtype = "float32"\n\n' if stage == "rho1" else ""
        reference_config = 'reference_config = "ds/reference.json"\n' if stage == "rho1" else ""
        return (
            f'[experiment]\nname = "trial"\nstage = "{stage}"\n{critic}\n'
            '[models.policy]\npath = "models/policy"\ndtype = "float32"\n\n'
            f"{reference}"
            '[dataset]\nname = "tiny"\ntrain = "data/train.jsonl"\nvalidation = "data/validation.jsonl"\n\n'
            "[data_sampling]\nn_samples = 8\n\n"
            "[training]\nn_epochs = 1.0\nbatch_size = 2\nlearning_rate = 1e-3\n"
            f"{STAGE_PARTS.get(stage, '')}\n"
            f'[deepspeed]\nconfig = "ds/zero3.json"\n{reference_config}\n'
            '[mlflow]\ntracking_uri = ""\n'
        )

    def write_config(self, stage: str = "verifiable", *edits: tuple[str, str], append: str = "") -> Path:
        """Write run.toml: the valid config with pieces of its text replaced, and more at its end."""
        text = self.text(stage)
        for old, new in edits:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the config"
            text = text.replace(old, new)
        return self.write("run.toml", text + append)

    def line(self, fragment: str, name: str = "run.toml") -> str:
        """``file:line`` of a piece of text that stands once in a file."""
        text = self.path(name).read_text()
        assert text.count(fragment) == 1, f"{fragment!r} stands {text.count(fragment)} times in {name}"
        return f"{name}:{text[: text.index(fragment)].count(chr(10)) + 1}"

    def load(
        self, *overrides: str, environ: Mapping[str, str] | None = None, checks: bool = True, online: bool = False
    ) -> Resolved:
        return load_config(Path("run.toml"), overrides, environ=environ or {}, checks=checks, online=online)

    def problems(
        self, *overrides: str, environ: Mapping[str, str] | None = None, checks: bool = True, online: bool = False
    ) -> list[Problem]:
        """What is wrong with run.toml."""
        with pytest.raises(ConfigError) as caught:
            self.load(*overrides, environ=environ, checks=checks, online=online)
        assert caught.value.exit_code == 2
        assert all(problem.severity == "error" and problem.mend for problem in caught.value.problems)
        return caught.value.problems
