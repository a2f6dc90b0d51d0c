"""On one, two and four ranks: the same losses as plain torch, and the same however the global batch is cut."""

import json
from pathlib import Path

import pytest
import torch
from plain_torch import stage_loss, tokenize
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from wmtp_ds.config import load_config
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.run_data import open_data
from wmtp_ds.scores.manifest import Manifest, Settings, read_manifest
from wmtp_ds.scores.scoring import Scoring
from wmtp_ds.scores.worker import Work

pytestmark = pytest.mark.launch

STEPS = 3
# ranks, sequences of a micro-batch, accumulation steps: one global batch of 4.
LAYOUTS = [(1, 1, 4), (1, 2, 2), (2, 2, 1), (4, 1, 1)]
SCORED = [(1, 1, 4), (2, 2, 1)]  # those in which scores are tried
SGD = ["training.optimizer=sgd", "training.learning_rate=0.05", "training.scheduler=linear"]
ADAMW = ["training.optimizer=adamw", "training.learning_rate=1e-3", "training.weight_decay=0.1"]
SCORES = ['models.reference.scores="parity-scores"', 'models.reference.path="nowhere"']
# A head that starts at zero: a fresh critic's, without a seed to agree on.
LINEAR = ['value_head.type="linear"']
# Name -> stage and overrides; these do not depend on how the batch is cut.
INVARIANT = {
    "baseline": ("baseline", SGD),
    "critic": ("critic", [*SGD, *LINEAR, "training.gamma=0.97"]),
    "verifiable": ("verifiable", SGD),
    "verifiable-normalised": (
        "verifiable",
        [*SGD, 'training.td_normalize="zscore"', 'training.weight_norm="mean1"', "training.td_lambda=0.9"],
    ),
    "rho1-sequence": ("rho1", [*SGD, 'training.selection_scope="sequence"']),
}
# Compared with plain torch as well, in one layout: AdamW with clipping, selection within micro-batches, and the
# reference's losses computed beforehand, with no reference to be found.
MORE = {
    "rho1-scores": ("rho1", [*SGD, 'training.selection_scope="sequence"', *SCORES]),
    "baseline-adamw": ("baseline", [*ADAMW, "training.max_grad_norm=0.5", "training.gradient_checkpointing=true"]),
    "critic-adamw": ("critic", [*ADAMW, *LINEAR]),
    "verifiable-adamw": ("verifiable", [*ADAMW, "training.value_lr=5e-3"]),
    "rho1-batch": ("rho1", [*ADAMW, 'training.selection_scope="batch"', "training.k_percent=0.55"]),
}
# Trained with the Triton kernels as well, for the two steps that their interpreter has time for: the second loss shows
# what the gradients of the first have done. The torch path runs as short a time beside it: rows and learning rates
# depend on the number of steps.
# Name -> layout: two sequences, and four where they compete within a micro-batch.
IN_TRITON = {
    "verifiable": (2, 1, 1),
    "verifiable-normalised": (2, 1, 1),
    "rho1-sequence": (2, 1, 1),
    "rho1-batch": (2, 2, 1),
}
TRITON_STEPS = 2


def job(root: Path, name: str, stage: str, overrides: list[str], layout: tuple[int, int, int]) -> dict:
    """A run of a few steps that logs every step and exports its final weights."""
    ranks, batch, accumulation = layout
    return {
        "stage": stage,
        "config": f"stage_configs/local/{stage}.toml",
        "override": [
            f"checkpoint.save_dir={json.dumps(str(root / 'runs' / f'{name}-{ranks}x{batch}x{accumulation}'))}",
            f"training.batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            f"training.max_steps={STEPS}",
            "data_sampling.n_samples=32",
            "training.n_epochs=1.0",
            "training.log_interval=1",
            "training.warmup_ratio=0.0",
            "training.max_grad_norm=0.0",
            "checkpoint.save_best=false",
            "checkpoint.save_checkpoint_every=0",
            'mlflow.tracking_uri=""',
            f"experiment.critic_checkpoint={json.dumps(str(root / 'critic'))}",
        ][: None if stage == "verifiable" else -1]
        + overrides,
    }


