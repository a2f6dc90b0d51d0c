"""``wmtp-ds bench decode``: both ways of decoding, counted and timed."""

import json
from pathlib import Path

import pytest
import torch
from in_process import command

from wmtp_ds.bench import decode
from wmtp_ds.decoding import Completion
from wmtp_ds.decoding.generate import Limits


def test_heads_that_know_the_answer_save_passes(solver: Path, problems_file: Path):
    arguments = ["bench", "decode", str(solver), "--problems", str(problems_file), "--rounds", "3", "--device", "cpu"]
    done = command(*arguments, "--batch-size", "1,3", "--json", seconds=60)
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert (figures["heads"], figures["prompts"], figures["dtype"]) == (4, 3, "float32")
    one, three = figures["batch_sizes"]
    assert (one["batch_size"], three["batch_size"]) == (1, 3)
    for found in (one, three):
        assert found["different"] == 0
        # The first token comes with the prompt, and each pass after it brings one token, or up to four.
        assert found["passes"]["plain"] == found["tokens"] - 3
        assert found["tokens_per_pass"]["plain"] == 1.0
        assert found["tokens_per_pass"]["self-speculative"] > 2
        assert found["passes"]["self-speculative"] == pytest.approx(
            (found["tokens"] - 3) / found["tokens_per_pass"]["self-speculative"]
        )
        gain = found["speed_up"]
        assert 0 < gain["low"] <= gain["median"] <= gain["high"]
    done = command(*arguments, "--batch-size", "3", seconds=60)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].split()[-2:] == [f"{three['tokens_per_pass']['self-speculative']:.3f}", "0"]
    assert done.err.count("batch size 3: round") == 3


def test_completions_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch):
    """And a speed-up is of the seconds of one round each."""

    class Policy:
        class lm_head:  # noqa: N801
            weight = torch.zeros(1)

    def generate(policy, prompts, limits, speculative, batch_size):
        return [Completion([1, 2], True, 1 if speculative else 2), Completion([4 if speculative else 3], True, 1)]

    monkeypatch.setattr(decode, "generate", generate)
    clock = iter(range(100))
    monkeypatch.setattr("wmtp_kernel_benchmarks.measure.time.perf_counter", lambda: next(clock) ** 2)
    [found] = decode.measure_decoding(Policy(), [[0], [0]], Limits(4, frozenset()), batch_sizes=[2], rounds=2, seed=0)
    assert found["different"] == 1
    assert found["tokens"] == 5
    assert found["passes"] == {"plain": 3, "self-speculative": 2}
    assert found["tokens_per_pass"] == {"plain": 1.0, "self-speculative": 1.5}
    # Readings last 1, 5, 9 and 13 in the order in which they were taken; each round holds one of each.
    seconds = found["seconds"]
    assert sorted(reading[key] for reading in seconds.values() for key in ("low", "high")) == [1, 5, 9, 13]
    assert {round(found["speed_up"][key], 6) for key in ("low", "high")} <= {
        round(a / b, 6) for a, b in ((1, 5), (5, 1), (9, 13), (13, 9))
    }


def test_a_model_without_extra_heads_is_refused(tmp_path: Path, problems_file: Path):
    from wmtp_ds.models.micro import make_micro_models

    make_micro_models(data=problems_file, policy=tmp_path / "policy", reference=tmp_path / "one", vocab_size=300)
    done = command("bench", "decode", tmp_path / "one", "--problems", problems_file)
    assert (done.code, done.out) == (2, "")
    assert "drafts with extra heads" in done.err
    done = command("bench", "decode", tmp_path / "policy", "--problems", problems_file, "--batch-size=0")
    assert done.code == 2
    assert "whole numbers of at least 1" in done.err
