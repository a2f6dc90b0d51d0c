"""Folders like those that training and evaluating leave, written with the project's own writers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wmtp_ds.cli.main import main
from wmtp_ds.config import load_config
from wmtp_ds.models.config_file import model_key
from wmtp_ds.run_summary import write_summary
from wmtp_ds.tracking import start_tracking

Metrics = Mapping[int, Mapping[str, float]]
TAGS = {"dataset_fingerprint": "aaaa", "validation_fingerprint": "bbbb", "world_size": "2", "stage": "baseline"}
CRITIC = ['experiment.critic_checkpoint="none"']


@pytest.fixture
def here(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of the test's own, with the local configs."""
    for name in ("stage_configs", "ds_configs", "storage"):
        (tmp_path / name).symlink_to(checkout / name)
    monkeypatch.chdir(tmp_path)
    for name in ("WMTP_MLFLOW__TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _curve(last: float, steps: int = 6) -> dict[int, dict[str, float]]:
    """Losses that fall to ``last``, evaluated at every second step."""
    metrics: dict[int, dict[str, float]] = {}
    for step in range(1, steps + 1):
        loss = last + 1.0 / step - 1.0 / steps
        metrics[step] = {"train/loss": loss, "perf/tokens_seen": 100.0 * step, "perf/seconds": 0.5 * step}
        if step % 2 == 0:
            metrics[step]["val/loss"] = loss / 2
    return metrics


@pytest.fixture
def curve() -> Callable[..., dict[int, dict[str, float]]]:
    return _curve


@pytest.fixture
def make_run(here: Path) -> Callable[..., Path]:
    def make(
        name: str,
        *overrides: str,
        stage: str = "baseline",
        metrics: Metrics | None = None,
        tags: Mapping[str, str] | None = None,
        uri: str = "",
        export: bool = True,
    ) -> Path:
        folder = here / "checkpoints" / name
        more = CRITIC if stage == "verifiable" else []
        told = [f'experiment.name="{name}"', f'mlflow.tracking_uri="{uri}"', *more, *overrides]
        resolved = load_config(here / f"stage_configs/local/{stage}.toml", told, environ={}, checks=False)
        tracker = start_tracking(
            resolved.config.mlflow,
            run_name=name,
            run_dir=folder,
            tags=TAGS | {"stage": stage} | dict(tags or {}),
            params=resolved.flat(),
        )
        (folder / "config.toml").write_text(resolved.toml())
        for step, values in (_curve(2.0) if metrics is None else metrics).items():
            tracker.log(step, values)
        assert tracker.finish()
        steps = max(_curve(2.0) if metrics is None else metrics)
        write_summary(folder, completed=True, stage=stage, steps=steps, world_size=2, mlflow_run_id=tracker.run_id)
        if export:
            best = folder / "checkpoint_best"
            best.mkdir()
            (best / "config.toml").write_text(resolved.toml())
            (best / "metrics.json").write_text(json.dumps({"step": 4, "val/loss": 1.0, "stage": stage}))
            (best / "config.json").write_text(json.dumps({"name": name}))
        return folder

    return make


@pytest.fixture
def make_evaluation() -> Callable[..., Path]:
    def make(
        folder: Path,
        model: Path,
        counts: Mapping[str, tuple[int, int]],
        *,
        ks: Sequence[int] = (1,),
        problems: str = "mbpp",
        key: str = "p",
        **options: Any,
    ) -> Path:
        folder.mkdir(parents=True)
        lines = [
            {"problem_id": name, "n": n, "correct": correct, "samples": []} for name, (n, correct) in counts.items()
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures = (
            {"problems": len(counts)} | {f"pass@{k}": 0.0 for k in ks} | {f"pass@{k}_interval": [0, 0] for k in ks}
        )
        made_from = {"command": "evaluate", "model": model_key(model), "problems": key, "options": {"t": 0.8} | options}
        summary = {"model": str(model), "problems": problems, "figures": figures, "made_from": made_from}
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Exit code, what is on stdout (as JSON if it is), and on stderr."""

    def call(*arguments: object) -> tuple[int, Any, str]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments)])
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, json.loads(out) if out.startswith("{") else out, err

    return call
