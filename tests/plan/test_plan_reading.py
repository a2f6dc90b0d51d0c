"""From a config to a setup, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.config import load_config
from wmtp_ds.config.training import stage_names
from wmtp_ds.errors import UserError
from wmtp_ds.plan import machine
from wmtp_ds.plan.plan import GIB
from wmtp_ds.plan.reading import Reading, Sizes, kernels_on, read_setup, trains_policy
from wmtp_ds.plan.shape import NAMED, plain
from wmtp_ds.stages.base import make_stage

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "mlflow", "triton", "numpy")


@pytest.fixture(autouse=True)
def _in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with the configs, and without models or GPUs."""
    for name in ("stage_configs", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", list)


def read(stage: str, *overrides: str, sizes: Sizes | None = None, ranks: int = 4, device: str = "cuda") -> Reading:
    resolved = load_config(Path(f"stage_configs/{stage}.toml"), overrides, checks=False, environ={})
    return read_setup(resolved, ranks=ranks, device=device, sizes=sizes or Sizes(), kernels="triton")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def write_model(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
    fields = {"model_type": "llama", "vocab_size": 1000, "n_future_tokens": 2} | sizes | changes
    (folder / "config.json").write_text(json.dumps(fields))


# --- config to setup ---


def test_the_production_configs_can_be_planned_without_models() -> None:
    rho1 = read("rho1")
    setup = rho1.setup
    assert setup.policy == NAMED["7b"]
    assert setup.reference is not None
    assert setup.reference.shape == plain("2.7b")
    assert (setup.b, setup.batch, setup.length, setup.accumulation) == (2, 4, 2048, 4)
    assert (setup.ranks, setup.checkpointing, setup.adam, setup.selects) == (4, True, True, True)
    assert "7b" in rho1.notes[0]
    assert "assumed" in rho1.notes[0]
    assert "2.7b" in rho1.notes[1]
    assert setup.zero.block_is_leaf
    assert setup.reference.zero.prefetch_bucket == 250_000_000


def test_stages_differ() -> None:
    critic, verifiable, baseline = (read(stage).setup for stage in ("critic", "verifiable", "baseline"))
    assert (critic.trains_policy, critic.value_head, critic.batch) == (False, "mlp", 8)
    assert (verifiable.trains_policy, verifiable.value_head, verifiable.needs_window) == (True, "mlp", False)
    assert (baseline.value_head, baseline.reference, baseline.selects) == ("", None, False)
    for key in ("td_normalize='zscore'", "weight_norm='mean1'"):
        assert read("verifiable", f"training.{key}").setup.needs_window
    assert not read("rho1", "training.weighting='softmax'").setup.selects


def test_settings_are_taken() -> None:
    setup = read(
        "baseline",
        "training.optimizer='sgd'",
        "training.weight_decay=0.0",
        "training.batch_size=3",
        "training.gradient_checkpointing=false",
        "dataset.max_length=77",
        "data_sampling.pack_sequences=true",
        "deepspeed.config='ds_configs/zero3_offload.json'",
    ).setup
    assert (setup.adam, setup.decays, setup.batch, setup.length, setup.checkpointing) == (False, False, 3, 77, False)
    assert setup.zero.offload_parameters
    assert setup.packed
    assert setup.mask == 2 * 3 * 77 * 77
    assert not read("baseline").setup.packed
    assert read("baseline", "models.policy.dtype='float32'").setup.b == 4
    assert read("baseline", "runtime.mixed_precision=false").setup.b == 4
    assert read("baseline", "models.policy.dtype='float16'").setup.b == 2


def test_a_folder_wins_over_names_and_a_typed_size_over_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "llama-7b")
    found = read("baseline", "models.policy.path='llama-7b'")
    assert (found.setup.policy.num_hidden_layers, found.setup.policy.n_future_tokens) == (5, 2)
    assert "assumed" not in found.notes[0]
    typed = read("baseline", "models.policy.path='llama-7b'", sizes=Sizes(policy="70b"))
    assert typed.setup.policy == NAMED["70b"]
    assert "--size" in typed.notes[0]
    both = read("rho1", sizes=Sizes(policy="1b", reference="160m"))
    assert both.setup.reference is not None
    assert both.setup.reference.shape == plain("160m")


def test_a_reference_has_one_head(tmp_path: Path) -> None:
    write_model(tmp_path / "ref", n_future_tokens=4)
    setup = read("rho1", "models.reference.path='ref'").setup
    assert setup.reference is not None
    assert setup.reference.shape.n_future_tokens == 1


def test_a_reward_model_is_planned_where_it_scores(tmp_path: Path) -> None:
    write_model(tmp_path / "rm-7b")
    asks = ("models.reward.source='model'", "models.reward.path='rm-7b'", "models.reward.dtype='float32'")
    reward = read("verifiable", *asks).setup.reward
    assert reward is not None
    assert (reward.shape.num_hidden_layers, reward.b) == (5, 4)
    assert reward.zero.prefetch_bucket == 250_000_000  # ds_configs/zero3_reference.json
    assert read("verifiable", *asks, sizes=Sizes(reward="13b")).setup.reward.shape == plain("13b")  # type: ignore[union-attr]
    assert read("verifiable").setup.reward is None


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    nameless = ("models.policy.name='x'", "models.policy.path='y'", "experiment.name='z'", "experiment.tags={}")
    with pytest.raises(UserError, match=r"y/config.json is not there.*--size"):
        read("baseline", *nameless)
    write_model(tmp_path / "other", model_type="gpt2")
    with pytest.raises(UserError, match="gpt2"):
        read("baseline", "models.policy.path='other'")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read("baseline", "models.policy.path='other'")


def test_what_a_stage_trains_is_what_its_class_says() -> None:
    for name in stage_names():
        assert trains_policy(name) == make_stage(name, None).trains_policy
    assert trains_policy("one_of_your_own")


def test_kernels_are_chosen_as_the_kernels_choose() -> None:
    assert kernels_on("cuda", {}) == "triton"
    assert kernels_on("cpu", {}) == "torch"
    assert kernels_on("cuda", {"WMTP_KERNELS": "torch"}) == "torch"
    assert kernels_on("cpu", {"WMTP_KERNELS": "triton"}) == "triton"


# --- the command ---


def test_a_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "stage_configs/rho1.toml")
    assert (code, err) == (0, "")
    assert "4 GPUs, 80.0 GiB each" in out
    assert "assumed: 4 GPUs" in out
    assert "size 2.7b" in out
    rows = {line[:19].strip(): line.split()[-4:] for line in out.splitlines()}
    parts = ("parameters", "gathered", "gradients", "masters", "moments", "loss workspace", "reference")
    assert set(parts) <= set(rows)
    said = json.loads(call(capsys, "stage_configs/rho1.toml", "--json")[1])
    for name, column in (("loss", 1), ("backward", 2)):
        found = [float(cells[column]) for key, cells in rows.items() if key in said["moments"][name]]
        assert sum(found) == pytest.approx(sum(said["moments"][name].values()) / GIB, abs=0.1)
        all_of_it = sum(said["moments"][name].values()) / GIB + float(rows["beside tensors"][column])
        assert float(rows["total"][column]) == pytest.approx(all_of_it, abs=0.1)
    assert "fits: " in out
    assert "no offload (as configured)" in out
    assert "optimizer and parameter offload" in out


