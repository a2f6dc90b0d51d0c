"""`wmtp-ds model import | export | info` as they are typed: exit codes, JSON, messages without tracebacks."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import edit, rewrite
from transformers.utils import logging

from wmtp_ds.cli.main import main
from wmtp_ds.cli.model import Size
from wmtp_ds.config import load_config
from wmtp_ds.models.convert import safetensors_files
from wmtp_ds.models.fingerprint import compute_trunk_fingerprint

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def call(capsys):
    """Runs the program in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what making the models has said
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_there_and_back(call, make_release, tmp_path):
    """The commands of the documentation, one after the other."""
    folder, state = make_release(n_future_tokens=4, n_layers=6)
    code, out, err = call("model", "import", folder, tmp_path / "policy")
    assert code == 0
    assert out == (
        f"{tmp_path / 'policy'}: {sum(t.numel() for t in state.values()):,} parameters in {len(state)} tensors, "
        f"{sum(t.nbytes for t in state.values()) / 1e9:.2f} GB, 1 files; read back and found right\n"
    )
    assert (
        err.splitlines() == [f"written and compared: {percent} %" for percent in (25, 50, 75, 100)] or "compared" in err
    )
    for format in ("hf", "mtp", "meta"):
        assert call("model", "export", tmp_path / "policy", tmp_path / format, "--format", format)[0] == 0
    assert (
        load_file(tmp_path / "mtp/model.safetensors").keys() == load_file(tmp_path / "policy/model.safetensors").keys()
    )
    back = torch.load(tmp_path / "meta/consolidated.pth", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    code, out, err = call("model", "info", tmp_path / "policy")
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM, 2 trunk blocks, 4 heads" in out
    assert f"{'tokenizer':<15}" in out


def test_json(call, make_llama, tmp_path):
    """JSON alone on stdout, everything else on stderr."""
    source = make_llama()
    edit(source / "config.json", eos_token_id=1)
    code, out, err = call("model", "import", source, tmp_path / "policy", "--json", "--n-future", 2)
    told = json.loads(out)
    assert code == 0
    assert told["folder"] == str(tmp_path / "policy")
    assert told["source"] == str(source)
    assert told["files"] == ["model.safetensors"]
    assert told["resumed"] == []
    assert told["trunk_fingerprint"] == compute_trunk_fingerprint(tmp_path / "policy")
    assert told["parameters"] * 4 == told["nbytes"]
    assert len(told["warnings"]) == 1
    assert f"warning: {told['warnings'][0]}" in err
    code, out, _ = call("model", "export", tmp_path / "policy", tmp_path / "export", "--json")
    assert code == 0
    assert json.loads(out)["tensors"] < told["tensors"]
    code, out, err = call("model", "info", tmp_path / "policy", "--json")
    info = json.loads(out)
    assert (code, err) == (0, "")
    assert info["parameters"]["total"] == told["parameters"]
    assert (info["layout"], info["n_future_tokens"]) == ("mtp", 2)


def test_options(call, make_llama, tmp_path):
    source = make_llama()
    options = ("--heads", "random", "--n-future", 3, "--dtype", "bfloat16", "--seed", 7, "--max-shard-size", "60KB")
    assert call("model", "import", source, tmp_path / "a", *options)[0] == 0
    assert call("model", "import", source, tmp_path / "b", *options[:-4], "--max-shard-size", "60KB")[0] == 0
    one, other = (
        {name: tensor for file in (tmp_path / place).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for place in "ab"
    )
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    assert {name.split(".")[1] for name in one if name.startswith("mtp_heads")} == {"0", "1"}
    name = "mtp_heads.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name]), "--seed does nothing"
    assert max(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors")) < 70_000
    code, _, err = call("model", "import", source, tmp_path / "a", *options)
    assert (code, err) == (
        2,
        f"error: {tmp_path / 'a'} exists. Name another destination, or replace it with --force.\n",
    )
    assert call("model", "import", source, tmp_path / "a", *options, "--force")[0] == 0


def test_a_tokenizer_from_elsewhere(call, make_llama, tokenizer_folder, tmp_path):
    source = make_llama(tokenizer=False)
    code, _, err = call("model", "import", source, tmp_path / "policy")
    assert (code, "has no tokenizer" in err, "--tokenizer" in err) == (2, True, True)
    assert call("model", "import", source, tmp_path / "policy", "--tokenizer", tokenizer_folder)[0] == 0
    (tmp_path / "policy/tokenizer.json").unlink()
    assert call("model", "export", tmp_path / "policy", tmp_path / "no")[0] == 2
    assert call("model", "export", tmp_path / "policy", tmp_path / "yes", "--tokenizer", tokenizer_folder)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import",), "Missing argument"),
        (("import", "a"), "Missing argument 'DEST'"),
        (("import", "a", "b", "--heads", "none"), "'none' is not one of"),
        (("import", "a", "b", "--n-future", "0"), "0 is not in the range"),
        (("import", "a", "b", "--dtype", "int8"), "'int8' is not one of"),
        (("import", "a", "b", "--max-shard-size", "lots"), "'lots' is no size like 500MB, 4GB or 2GiB"),
        (("export", "a", "b", "--format", "onnx"), "'onnx' is not one of"),
        (("info",), "Missing argument 'PATH'"),
        (("import", "meta-llama/Llama-2-7b", "b"), "does not exist. Name a folder on this machine"),
        (("export", "nowhere", "b"), "nowhere does not exist"),
        (("info", "nowhere"), "nowhere does not exist"),
    ],
)
def test_wrong_usage(call, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("model", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 500_000_000),
        ("4GB", 4_000_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5 kb", 1500),
        ("0.5tib", 2**39),
        ("12B", 12),
        ("3KiB", 3072),
    ],
)
def test_sizes(text, size):
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "4 G B", "4GBs", "1e9", "0.1B", "4G"])
def test_what_is_no_size(text):
    with pytest.raises(Exception, match="is no size like"):
        Size().convert(text, None, None)


