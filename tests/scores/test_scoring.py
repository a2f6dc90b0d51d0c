"""What `wmtp-ds data score` computes: against plain transformers, and whatever interrupts it."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from score_checkout import MAX_LENGTH, REFERENCE, ROWS, TOO_LONG, TRAIN, work
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from wmtp_ds.cli.main import main
from wmtp_ds.data.rows import parse_row
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.scores import scoring
from wmtp_ds.scores.manifest import JOURNAL, read_manifest
from wmtp_ds.scores.scoring import Scoring
from wmtp_ds.scores.worker import Scorer

REQUIRED = ["--reference", REFERENCE, "--input", TRAIN, "--output", "new"]


def plain_losses(row: int) -> torch.Tensor:
    """One row, in plain transformers: the cross-entropy of each token of its solution and of the end."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REFERENCE)
    model = LlamaForCausalLM.from_pretrained(REFERENCE).eval()
    found = parse_row(TRAIN.read_bytes().splitlines()[row], TRAIN, row)
    prompt, solution = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (get_template("alpaca")(found), found.output)
    )
    room = MAX_LENGTH - len(solution) - 2
    if room < 0:
        return torch.zeros(0)
    prompt = prompt[max(0, len(prompt) - room) :]
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *solution, tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[len(prompt) :]


def stored(folder: Path) -> list[np.ndarray]:
    """The scores of each row, read as docs/scores.md describes the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    [scored] = manifest["inputs"]
    losses = np.concatenate([np.load(folder / shard["name"]) for shard in scored["shards"]])
    ends = np.load(folder / scored["index"]["name"])[:, 0]
    return np.split(losses, ends[:-1])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are computed from now on."""
    names: list[str] = []
    write = Scorer.write
    monkeypatch.setattr(
        Scorer, "write", lambda self, piece, *rest: (names.append(piece.name), write(self, piece, *rest))[1]
    )
    return names


