"""`wmtp-ds model micro`: what it writes, that others can read it, and that the same seed gives the same bits."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from wmtp_ds.cli.main import main
from wmtp_ds.data.batches import TextEncoder
from wmtp_ds.models.fingerprint import compute_trunk_fingerprint, read_trunk_fingerprint
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.micro import make_micro_models, train_tokenizer


def write_rows(file: Path, count: int = 60) -> Path:
    rows = [
        {
            "problem_id": str(number),
            "instruction": f"Multiply x by {number} and subtract {number % 7}.",
            "output": f"def solve_{number}(x):\n    return x * {number} - {number % 7}\n",
            "is_correct": number % 3 > 0,
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(*arguments: str, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["model", "micro", *arguments])
    out, err = capsys.readouterr() if capsys else ("", "")
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the models made of it by the command."""
    root = tmp_path_factory.mktemp("micro")
    data = write_rows(root / "data.jsonl")
    assert command("--data", str(data), "--output", str(root), "--vocab-size", "400")[0] == 0
    return root


@pytest.fixture(scope="module")
def tokenizer(made):
    return load_tokenizer(made / "micro-policy")


def contents(folder: Path) -> list[str]:
    """Names in a folder, without the cached indexes of data files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".index.npz"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_is_written(made):
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trunk_fingerprint.json"}
    for name in ("micro-policy", "micro-reference"):
        assert {path.name for path in (made / name).iterdir()} == names
        assert read_trunk_fingerprint(made / name) == compute_trunk_fingerprint(made / name)
    assert contents(made) == ["data.jsonl", "micro-policy", "micro-reference"]


def test_the_policy_has_four_heads_and_the_reference_is_smaller(made):
    policy = load_policy(made / "micro-policy")
    reference = load_policy(made / "micro-reference", n_future_tokens=1)
    assert (policy.n_future_tokens, policy.config.num_hidden_layers) == (4, 3)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (policy, reference)]
    assert sizes[1] < sizes[0] / 2
    assert policy.config.num_key_value_heads < policy.config.num_attention_heads
    config = json.loads((made / "micro-reference" / "config.json").read_text())
    assert "n_future_tokens" not in config, "a plain Llama"
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])


def test_transformers_loads_and_generates(made, tokenizer):
    prompt = torch.tensor([tokenizer("def solve", add_special_tokens=False).input_ids])
    for name in ("micro-policy", "micro-reference"):
        plain = AutoModelForCausalLM.from_pretrained(made / name)
        assert (
            plain.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == prompt.shape[1] + 3
        )
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(made / "micro-policy").eval()(prompt).logits,
            load_policy(made / "micro-policy").eval()(prompt).logits,
        )


def test_both_have_one_tokenizer(made, tokenizer):
    other = AutoTokenizer.from_pretrained(made / "micro-reference")
    assert len(tokenizer) == 400
    for number in range(len(tokenizer)):
        assert tokenizer.convert_ids_to_tokens(number) == other.convert_ids_to_tokens(number)
    assert tokenizer.get_vocab() == other.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for name in ("micro-policy", "micro-reference"):
        config = json.loads((made / name / "config.json").read_text())
        assert config["vocab_size"] == 448, "rounded up to a multiple of 64"
        assert [config[f"{kind}_token_id"] for kind in ("pad", "bos", "eos")] == [0, 1, 2]


def test_the_tokenizer_learned_from_the_data(tokenizer):
    text = "def solve_7(x):\n    return x * 7 - 0\n"
    assert len(tokenizer(text).input_ids) < len(text) / 2
    assert tokenizer.convert_ids_to_tokens(tokenizer(" return").input_ids) == ["Ġreturn"]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["def ", "<s>", "</s>", "<pad>", " ", "  ", "\n", "\t", "\r\n", " .", "'s", "é", "中", "👩‍👩‍👧", "\0"]
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < len(tokenizer) for number in ids)


@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT)
def test_no_text_becomes_a_special_token(tokenizer, text):
    """As training encodes it: "</s>" in a solution is text, and does not end it."""
    (ids,) = TextEncoder(tokenizer)([text])
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


def test_the_same_seed_gives_the_same_bits(made, tmp_path):
    """In another process, with other hashes and threads."""
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    again = [sys.executable, "-m", "wmtp_ds", "model", "micro", "--data", str(made / "data.jsonl")]
    done = subprocess.run(
        [*again, "--output", str(tmp_path), "--vocab-size", "400", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(json.loads(done.stdout)) == [str(tmp_path / "micro-policy"), str(tmp_path / "micro-reference")]
    for name in ("micro-policy", "micro-reference"):
        assert digests(tmp_path / name) == digests(made / name)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(made, tmp_path):
    folders = {"policy": tmp_path / "policy", "reference": tmp_path / "reference"}
    state = torch.get_rng_state()
    sizes = make_micro_models(data=made / "data.jsonl", vocab_size=400, seed=1, **folders)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    for name, folder in folders.items():
        before, after = digests(made / f"micro-{name}"), digests(folder)
        differing = {file for file in before if before[file] != after[file]}
        assert differing == {"model.safetensors", "trunk_fingerprint.json"}
    assert sizes[1] < sizes[0]


def test_what_is_there_is_replaced(made, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", 5)
    (tmp_path / "micro-policy").mkdir()
    (tmp_path / "micro-policy" / "old.txt").write_text("old")
    options = ["--n-future-tokens", "2", "--hidden-size", "64", "--trunk-layers", "1", "--vocab-size", "259"]
    assert command("--data", str(data), "--output", str(tmp_path), *options)[0] == 0
    assert not (tmp_path / "micro-policy" / "old.txt").exists()
    policy = load_policy(tmp_path / "micro-policy")
    assert (policy.n_future_tokens, policy.config.num_hidden_layers, policy.config.hidden_size) == (2, 2, 64)
    reference = load_policy(tmp_path / "micro-reference", n_future_tokens=1)
    assert reference.num_parameters() < policy.num_parameters()


def test_says_what_was_made(made, tmp_path, capsys):
    options = ["--data", str(made / "data.jsonl"), "--output", str(tmp_path), "--hidden-size", "64"]
    code, out, _ = command(*options, "--vocab-size", "300", capsys=capsys)
    sizes = [
        load_policy(tmp_path / f"micro-{name}", n_future_tokens=n).num_parameters()
        for name, n in (("policy", 4), ("reference", 1))
    ]
    assert code == 0
    assert out == "".join(
        f"{tmp_path}/micro-{name}: {size:,} parameters\n"
        for name, size in zip(("policy", "reference"), sizes, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--hidden-size", "100"], "--hidden-size 100: must be a multiple of 32"),
        (["--hidden-size", "32"], "32 is not in the range x>=64"),
        (["--vocab-size", "258"], "258 is not in the range x>=259"),
        (["--n-future-tokens", "0"], "0 is not in the range x>=1"),
        (["--trunk-layers", "0"], "0 is not in the range x>=1"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: there is no such file. Make it with: wmtp-ds data sample"),
        (["--data", "empty.jsonl"], "empty.jsonl: the data file has no rows"),
        (["--data", "broken.jsonl"], "broken.jsonl:1: not JSON"),
        (["--output", "good.jsonl"], "--output good.jsonl: cannot be written"),
        (["--seed", "x"], "'x' is not a valid integer"),
        (["--seed", "9223372036854775808"], "9223372036854775808 is not in the range 0<=x<=9223372036854775807"),
        (["--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, capsys, options, part):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", 3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{\n")
    code, out, err = command("--data", "good.jsonl", *options, capsys=capsys)
    assert (code, out) == (2, "")
    assert part in err
    assert contents(tmp_path) == ["broken.jsonl", "empty.jsonl", "good.jsonl"]


def test_the_smallest_tokenizer_holds_every_byte():
    tokenizer = train_tokenizer(iter([]), 259)
    assert len(tokenizer) == 259
    assert tokenizer.decode(tokenizer("zß水🍌").input_ids) == "zß水🍌"