def test_errors_are_one_line(call, make_llama, tmp_path):
    source = make_llama()
    rewrite(source, lambda state: state["model.norm.weight"].fill_(torch.nan))
    for command in ("import", "export"):
        code, out, err = call("model", command, source, tmp_path / "result")
        assert (code, out) == (2, "")
        lines = [line for line in err.splitlines() if not line.startswith("written")]
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {source}/model.safetensors: model.norm.weight holds NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_transformers_logs_is_no_part_of_an_error(call, make_llama, tmp_path):
    source = make_llama()
    edit(source / "config.json", rope_parameters={"rope_type": "foo", "rope_theta": 1e4})
    verbosity = logging.get_verbosity()
    code, out, err = call("model", "import", source, tmp_path / "result")
    assert (code, out) == (2, "")
    assert err == f"error: {source}: config describes no model that can be built: KeyError: 'foo'\n"
    assert logging.get_verbosity() == verbosity


def test_a_full_disk_is_a_failure_at_run_time(call, make_llama, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = make_llama()
    monkeypatch.setattr(safetensors_files, "write", full)
    code, _, err = call("model", "import", source, tmp_path / "policy")
    assert (code, "the disk is full. Free space, and run the same command again." in err) == (1, True)


def test_an_interruption(call, make_llama, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    source = make_llama()
    monkeypatch.setattr(safetensors_files, "write", interrupted)
    assert call("model", "import", source, tmp_path / "policy")[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    write, calls = safetensors_files.write, []

    def second(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(safetensors_files, "write", second)
    assert call("model", "import", source, tmp_path / "policy", "--max-shard-size", "60KB")[0] == 130
    monkeypatch.undo()
    code, out, _ = call("model", "import", source, tmp_path / "policy", "--max-shard-size", "60KB")
    assert (code, "2 of them kept from an interrupted attempt" in out) == (0, True)


def test_the_policy_passes_validation(call, make_llama, tmp_path, checkout, monkeypatch):
    """What import writes is what `wmtp-ds validate` asks a policy to be."""
    assert call("model", "import", make_llama(), tmp_path / "policy")[0] == 0
    monkeypatch.chdir(checkout)
    overrides = [f"models.policy.path={tmp_path / 'policy'}", "dataset.max_length=100"]
    resolved = load_config(Path("stage_configs/local/baseline.toml"), overrides)
    assert resolved.config.models.policy.path == tmp_path / "policy"
    assert [warning for warning in resolved.warnings if "policy" in warning.key] == []


def test_the_program_as_a_process(make_llama, tmp_path):
    command = [
        sys.executable,
        "-m",
        "wmtp_ds",
        "model",
        "import",
        str(make_llama()),
        str(tmp_path / "policy"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "policy")
    assert "Warning" not in done.stderr