def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes be forked, which takes them no time to import torch."""
    forked = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(scoring, "multiprocessing", forked)


def all_losses(value: float) -> Any:
    """In the place of the model: it says this of every token."""
    return lambda self, data, sequences: [np.full(count, value, np.float32) for _, count in sequences]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["data", "score", *map(str, arguments)])
    return int(end.value.code or 0)


def test_every_token_of_every_solution_has_its_loss(there: Path) -> None:
    rows = stored(Path("scores"))
    assert len(rows) == ROWS
    assert len(rows[TOO_LONG]) == 0
    for number, losses in enumerate(rows):
        assert losses.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(losses.copy()), plain_losses(number), rtol=0, atol=1e-5)
    [scored] = read_manifest(Path("scores")).inputs
    assert (scored.rows, scored.scored, scored.tokens) == (ROWS, ROWS - 1, sum(map(len, rows)))
    assert sum(shard.loss for shard in scored.shards) == pytest.approx(
        float(np.concatenate(rows).sum(dtype=np.float64))
    )
    assert len(scored.shards) > 4
    assert len({len(losses) for losses in rows}) > 5  # batches are padded, and rows of a file are not in their order


def test_float16_is_the_same_rounded(here: Path) -> None:
    Scoring(work("half", dtype="float16")).run()
    for half, full in zip(stored(Path("half")), stored(Path("scores")), strict=True):
        assert half.dtype == np.float16
        assert np.array_equal(half, full.astype(np.float16))


def test_correct_rows_alone(here: Path) -> None:
    Scoring(work("some", correct_only=True)).run()
    labels = [json.loads(line)["is_correct"] for line in TRAIN.read_text().splitlines()]
    for number, (found, full) in enumerate(zip(stored(Path("some")), stored(Path("scores")), strict=True)):
        assert len(found) == (len(full) if labels[number] else 0)
        np.testing.assert_allclose(found, full[: len(found)], rtol=0, atol=1e-5)


def test_several_files_with_one_reference(here: Path) -> None:
    other = TRAIN.with_name("other.jsonl")
    other.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[::-1]))
    manifest, reused = Scoring(work("both", inputs=(other, TRAIN))).run()
    assert not reused
    assert [scored.path for scored in manifest.inputs] == [str(other), str(TRAIN)]
    first, second = (
        np.concatenate([np.load(f"both/{shard.name}") for shard in scored.shards]) for scored in manifest.inputs
    )
    np.testing.assert_allclose(second, np.concatenate(stored(Path("scores"))), rtol=0, atol=1e-5)
    ends = [np.load(f"both/{scored.index.name}")[:, 0] for scored in manifest.inputs]
    backwards = np.split(first, ends[0][:-1])[::-1]
    np.testing.assert_allclose(np.concatenate(backwards), second, rtol=0, atol=1e-5)


def test_processes_share_the_files_and_compute_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork(monkeypatch)
    done: list[int] = []
    manifest, _ = Scoring(work("shared"), processes=2).run(on_done=done.append)
    assert sum(done) == ROWS
    assert manifest.inputs[0].shards == read_manifest(Path("scores")).inputs[0].shards  # sizes, SHA-256 and sums


def test_the_batch_size_changes_rounding_alone(here: Path) -> None:
    Scoring(work("alone", batch_size=1)).run()
    for found, expected in zip(stored(Path("alone")), stored(Path("scores")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- again, and after what has gone wrong ---


def test_what_is_there_is_not_computed_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, before = counted(monkeypatch), read_manifest(Path("scores"))
    done: list[int] = []
    _, reused = Scoring(work()).run(on_done=done.append)
    assert reused
    assert names == []
    assert sum(done) == ROWS
    assert read_manifest(Path("scores")).inputs == before.inputs
    assert not (here / "scores" / JOURNAL).exists()


def test_a_damaged_file_alone_is_computed_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "scores/input0-00002.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (here / "scores/input0-rows.npy").unlink()
    names = counted(monkeypatch)
    Scoring(work()).run()
    assert names == [file.name]
    for found, expected in zip(stored(Path("scores")), map(plain_losses, range(ROWS)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_kill_loses_only_the_file_that_was_being_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        write = Scorer.write

        def until(self: Scorer, piece: Any, *rest: Any) -> Any:
            if piece.name == "input0-00003.npy":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, piece, *rest)

        monkeypatch.setattr(Scorer, "write", until)
        Scoring(work("killed")).run()

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match="killed is half written: run the same wmtp-ds data score again"):
        read_manifest(Path("killed"))
    names = counted(monkeypatch)
    manifest, reused = Scoring(work("killed", batch_size=4)).run()
    assert not reused
    assert names[0] == "input0-00003.npy"
    assert len(names) == len(manifest.inputs[0].shards) - 3
    assert manifest.inputs == read_manifest(Path("scores")).inputs
    assert sorted(path.name for path in Path("killed").iterdir()) == sorted(
        path.name for path in Path("scores").iterdir()
    )


def test_a_process_that_dies_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork(monkeypatch)
    monkeypatch.setattr(Scorer, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"has been ended.*the same command goes on") as caught:
        Scoring(work("dead"), processes=2).run()
    assert caught.value.exit_code == 1


def test_a_process_whose_parent_died_meanwhile_leaves(there: Path) -> None:
    number = multiprocessing.get_context("fork").Value("i", 0)
    process = multiprocessing.get_context("fork").Process(target=scoring._begin, args=(work(), number, 1, 1))
    process.start()  # whose parent is this process, and not number 1
    process.join(30)
    assert (process.exitcode, number.value) == (1, 0)


def test_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"--output full: the scores take .* GiB more, and 0.00 GiB are free there"
    ) as caught:
        Scoring(work("full")).run()
    assert caught.value.exit_code == 2
    monkeypatch.undo()
    monkeypatch.chdir(here)

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("wmtp_ds.scores.worker.np.save", fill)
        with pytest.raises(
            RunError, match=r"full: writing failed: No space left on device. Mend that; the same"
        ) as caught:
            Scoring(work("full")).run()
    assert caught.value.exit_code == 1
    Scoring(work("full")).run()
    assert read_manifest(Path("full")).inputs == read_manifest(Path("scores")).inputs


@pytest.mark.parametrize("finished", [True, False])
def test_scores_of_something_else_are_replaced_only_by_force(
    here: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finished:
        (here / "scores/manifest.json").unlink()
        (here / "scores" / JOURNAL).write_text('{"kind": "another"}\n')
    with pytest.raises(UserError, match="holds scores of another model, other data or other settings: give another"):
        Scoring(work(max_length=80)).run()
    manifest, _ = Scoring(work(max_length=80, shard_tokens=10**6)).run(force=True)
    assert manifest.settings.max_length == 80
    assert sorted(path.name for path in Path("scores").iterdir()) == [
        "input0-00000.npy",
        "input0-rows.npy",
        "manifest.json",
    ]


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": Path("nowhere")}, "--reference: nowhere does not exist"),
        ({"reference": Path("storage/data")}, "is missing: storage/data is not a model folder"),
        ({"tokenizer": Path("nowhere")}, "nowhere does not exist: there is no tokenizer"),
        ({"inputs": (Path("none.jsonl"),)}, "none.jsonl: no such data file"),
        ({"inputs": (TRAIN, TRAIN)}, "has the content of .*train.jsonl: name it once"),
        ({"max_length": 10}, "no solution of a row fits into --max-length 10 tokens"),
        ({"output": Path("storage")}, r"--output storage: holds other files \(data\)"),
        ({"output": TRAIN}, "is a file: name a folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(there: Path, changes: dict, message: str) -> None:
    before = sorted(there.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        Scoring(work(**{"output": "new"} | changes)).run()
    assert caught.value.exit_code == 2
    assert sorted(there.rglob("*")) == before


def test_another_tokenizer_than_the_references(here: Path) -> None:
    other = shutil.copytree(REFERENCE, "other")
    file = Path(other) / "tokenizer.json"
    file.write_text(file.read_text().replace('"</s>"', '"<end>"'))
    settings = Path(other) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"</s>"', '"<end>"'))
    with pytest.raises(
        UserError, match="--tokenizer other: is not the reference's: token 2 is '<end>' there and '</s>'"
    ):
        Scoring(work("new", tokenizer=Path("other")))


def test_a_reference_that_embeds_too_few_tokens(here: Path) -> None:
    config = here / REFERENCE / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 128}))
    with pytest.raises(UserError, match=r"embeds 128 tokens, and the tokenizer in .* has one of id 2"):
        Scoring(work("new"))


def test_a_reference_that_says_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "_losses", all_losses(np.nan))
    with pytest.raises(UserError, match=r"of a token of storage.*train.jsonl:\d+ is nan: the weights are damaged"):
        Scoring(work("new")).run()
    monkeypatch.setattr(Scorer, "_losses", all_losses(7e4))
    with pytest.raises(UserError, match=r"--dtype float16: .* is 70000, beyond its range: take float32"):
        Scoring(work("other", dtype="float16")).run()


def test_out_of_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Scorer, "_losses", fail)
    with pytest.raises(RunError, match="out of memory with 4 rows of up to 320 tokens a pass: lower --batch-size"):
        Scoring(work("new")).run()


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--reference", REFERENCE, "--input", TRAIN, "--output", "typed", "--max-length", MAX_LENGTH]
    typed += ["--compute-dtype", "float32", "--batch-size", 4, "--shard-tokens", 150, "--device", "cpu"]
    assert run(*typed, "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["inputs"][0]["scored"] == ROWS - 1
    assert summary["inputs"][0]["mean_loss"] == pytest.approx(
        float(np.concatenate(stored(Path("scores"))).mean()), rel=1e-5
    )
    assert f"scoring: {ROWS} of {ROWS} rows" in captured.err
    assert read_manifest(Path("typed")).inputs == read_manifest(Path("scores")).inputs
    assert run(*typed) == 0
    assert (
        'typed: all was there already. For rho1, under [models.reference]: scores = "typed"' in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--input", TRAIN, "--output", "new"], "Missing option '--reference'"),
        (["--reference", REFERENCE, "--output", "new"], "Missing option '--input'"),
        ([*REQUIRED, "--dtype", "int8"], "'int8' is not one of"),
        (
            [
                "--reference",
                REFERENCE,
                "--input",
                TRAIN,
                "--output",
                "new",
                "--compute-dtype",
                "float16",
                "--device",
                "cpu",
            ],
            "--compute-dtype float16 does not work on a CPU",
        ),
    ],
)
def test_wrong_usage(there: Path, typed: list, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*typed) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()
