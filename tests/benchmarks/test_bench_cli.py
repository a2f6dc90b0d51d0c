"""Both command lines: options, defaults, user errors, and a run with torch and the kernels alone."""

import dataclasses
import json
import random
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import torch
from wmtp_kernel_benchmarks import report, run, targets
from wmtp_kernel_benchmarks.inputs import Sizes
from wmtp_kernel_benchmarks.options import OPTIONS, Settings, UsageError, parse, plan

from wmtp_ds.cli.bench import bench

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
REPOSITORY = Path(__file__).resolve().parents[2]
BRIEF = ("--quick", "--no-sweep", "--device=cpu", "--rounds=1")


def test_it_runs_with_torch_and_the_kernels_alone(tmp_path, alone):
    code = 'print(sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)'
    command = [*BRIEF, "--arms=td,liger-none", f"--output={tmp_path}"]
    done = alone([*command, "--json"], code)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["command"].startswith(
        "python -m benchmarks --rounds 1 --arms td,liger-none --no-sweep --device cpu"
    )
    assert document["sizes"][0]["results"]["td"]["status"] == "measured"
    loaded = set(re.findall(r"'(\w+)'", done.stderr.splitlines()[-1]))
    assert loaded >= {"torch", "wmtp_kernels", "benchmarks"}
    assert not loaded & {
        "wmtp_ds",
        "wmtp_kernel_benchmarks",
        "click",
        "transformers",
        "deepspeed",
        "mlflow",
        "pydantic",
    }


def test_without_matplotlib_there_is_no_plot_and_a_note(tmp_path, monkeypatch, capsys, ran):
    monkeypatch.setitem(sys.modules, "wmtp_kernel_benchmarks.plot", None)
    report.write(ran.document, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.csv", "table.txt"}
    assert capsys.readouterr().err == "no plot: matplotlib is not installed\n"


USAGE = [
    (["--arms", "tdd"], "--arms tdd: there is no such arm. Did you mean 'td'?"),
    (["--arms", "td,quark"], "--arms quark: there is no such arm. There are: floor, torch, "),
    (
        ["--positions", "100", "--length", "64"],
        "--positions 100: must be a multiple of the sequences' length, --length 64",
    ),
    (["--arms", ","], "names no arm"),
    (["--rounds", "0"], "'0' is not a whole number from 1 on"),
    (["--heads", "two"], "'two' is not a whole number from 1 on"),
    (["--dim", "100"], "'100' is not a multiple of 8 from 8 on"),
    (["--k-percent", "60"], "'60' does not lie in (0, 1]"),
    (["--k-percent", "half"], "'half' does not lie in (0, 1]"),
    (["--dtype", "int8"], "'int8' is none of float32, bfloat16, float16, float64"),
    (["--clock", "sun"], "'sun' is none of wall, cpu"),
    (["--output", __file__], f"--output {__file__}: is a file; name a folder"),
    (["--output", f"{__file__}/below"], f"--output {__file__}/below: cannot be written: Not a directory"),
    (["--frobnicate"], "--frobnicate"),
]


@pytest.mark.parametrize(("arguments", "said"), USAGE)
def test_wrong_usage_is_one_clear_message(arguments, said, tmp_path, monkeypatch, capsys, call):
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--device", "cpu", *arguments]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    from wmtp_kernel_benchmarks.__main__ import main as standalone

    try:
        code = standalone(arguments)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert said in " ".join(captured.err.split())
    assert "Traceback" not in err + captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, call):
    code, out, err = call("--device", "cuda", "--output", str(tmp_path / "new"))
    assert (code, out) == (2, "")
    assert err == "error: --device cuda: torch sees no CUDA device. Leave the option out, or say --device cpu\n"
    assert not (tmp_path / "new").exists()