def start(root: Path, jobs: list[dict], ranks: int, **variables: str) -> None:
    """Run jobs one after another in the same ranks."""
    file = root / f"jobs-{ranks}-{len(jobs)}-{len(list(root.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    done = run_ranks(Path(__file__).with_name("driver.py"), [str(file)], ranks, root, **variables)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("all jobs done") == ranks


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """Every job in every layout; a critic with random weights is made first, so that TD errors are not all alike."""
    from wmtp_ds.handoff import save_value_head
    from wmtp_ds.models.fingerprint import read_trunk_fingerprint

    score(workspace, "parity-scores", max_length=256)
    (workspace / "critic").mkdir()
    save_value_head(
        workspace / "critic/value_head.safetensors",
        random_head().state_dict(),
        hidden_size=64,
        type="mlp",
        activation="sigmoid",
        trunk_fingerprint=str(read_trunk_fingerprint(workspace / "storage/models/micro-policy")),
    )
    for layout in LAYOUTS:
        jobs = INVARIANT | MORE if layout == (2, 2, 1) else INVARIANT
        if layout in SCORED:
            jobs = jobs | {"rho1-scores": MORE["rho1-scores"]}
        start(workspace, [job(workspace, name, *spec, layout) for name, spec in jobs.items()], layout[0])
    for kernels, variables in {"torch": {}, "triton": {"TRITON_INTERPRET": "1"}}.items():
        jobs = [
            job(workspace, f"{kernels}-{name}", *(INVARIANT | MORE)[name], layout) for name, layout in IN_TRITON.items()
        ]
        for short in jobs:
            short["override"].append(f"training.max_steps={TRITON_STEPS}")
        start(workspace, jobs, 2, WMTP_KERNELS=kernels, **variables)
    return workspace


def score(root: Path, name: str, **changes: object) -> Manifest:
    """What `wmtp-ds data score` makes of a workspace's training data, a row at a time."""
    models, data = root / "storage/models", root / "storage/data/sample/train.jsonl"
    settings = {"template": "alpaca", "compute_dtype": "float32", "dtype": "float32", "correct_only": False} | changes
    reference = models / "micro-reference"
    what = Settings(shard_tokens=300, **settings)
    work = Work((data,), root / name, reference, reference, what, batch_size=1, device="cpu", cache_dir=None)
    return Scoring(work).run()[0]


def random_head() -> ValueHead:
    """A value head whose values differ from token to token."""
    torch.manual_seed(7)
    head = ValueHead(64, "mlp")
    torch.nn.init.normal_(head.output.weight, std=0.5)
    return head


def losses(root: Path, name: str, layout: tuple[int, int, int], steps: int = STEPS) -> list[float]:
    file = root / "runs" / f"{name}-{'x'.join(map(str, layout))}" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = {r["step"]: r["metrics"]["train/loss"] for r in records if "train/loss" in r["metrics"]}
    return [found[step] for step in range(1, steps + 1)]


