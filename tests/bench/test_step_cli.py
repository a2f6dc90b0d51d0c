"""``wmtp-ds bench step``: what is typed reaches the measurement, and what is wrong is said in a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from wmtp_ds.bench import run as running
from wmtp_ds.bench.settings import MATERIALISED
from wmtp_ds.cli import main as program
from wmtp_ds.cli.bench_step import SIZES, step
from wmtp_ds.errors import RunError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch, capfd):
    """The program with this command alone: exit code, standard output, standard error."""
    monkeypatch.setitem(program.COMMANDS, "step", ("wmtp_ds.cli.bench_step:step", ""))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            program.main(["step", *arguments])
        return ended.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def no_ranks(monkeypatch):
    monkeypatch.setattr(running, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "verifable"], r"--stage verifable: there is no such stage; did you mean .?verifiable"),
        (["--stage", "baseline", "--size", "13b"], r"'13b' is not one of 'micro', '160m', '1b', '7b'"),
        (["--stage", "baseline", "--device", "tpu"], r"'tpu' is not one of"),
        (["--stage", "baseline", "--device", "cuda"], r"torch finds no GPU"),
        (["--stage", "baseline", "--device", "cpu", "--k-percent", "0.5"], r"training.k_percent"),
        (["--stage", "rho1", "--device", "cpu", "--k-percent", "1.5"], r"training.k_percent"),
        (["--stage", "baseline", "--device", "cpu", "--dtype", "float16"], r"float16 does not train on a CPU"),
        (["--stage", "baseline", "--device", "cpu", "--override", "training.betta=1"], r"training.betta"),
        (["--stage", "baseline", "--device", "cpu", "--attention", "flish"], r"--attention flish: .*flish"),
        (["--stage", "baseline", "--sequence-length", "8"], r"8 is not in the range x>=64"),
        (["--stage", "baseline", "--peak-tflops", "0"], r"0.* is not in the range x>0"),
        (["--stage", "baseline", "--compare-scores"], r"--compare-scores: stage baseline has no reference model"),
        ([], r"Missing option '--stage'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(bench, no_ranks, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = bench(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert __import__("re").search(message, err), err


def test_too_large_a_model_is_refused_with_the_arithmetic(bench, no_ranks, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 24 * 2**30}))
    code, _, err = bench("--stage", "rho1", "--size", "7b", "--device", "cpu")
    assert code == 2
    assert "--size 7b does not fit this machine with 24.0 GiB available" in err
    assert "trained parameters × 20 bytes" in err
    assert "frozen ones × 4 bytes" in err
    # A critic trains no policy: 27 GiB of frozen float32 weights are too much, of bfloat16 ones they are not.
    assert bench("--stage", "critic", "--size", "7b", "--device", "cpu")[0] == 2
    monkeypatch.setattr(running, "write_workspace", lambda *_: (_ for _ in ()).throw(RunError("far enough")))
    code, _, err = bench("--stage", "critic", "--size", "7b", "--device", "cpu", "--dtype", "bfloat16")
    assert (code, err) == (1, "error: far enough\n")


def test_an_output_that_cannot_be_written_is_known_before_minutes_pass(bench, no_ranks, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = bench("--stage", "baseline", "--device", "cpu", "--output", str(tmp_path / "file"))
    assert code == 2
    assert "--output" in err


def test_ranks_that_fail_end_the_command_with_1(bench, monkeypatch):
    monkeypatch.setattr(running, "run_ranks", lambda *_, **__: 7)
    code, out, err = bench("--stage", "baseline", "--device", "cpu")
    assert (code, out) == (1, "")
    assert "ended with exit code 7" in err


def test_what_is_typed_reaches_the_measurement(monkeypatch):
    seen = []

    def fake(settings, chosen, overrides):
        seen.append((settings, dict(text.split("=", 1) for text in chosen), overrides))
        seconds, extra = (3.0, 6000) if settings.logits == MATERIALISED else (1.5, 1000)
        return {"step_seconds": seconds, "memory": {"extra": extra}}

    monkeypatch.setattr(running, "_run", fake)
    typed = ["--stage", "rho1", "--device", "cpu", "--num_gpus", "3", "--size", "160m", "--accumulation", "2"]
    typed += ["--k-percent", "0.3", "--compare-materialised", "--json", "--override", "training.excess=absolute"]
    result = CliRunner().invoke(step, typed, standalone_mode=False)
    assert result.exception is None
    assert json.loads(result.stdout)["compared"] == {"time": 2.0, "memory": 6.0}
    (settings, chosen, overrides), (other, *_) = seen
    assert (settings.ranks, settings.size, settings.sequence_length, settings.logits) == (3, "160m", 512, "fused")
    assert other.logits == MATERIALISED
    assert overrides == ("training.excess=absolute",)
    assert chosen == {
        "models.policy.dtype": '"float32"',
        "training.batch_size": "4",
        "training.gradient_accumulation_steps": "2",
        "training.gradient_checkpointing": "false",
        "training.k_percent": "0.3",
    }


def test_defaults_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(running, "_run", lambda settings, chosen, _: seen.append((settings, chosen)) or {})
    for size in ([], ["--size", "7b"]):
        CliRunner().invoke(step, ["--stage", "baseline", "--json", *size], standalone_mode=False)
    (first, chosen), (_, of_7b) = seen
    assert (first.device, first.size, first.sequence_length) == ("cuda", "1b", 2048)
    assert not any(text.startswith("models.policy.dtype") for text in chosen)  # the stage's: bfloat16
    assert "training.gradient_checkpointing=false" in chosen
    assert "training.gradient_checkpointing=true" in of_7b


def test_sizes_are_those_that_there_are():
    from wmtp_ds.bench import sizes

    assert tuple(sizes.SIZES) == tuple(sizes.REFERENCES) == SIZES


def test_help_is_quick_and_has_an_example():
    code = (
        "import sys; from click.testing import CliRunner; from wmtp_ds.cli.bench_step import step;"
        "result = CliRunner().invoke(step, ['--help']); print(result.output);"
        "assert not {'torch', 'transformers', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example: wmtp-ds bench step --stage" in done.stdout
