"""What took for ever, or ended in a traceback, before it was refused: each by itself."""

import json
import struct
from typing import Any

import pytest
from config_workspace import Workspace
from fuzz_config import check_end
from in_process import command

from wmtp_ds.config.interpolation import _LONGEST_CHAIN
from wmtp_ds.masking import mask_urls, printable

DOUBLING = "\n".join(f't{i} = "${{experiment.tags.t{i + 1}}}${{experiment.tags.t{i + 1}}}"' for i in range(25))
CHAIN = "\n".join(f't{i} = "${{experiment.tags.t{i + 1}}}"' for i in range(_LONGEST_CHAIN + 5))
FORMS = {
    "dotted key": (".".join("a" * 100_000) + " = 1", "a key has more than 32 parts"),
    "dotted header": ("[" + ".".join("a" * 100_000) + "]", "a key has more than 32 parts"),
    "nested lists": ("[zz]\nx = " + "[" * 40 + "]" * 40, "more than 32 levels"),
    "many values": ("[zz]\n" + "\n".join(f"k{i} = {i}" for i in range(6000)), "more than 5000 values"),
    "long file": ("#" * 2**20, "longer than 1 MiB"),
    "values that double": (f'[experiment.tags]\n{DOUBLING}\nt25 = ""', "refer to each other without end"),
    "a long chain": (f'[experiment.tags]\n{CHAIN}\nt{_LONGEST_CHAIN + 5} = "a"', "made one of the other"),
    "hexadecimal": ("[zz]\nx = 0x" + "f" * 5000, "zz"),
    "half a pair": ('[experiment.tags]\nx = "\\ud800"', "is not TOML"),
}


@pytest.mark.parametrize("name", FORMS)
def test_too_much(workspace: Workspace, name: str) -> None:
    form, says = FORMS[name]
    workspace.write_config("baseline", append="\n" + form)
    done = command("validate", "run.toml")
    check_end(done, says, "run.toml")
    assert done.code == 2
    assert len(done.err) < 3000, "said once"


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "1" + "0" * 400, "9223372036854775808", "-9223372036854775809"])
@pytest.mark.parametrize("key", ["training.batch_size", "data_sampling.seed", "data_sampling.n_samples"])
def test_numbers_beyond_64_bits(workspace: Workspace, key: str, value: str) -> None:
    workspace.write_config("baseline")
    done = command("validate", "run.toml", "--override", f"{key}={value}")
    check_end(done, key)
    assert "is beyond 64 bits" in done.err or value.startswith("0x")  # of thousands of digits it stays a text
    assert done.code == 2


@pytest.mark.parametrize("value", ['{"\\ud800": "x"}', '{"x": "\\udfff"}', "{" + ".".join("a" * 20_000) + " = 1}"])
def test_overrides_that_cannot_be_written(workspace: Workspace, value: str) -> None:
    workspace.write_config("baseline")
    done = command("validate", "run.toml", "--override", f"experiment.tags={value}", "--json")
    assert done.code == 2
    assert json.loads(done.out)["problems"][0]["key"] == "experiment.tags"


def test_many_unknown_keys_take_no_time(workspace: Workspace) -> None:
    workspace.write_config("baseline", append="\n" + "\n".join(f"k{i} = 1" for i in range(3000)))
    done = command("validate", "run.toml", seconds=20)
    check_end(done, "3000 problems")


def test_a_misspelt_extends_is_recognised(workspace: Workspace) -> None:
    text = workspace.text("baseline")
    workspace.write("run.toml", 'extend = "base.toml"\n' + text)
    done = command("validate", "run.toml")
    check_end(done, "run.toml:1", 'did you mean "extends"?')


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", '"x"', "1" + "0" * 400])
def test_ids_of_tokens(workspace: Workspace, number: str) -> None:
    workspace.write_config("baseline")
    workspace.write("models/policy/tokenizer.json", f'{{"model": {{"vocab": {{"a": {number}}}}}}}')
    done = command("validate", "run.toml")
    check_end(done, "models/policy/tokenizer.json")
    assert done.code == 2


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"__metadata__": [1]}', b'{"__metadata__": "ab"}', b"1" + b"0" * 5000]
)
def test_headers_of_critics(workspace: Workspace, header: bytes) -> None:
    workspace.write_config("verifiable")
    workspace.path("critic/value_head.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    done = command("validate", "run.toml")
    check_end(done, "experiment.critic_checkpoint", "cannot be read")
    assert done.code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlap_comm", "yes"), ("reduce_bucket_size", "5"), ("stage3_max_live_parameters", 1.5), ("leaf_module", [])],
)
def test_deepspeed_values_of_another_type(workspace: Workspace, name: str, value: Any) -> None:
    workspace.write_config("baseline")
    workspace.write_json("ds/zero3.json", {"zero_optimization": {"stage": 3, name: value}})
    done = command("validate", "run.toml")
    check_end(done, f"zero_optimization.{name}, which must be")
    assert done.code == 2


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_attention_from_elsewhere(workspace: Workspace, name: str) -> None:
    workspace.write_config("baseline")
    workspace.edit_json("models/policy/config.json", **{name: "evil/kernel"})
    done = command("validate", "run.toml")
    check_end(done, "code of others is not run here")
    assert done.code == 2


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://u:p@h/x", "http://***@h/x"),
        ("http://u:a/b+c@h/x", "http://***@h/x"),
        ("http://h:5000/a@b", "http://h:5000/a@b"),
        ("http://u:1234@h", "http://***@h"),
        ("postgresql://u:p@ss@h/db", "postgresql://***@h/db"),
        ("http://h?a=1&api-key=x&sig=y", "http://h?a=1&api-key=***&sig=***"),
        ("no://secret", "no://secret"),
    ],
)
def test_masks(text: str, masked: str) -> None:
    assert mask_urls(text) == masked
    assert mask_urls(masked) == masked


def test_what_is_printed_does_nothing_to_a_terminal() -> None:
    assert printable("a\x1b[2J\r\u202eb\ud800\n\tü中") == "a\\x1b[2J\\r\\u202eb\\ud800\n\tü中"
