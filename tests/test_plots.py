"""Figures and tables of runs, made from what runs leave in their folders."""

import json
import math
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from wmtp_ds.plots import plot_losses, read_series
from wmtp_ds.report import figure_of, print_table, results
from wmtp_ds.run_summary import write_summary


def write_metrics(file: Path, *lines: tuple[int, dict[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"step": s, "time": 0, "metrics": m}) + "\n" for s, m in lines))
    return file


def test_read_series(tmp_path):
    file = write_metrics(
        tmp_path / "metrics.jsonl",
        (1, {"train/loss": 3.0, "optim/lr": 0.1}),
        (4, {"train/loss": 1.0}),
        (4, {"val/loss": 2.0}),
        (2, {"train/loss": 2.5}),  # a resume goes back
        (4, {"train/loss": 0.5}),
    )
    assert read_series(file, "train/loss") == ([1, 2, 4], [3.0, 2.5, 0.5])
    assert read_series(file, "val/loss") == ([4], [2.0])
    assert read_series(file, "value/loss") == ([], [])


def test_read_series_of_a_run_that_diverged_and_was_killed(tmp_path):
    file = write_metrics(tmp_path / "metrics.jsonl", (1, {"train/loss": 3.0}), (2, {"train/loss": "nan"}))
    with file.open("a") as stream:
        stream.write('{"step": 3, "time": 0, "metr')
    steps, values = read_series(file, "train/loss")
    assert steps == [1, 2]
    assert (values[0], math.isnan(values[1])) == (3.0, True)
    plot_losses({"baseline": file}, tmp_path / "loss.png")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_one_panel_a_run(tmp_path, saved_figures, count):
    runs = {
        f"stage {number}": write_metrics(
            tmp_path / f"{number}.jsonl",
            (1, {"train/loss": 5.0 + number}),
            (2, {"train/loss": 4.0 + number, "val/loss": 4.5 + number}),
        )
        for number in range(count)
    }
    plot_losses(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = saved_figures
    assert [axis.get_title() for axis in figure.axes] == list(runs)
    for number, axis in enumerate(figure.axes):
        train, validation = axis.get_lines()
        assert train.get_xydata().tolist() == [[1.0, 5.0 + number], [2.0, 4.0 + number]]
        assert validation.get_xydata().tolist() == [[2.0, 4.5 + number]]
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train", "validation"]
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("optimizer step", "loss (nats)")
    assert plt.get_fignums() == [], "it is closed: pyplot would keep it in memory"


def test_a_critics_loss_is_in_no_nats(tmp_path, saved_figures):
    plot_losses({"critic": write_metrics(tmp_path / "m.jsonl", (1, {"train/loss": 0.25}))}, tmp_path / "loss.png")
    assert saved_figures[0].axes[0].get_ylabel() == "value loss"


def test_a_png_whatever_its_name_is(tmp_path):
    file = write_metrics(tmp_path / "m.jsonl", (1, {"train/loss": 0.25}))
    for name in ("picture", "picture.pdf", "picture.abc"):
        plot_losses({"rho1": file}, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def write_run(folder: Path, stage: str, loss: float, **more: object) -> Path:
    write_metrics(folder / "metrics.jsonl", (1, {"train/loss": loss}))
    figures = {"first_loss": 5.0, "last_loss": loss, "val/loss": 2.25, "seconds": 12.34, "tokens_per_s": 12345.6}
    write_summary(folder, **{"completed": True, "stage": stage, "steps": 40, "mlflow_run_id": None} | figures | more)
    return folder


def test_figure_of_runs(tmp_path, saved_figures):
    folders = [write_run(tmp_path / name, name, 1.0) for name in ("baseline", "critic")]
    figure_of(folders, tmp_path / "new" / "demo.png")
    assert (tmp_path / "new" / "demo.png").exists()
    assert [axis.get_title() for axis in saved_figures[0].axes] == ["baseline", "critic"]


def test_two_runs_of_one_stage_are_both_drawn(tmp_path, saved_figures):
    folders = [
        write_run(tmp_path / "beta-0.3", "verifiable", 1.0),
        write_run(tmp_path / "rho", "rho1", 3.0),
        write_run(tmp_path / "beta-0.9", "verifiable", 2.0),
    ]
    figure_of(folders, tmp_path / "demo.png")
    titles = [axis.get_title() for axis in saved_figures[0].axes]
    assert titles == ["verifiable: beta-0.3", "rho1", "verifiable: beta-0.9"]
    assert [axis.get_lines()[0].get_ydata().tolist() for axis in saved_figures[0].axes] == [[1.0], [3.0], [2.0]]


def test_table(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", "critic", 0.125, **{"val/auc": 0.8762}),
        write_run(tmp_path / "b", "rho1", math.nan, mlflow_run_id="0123456789abcdef0123456789abcdef"),
    ]
    print_table(folders)
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert cells == [
        ["critic", "40", "5.0000", "0.1250", "2.2500", "0.876", "12.3", "12,346", "not tracked"],
        ["rho1", "40", "5.0000", "nan", "2.2500", "", "12.3", "12,346", "0123456789abcdef0123456789abcdef"],
    ]


def test_results(tmp_path):
    folder = write_run(tmp_path / "a", "critic", 0.125)
    (result,) = results([folder])
    assert result["folder"] == str(folder)
    assert (result["stage"], result["last_loss"]) == ("critic", 0.125)