def test_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "stage_configs/verifiable.toml", "--json", "--num_gpus", "8", "--gpu-memory", "40")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["device"], found["ranks"], found["capacity"]) == ("cuda", 8, 40 * GIB)
    assert found["assumed"] == []
    assert found["fits"]
    assert found["advice"] == []
    configured = found["configured"]
    assert configured["tensors"] == max(sum(parts.values()) for parts in found["moments"].values())
    assert configured["total"] == configured["tensors"] + configured["overhead"]
    assert configured["spare"] == 40 * GIB - configured["total"]
    assert found["variants"][0]["label"] == "no offload"
    assert found["variants"][0]["total"] == configured["total"]
    assert found["setup"]["policy"]["hidden_size"] == 4096


def test_what_does_not_fit_is_stated_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("stage_configs/baseline.toml", "--size", "70b", "--num_gpus", "8")
    code, out, _ = call(capsys, *typed)
    assert code == 0
    assert "does not fit: " in out
    assert "--num_gpus 32" in out
    assert call(capsys, *typed, "--check")[0] == 1
    assert call(capsys, "stage_configs/baseline.toml", "--check")[0] == 0
    assert not json.loads(call(capsys, *typed, "--json", "--check")[1])["fits"]


def test_the_machine_is_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [48 * GIB, 24 * GIB])
    code, out, _ = call(capsys, "stage_configs/critic.toml")
    assert code == 0
    assert "2 GPUs, 24.0 GiB each" in out
    assert "assumed: " not in out
    assert "1 GPU, 24.0 GiB each" in call(capsys, "stage_configs/critic.toml", "--num_gpus", "1")[1]


def test_a_cpu_shares_its_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: 32 * GIB)
    code, out, _ = call(capsys, "stage_configs/local/rho1.toml", "--num_gpus", "2", "--size", "micro")
    assert code == 0
    assert "2 CPU ranks, 16.0 GiB each" in out
    assert "torch kernels" in out
    assert "as configured" in out
    assert "offload" not in out
    found = json.loads(call(capsys, "stage_configs/local/rho1.toml", "--json")[1])
    assert (found["device"], found["ranks"]) == ("cpu", 1)


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus() == [81559 * 2**20, 40960 * 2**20]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.gpus() == [81559 * 2**20]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus() == []
    program.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine.gpus() == []
    assert machine.memory() > 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["stage_configs/none.toml"], "none.toml"),
        (["stage_configs/rho1.toml", "--size", "9b"], "9b"),
        (["stage_configs/rho1.toml", "--gpu-memory", "0"], "gpu-memory"),
        (["stage_configs/rho1.toml", "--gpu-memory", "nan"], "gpu-memory"),
        (["stage_configs/rho1.toml", "--override", "training.batch_size=none"], "training.batch_size"),
        (["stage_configs/rho1.toml", "--override", "deepspeed.config='missing.json'"], "missing.json"),
    ],
)
def test_wrong_usage_is_said(capsys: pytest.CaptureFixture[str], typed: list[str], said: str) -> None:
    code, out, err = call(capsys, *typed)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_no_heavy_library_is_loaded() -> None:
    program = f"""
import sys
from wmtp_ds.cli.main import main
try:
    main(["plan", "stage_configs/rho1.toml"])
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("loaded:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