def test_both_command_lines_have_the_same_options(capsys):
    command = bench.get_command(click.Context(bench), "kernels")
    assert command is not None
    typed = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.M)) == typed
    assert {option.field for option in OPTIONS} == {field.name for field in dataclasses.fields(Settings)}
    assert "Example: python -m benchmarks" in text


def random_settings(seed: int) -> Settings:
    chooser = random.Random(seed)
    values = {
        "heads": 3, "positions": 96, "length": 32, "dim": 64, "vocabulary": 100, "dtype": "bfloat16",
        "k_percent": 0.55, "rounds": 2, "arms": ("td", "cut-exact"), "sweep": chooser.random() < 0.5, "device": "cpu",
        "threads": 2, "clock": "cpu", "seed": 7, "output": Path("a folder/x"), "quick": True, "check": True,
    }  # fmt: skip
    return Settings(**{name: value for name, value in values.items() if chooser.random() < 0.5})


def test_what_is_typed_reaches_the_run_on_both_command_lines(monkeypatch, call):
    seen: list[Settings] = []
    monkeypatch.setattr(run, "run", lambda settings, program: seen.append(settings) or 0)
    for seed in range(25):
        asked = random_settings(seed)
        arguments = shlex.split(asked.arguments())
        assert parse(arguments) == asked
        assert call(*arguments)[0] == 0
        assert seen.pop() == asked


def test_defaults_of_each_device():
    gpu, cpu = plan(Settings(), "cuda"), plan(Settings(), "cpu")
    assert (gpu.heads, gpu.positions, gpu.dim, gpu.vocabulary, gpu.dtype) == (4, 8192, 4096, 32_000, "bfloat16")
    assert gpu.sweep == (1024, 2048, 4096, 16_384)
    assert gpu.heads * gpu.length == 8192  # a sequence of all heads is a chunk, the batch is more than one
    assert (cpu.heads, cpu.positions, cpu.dim, cpu.vocabulary, cpu.dtype) == (4, 1024, 512, 32_000, "float32")
    assert cpu.sweep == (128, 256, 512)
    for made, sizes in ((gpu, targets.GPU_SIZES), (cpu, targets.CPU_SIZES)):
        assert {name: getattr(made, name) for name in sizes} == sizes
        assert made.k_percent == 0.6
    assert gpu.bandwidth_positions == targets.BANDWIDTH_POSITIONS
    assert 4 * 2 * gpu.check_length > 8192  # checked over more than one chunk
    assert gpu.output == Path("benchmarks-out/kernels")
    assert plan(Settings(sweep=False), "cuda").sweep == ()
    assert plan(Settings(quick=True, dim=128), "cuda").dim == 128
    assert plan(Settings(quick=True), "cuda").dtype == "bfloat16"
    assert plan(Settings(positions=12, length=4), "cpu").sweep == (1, 3)  # 6 is not whole sequences of 4
    assert plan(Settings(positions=100), "cpu").length == 100
    with pytest.raises(UsageError, match="the GPU's own"):
        plan(Settings(clock="cpu"), "cuda")


def test_the_folder_for_results_is_ignored_by_git():
    assert "/benchmarks-out/" in (REPOSITORY / ".gitignore").read_text().split()


def test_figures_that_json_has_no_word_for():
    document = {"a": [float("nan"), {"b": float("inf")}], "c": 1.5, "d": None}
    assert json.loads(report.to_json(document)) == {"a": ["nan", {"b": "inf"}], "c": 1.5, "d": None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, call):
    code, out, err = call("--quick", "--device", "cuda", f"--output={tmp_path}", "--json")
    assert code == 0, err
    document = json.loads(out)
    results = report.main_size(document)["results"]
    for name in ("floor", "torch", "weighted", "td", "rho1-sequence", "rho1-batch", "reference"):
        assert results[name]["status"] == "measured"
        assert results[name]["cpu"] is None
        assert results[name]["wall"]["median"] > 0
        assert results[name]["extra_bytes"] is not None
    assert document["environment"]["device"] == torch.cuda.get_device_name()
