"""What the benchmark prints and writes: one run, and figures that follow from its rounds."""

import csv
import json
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from wmtp_kernel_benchmarks import measure, report, run
from wmtp_kernel_benchmarks.inputs import Sizes
from wmtp_kernel_benchmarks.options import Settings, parse

CPU = torch.device("cpu")
TINY = Sizes(heads=3, sequences=2, length=12, dim=32, vocabulary=50)
BRIEF = ("--quick", "--no-sweep", "--device=cpu", "--rounds=1")


def results_of(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Size, arm and result of everything that was timed."""
    for size in document["sizes"]:
        for name, result in size["results"].items():
            assert result["status"] == "measured"
            yield size, name, result


def test_what_is_written_is_what_is_printed(ran):
    assert ran.code == 0
    assert json.loads((ran.folder / "results.json").read_text()) == ran.document
    assert (ran.folder / "table.txt").read_text() in ran.err
    assert {path.name for path in ran.folder.iterdir()} == {"results.json", "results.csv", "table.txt", "plot.png"}
    for path in ran.folder.iterdir():
        assert str(path) in ran.err


def test_without_json_the_table_goes_to_stdout(tmp_path, call):
    code, out, err = call(*BRIEF, "--arms=weighted", f"--output={tmp_path}")
    assert code == 0
    assert out == (tmp_path / "table.txt").read_text() + "\n"
    assert "round 1 of 1" in err
    assert "round" not in out.replace("rounds, ratios", "").replace("within a round", "")


def test_every_arm_ran_once_in_each_round_at_each_size(ran):
    sizes = ran.document["sizes"]
    assert [(size["positions"], size["rows"], size["main"]) for size in sizes] == [
        (8, 32, False), (16, 64, False), (32, 128, False), (64, 256, True),
    ]  # fmt: skip
    for size in sizes:
        assert set(size["results"]) == {"floor", "torch", *ran.measured}
        assert 2.0 < size["mean_cross_entropy"] < 3.0
        for result in size["results"].values():
            assert len(result["rounds"]) == (3 if size["main"] else 2)
            assert all(reading["wall"] > 0 and reading["cpu"] >= 0 for reading in result["rounds"])


def test_times_and_ratios_follow_from_the_rounds(ran, middle):
    for size, _, result in results_of(ran.document):
        for clock in ("wall", "cpu"):
            times = [reading[clock] for reading in result["rounds"]]
            assert list(result[clock].values()) == pytest.approx(middle(times))
        for other in ("floor", "torch", "td"):
            pairs = zip(result["rounds"], size["results"][other]["rounds"], strict=True)
            expected = middle([one["wall"] / two["wall"] for one, two in pairs])
            assert list(result["ratios"][other].values()) == pytest.approx(expected)
            assert list(result["ratios"][other]) == ["median", "low", "high"]


def test_the_process_clock_makes_ratios_of_cpu_time():
    readings = {"a": [measure.Reading(1.0, 6.0), measure.Reading(2.0, 8.0)], "b": [measure.Reading(4.0, 2.0)] * 2}
    assert measure.ratios(readings["a"], readings["b"], "wall") == [0.25, 0.5]
    assert measure.ratios(readings["a"], readings["b"], "cpu") == [3.0, 4.0]


def test_the_csv_holds_the_same_figures(ran):
    rows = list(csv.DictReader((ran.folder / "results.csv").open()))
    assert len(rows) == 4 * (2 + len(ran.measured) + len(ran.absent))
    by_place = {(int(row["positions"]), row["arm"]): row for row in rows}
    errors = {arm["name"]: arm["errors"] for arm in ran.document["arms"]}
    for size, name, result in results_of(ran.document):
        row = by_place.pop((size["positions"], name))
        assert (int(row["rows"]), row["status"], row["reason"]) == (size["rows"], "measured", "")
        assert int(row["extra_bytes"]) == result["extra_bytes"]
        for key in ("median", "low", "high"):
            assert float(row[f"wall_s_{key}"]) == result["wall"][key]
            assert float(row[f"cpu_s_{key}"]) == result["cpu"][key]
            assert float(row[f"ratio_floor_{key}"]) == result["ratios"]["floor"][key]
            assert float(row[f"ratio_torch_{key}"]) == result["ratios"]["torch"][key]
        for error, value in errors[name].items():
            assert row[f"error_{error}"] == ("" if value is None else str(value))
    assert {name for _, name in by_place} == set(ran.absent)
    for row in by_place.values():
        assert row["status"] == "skipped"
        assert row["reason"]
        assert row["wall_s_median"] == row["extra_bytes"] == row["ratio_torch_median"] == ""


def test_the_table_shows_the_figures_of_the_main_size(ran):
    lines = (ran.folder / "table.txt").read_text().splitlines()
    size = report.main_size(ran.document)
    assert size["positions"] == 64
    for name, result in size["results"].items():
        line = next(line for line in lines if line.split()[:1] == [name])
        wall = result["wall"]["median"] * 1000
        shown = re.match(rf"{name} +([\d.]+) \[", line)
        assert shown
        assert float(shown[1]) == pytest.approx(wall, rel=0.01)
        ratios = [result["ratios"][other] for other in ("floor", "torch")]
        cells = [f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" for ratio in ratios]
        assert " ".join(cells) in " ".join(line.split())
        assert f" {result['extra_bytes'] / 2**20:.1f} " in line
    assert lines[0].startswith("N = 256: 4 heads x 64 positions (2 sequences of 32), D 64, V 512, float32")
    start = lines.index("Median ms against N")
    assert lines[start + 1].split() == ["arm", "N", "=", "32", "N", "=", "64", "N", "=", "128", "N", "=", "256"]
    swept = next(line for line in lines[start:] if line.startswith("td ")).split()[1:]
    expected = [1000 * each["results"]["td"]["wall"]["median"] for each in ran.document["sizes"]]
    assert [float(cell) for cell in swept] == pytest.approx(expected, rel=0.01)


def test_the_plot_is_a_picture_with_curves(ran):
    from matplotlib import image

    picture = image.imread(ran.folder / "plot.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 2 * 300
    half = picture.shape[1] // 2
    for panel in (picture[:, :half, :3], picture[:, half:, :3]):
        for red, green, blue in ((44, 160, 44), (214, 39, 40)):  # the third and fourth arm's curves
            found = abs(panel * 255 - [red, green, blue]).max(-1) < 2
            assert found.sum() > 50


def test_what_was_measured_on_is_recorded(ran):
    around, asked = ran.document["environment"], ran.document["run"]
    assert around["versions"]["torch"] == torch.__version__
    assert around["versions"].keys() >= {"triton", "liger-kernel", "cut-cross-entropy", "deepspeed"}
    assert (around["threads"], around["device"], around["backend"]) == (1, "CPU", "torch")
    assert {
        "heads": 4,
        "dim": 64,
        "vocabulary": 512,
        "dtype": "float32",
        "seed": 0,
        "rounds": 3,
    }.items() <= asked.items()
    command = shlex.split(ran.document["command"])
    assert command[:3] == ["wmtp-ds", "bench", "kernels"]
    assert parse(command[3:]) == Settings(
        arms=(*ran.measured, *ran.absent), device="cpu", quick=True, json=True, output=ran.folder
    )
    assert torch.get_num_threads() == 1


def test_the_threads_asked_for_are_used_and_given_back(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run, "measure", lambda plan, command, device: seen.append(torch.get_num_threads()) or {})
    monkeypatch.setattr(run.report, "write", lambda *_: None)
    monkeypatch.setattr(run.report, "tell", lambda *_, **__: None)
    with pytest.raises(KeyError):
        run.run(Settings(threads=2, device="cpu", output=tmp_path), "")
    assert (seen, torch.get_num_threads()) == ([2], 1)


def test_a_skipped_arm_is_named_with_the_reason_and_no_figure(ran):
    told = {arm["name"]: arm for arm in ran.document["arms"]}
    lines = (ran.folder / "table.txt").read_text().splitlines()
    for name, words in {"liger-none": "Liger", "cut-exact": "cut cross-entropy"}.items():
        assert told[name]["status"] == "skipped"
        assert re.search(rf"{words} (is not installed; install it with: pip install|needs a GPU)", told[name]["reason"])
        assert any(line.split()[:2] == [name, "skipped"] and told[name]["reason"] in line for line in lines)
        first = next(line for line in lines if line.startswith(f"{name} "))
        assert first.split()[1:3] == ["not", "measured"]
        assert not re.search(r"\d", first.replace("float32", ""))
    assert "skipped: liger-none, cut-exact" in ran.err


def test_without_matplotlib_there_is_no_plot_and_a_note(tmp_path, monkeypatch, capsys, ran):
    monkeypatch.setitem(sys.modules, "wmtp_kernel_benchmarks.plot", None)
    report.write(ran.document, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.csv", "table.txt"}
    assert capsys.readouterr().err == "no plot: matplotlib is not installed\n"


def test_figures_that_json_has_no_word_for():
    document = {"a": [float("nan"), {"b": float("inf")}], "c": 1.5, "d": None}
    assert json.loads(report.to_json(document)) == {"a": ["nan", {"b": "inf"}], "c": 1.5, "d": None}