def weights(root: Path, name: str, layout: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    folder = root / "runs" / f"{name}-{'x'.join(map(str, layout))}" / "checkpoint_final"
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", INVARIANT)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(trained: Path, name: str) -> None:
    first = LAYOUTS[0]
    expected, expected_weights = losses(trained, name, first), weights(trained, name, first)
    assert len(set(expected)) == STEPS  # weights change between steps
    for layout in LAYOUTS[1:]:
        assert losses(trained, name, layout) == pytest.approx(expected, abs=2e-6), layout
        found = weights(trained, name, layout)
        assert found.keys() == expected_weights.keys()
        for tensor, value in expected_weights.items():
            torch.testing.assert_close(found[tensor], value, rtol=0, atol=3e-6, msg=f"{layout} {tensor}")


def test_scores_train_as_the_live_reference_does(trained: Path) -> None:
    """To the bit where a micro-batch is one row, as it was when it was scored; to rounding where rows are padded."""
    for layout in SCORED:
        live, cached = (losses(trained, f"rho1-{name}", layout) for name in ("sequence", "scores"))
        expected, found = (weights(trained, f"rho1-{name}", layout) for name in ("sequence", "scores"))
        if layout[1] == 1:
            assert cached == live
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        else:
            assert cached == pytest.approx(live, abs=2e-6)
        tracked = json.loads(
            (trained / "runs" / f"rho1-scores-{'x'.join(map(str, layout))}" / "tracking.json").read_text()
        )
        assert tracked["tags"]["reference_scores"] == "parity-scores (float32, computed in float32)"
        fingerprint = read_manifest(trained / "parity-scores").reference.fingerprint
        assert tracked["tags"]["reference_fingerprint"] == fingerprint


@pytest.mark.parametrize("name", IN_TRITON)
def test_the_triton_kernels_train_as_the_torch_path_does(trained: Path, name: str) -> None:
    layout = IN_TRITON[name]
    found, expected = (losses(trained, f"{kernels}-{name}", layout, TRITON_STEPS) for kernels in ("triton", "torch"))
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[0] != found[1]
    for kernels in ("torch", "triton"):
        folder = trained / "runs" / f"{kernels}-{name}-{'x'.join(map(str, layout))}"
        tracked = json.loads((folder / "tracking.json").read_text())
        assert tracked["tags"]["kernels"] == kernels


@pytest.mark.parametrize("name", [*INVARIANT, *MORE])
def test_zero3_trains_like_plain_torch(trained: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    layout = (2, 2, 1)
    stage, overrides = (INVARIANT | MORE)[name]
    spec = job(trained, name, stage, overrides, layout)
    resolved = load_config(Path(spec["config"]), spec["override"])
    expected, policy, head = train_plainly(stage, resolved)
    assert losses(trained, name, layout) == pytest.approx(expected, abs=2e-5)
    found = weights(trained, name, layout)
    modules = [m for m in (None if stage == "critic" else policy, head) if m is not None]
    parameters = {n: p for module in modules for n, p in module.named_parameters()}
    assert found.keys() == parameters.keys()
    # Adam divides by the root of its second moment: where a gradient is nearly 0, rounding decides its direction.
    tolerance = 3e-6 if resolved.config.training.optimizer == "sgd" else 2e-3
    for tensor, value in found.items():
        torch.testing.assert_close(value, parameters[tensor].data, rtol=0, atol=tolerance, msg=tensor)


def train_plainly(stage: str, resolved) -> tuple[list[float], torch.nn.Module, ValueHead | None]:
    """The same run in one process, without any of the toolkit's training code."""
    config, cfg = resolved.config, resolved.config.training
    data = open_data(resolved, world_size=2)
    rows = [json.loads(line) for line in Path(config.dataset.train).read_text().splitlines()]
    policy = load_policy(Path(config.models.policy.path))
    tokenizer = load_tokenizer(Path(config.models.policy.path))
    reference = LlamaForCausalLM.from_pretrained("storage/models/micro-reference").eval()
    head = random_head() if stage == "verifiable" else ValueHead(64) if stage == "critic" else None
    groups: list[dict] = []
    if stage != "critic":
        groups += split_by_decay(policy, cfg.learning_rate, cfg.weight_decay)
    if head is not None:
        groups += split_by_decay(head, cfg.value_lr, cfg.weight_decay)
    optimizer = torch.optim.SGD(groups) if cfg.optimizer == "sgd" else torch.optim.AdamW(groups, betas=tuple(cfg.betas))
    rates = [group["lr"] for group in groups]
    found = []
    for step in range(STEPS):
        drawn = [rows[i] for i in data.plan.rows(step)]
        sequences = [(*tokenize(row, tokenizer), float(row["is_correct"])) for row in drawn]
        for group, rate in zip(groups, rates, strict=True):
            progress = step / STEPS
            factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())}
            group["lr"] = rate * factor[cfg.scheduler]
        optimizer.param_groups[:] = [
            old | {"lr": g["lr"]} for old, g in zip(optimizer.param_groups, groups, strict=True)
        ]
        optimizer.zero_grad()
        loss = stage_loss(stage, policy, head, reference, sequences, [[0, 1], [2, 3]], cfg)
        loss.backward()
        if cfg.max_grad_norm:
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], cfg.max_grad_norm)
        optimizer.step()
        found.append(loss.item())
    return found, policy, head


def split_by_decay(module: torch.nn.Module, rate: float, decay: float) -> list[dict]:
    """Matrices decay, vectors do not."""
    return [
        {"params": [p for p in module.parameters() if p.dim() > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in module.parameters() if p.dim() <= 1], "lr": rate, "weight_decay": 0.0},
    ]
