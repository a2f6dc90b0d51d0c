"""Nothing half-written is ever mistaken for done: interruptions, full disks, files that are not what was written."""

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import rewrite

from wmtp_ds.errors import RunError, UserError
from wmtp_ds.models.convert import deliver, safetensors_files, torch_files
from wmtp_ds.models.convert.exporting import export_model
from wmtp_ds.models.convert.importing import import_model

SHARD = 60_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def convert(make_llama, tmp_path):
    """Import, or export to Meta's layout, always the same model to the same place; and the place."""
    source = make_llama()
    torch.set_grad_enabled(True)

    def run(kind: str = "import", **options):
        if kind == "import":
            return import_model(source, tmp_path / "result", shard_bytes=SHARD, **options)
        return export_model(source, tmp_path / "result", format="meta", **options)

    return run


class Stops:
    """In place of a writer: writes some files, then raises in the middle of the next."""

    def __init__(self, module, after: int, error: BaseException):
        self.write, self.after, self.error = module.write, after, error
        self.written: list[str] = []

    def __call__(self, file, tensors, on_bytes):
        if len(self.written) == self.after:
            file.write_bytes(b"half")
            raise self.error
        self.written.append(file.name)
        return self.write(file, tensors, on_bytes)


# --- interruptions ---


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()]
)
def test_an_interrupted_import_goes_on_where_it_was(convert, tmp_path, monkeypatch, after, error):
    convert()
    expected = contents(tmp_path / "result")
    shutil.rmtree(tmp_path / "result")
    stops = Stops(safetensors_files, after, error)
    monkeypatch.setattr(safetensors_files, "write", stops)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        convert()
    assert not (tmp_path / "result").exists()
    partial = tmp_path / ".partial-result"
    assert partial.exists() == (after > 0), "what cannot be gone on from is not left behind"
    kept = {name: (partial / name).stat().st_ino for name in stops.written}
    monkeypatch.undo()
    again = Stops(safetensors_files, 10**6, error)
    monkeypatch.setattr(safetensors_files, "write", again)
    done = convert()
    assert done.resumed == stops.written
    assert stops.written + again.written == done.files, "each file is written once"
    assert contents(tmp_path / "result") == expected
    assert {name: (tmp_path / "result" / name).stat().st_ino for name in stops.written} == kept
    assert not partial.exists()


def test_an_interrupted_export_to_meta(make_release, tmp_path, monkeypatch):
    folder, _ = make_release(ranks=2)
    stops = Stops(torch_files, 1, KeyboardInterrupt())
    monkeypatch.setattr(torch_files, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        export_model(folder, tmp_path / "result", format="meta")
    assert not (tmp_path / "result").exists()
    monkeypatch.undo()
    assert export_model(folder, tmp_path / "result", format="meta").resumed == ["consolidated.00.pth"]
    for file in ("consolidated.00.pth", "consolidated.01.pth"):
        one, other = (torch.load(place / file, weights_only=True) for place in (folder, tmp_path / "result"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def interrupt(convert, monkeypatch, after: int = 2, **options) -> None:
    monkeypatch.setattr(safetensors_files, "write", Stops(safetensors_files, after, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(**options)
    monkeypatch.undo()


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"heads": "random"}, {"n_future": 2}])
def test_another_conversion_starts_afresh(convert, tmp_path, monkeypatch, options):
    convert(**options)
    expected = contents(tmp_path / "result")
    shutil.rmtree(tmp_path / "result")
    interrupt(convert, monkeypatch)
    assert convert(**options).resumed == []
    assert contents(tmp_path / "result") == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_starts_afresh(convert, monkeypatch, seed):
    interrupt(convert, monkeypatch, heads="random", seed=1)
    assert len(convert(heads="random", seed=seed).resumed) == (2 if seed == 1 else 0)


def test_a_changed_source_starts_afresh(convert, tmp_path, monkeypatch):
    interrupt(convert, monkeypatch)
    rewrite(tmp_path / "source", lambda state: state["model.embed_tokens.weight"].add_(1))
    assert convert().resumed == []
    (file,) = (tmp_path / "result").glob("model-00001-of-*")
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(file)[name], load_file(tmp_path / "source/model.safetensors")[name])


@pytest.mark.parametrize("progress", ["", "[]", "{}", '{"plan": 3}', None])
def test_a_damaged_record_starts_afresh(convert, tmp_path, monkeypatch, progress):
    interrupt(convert, monkeypatch)
    record = tmp_path / ".partial-result" / ".progress.json"
    if progress is None:
        record.unlink()
    else:
        record.write_text(progress)
    assert convert().resumed == []


def test_a_done_file_that_was_cut_starts_afresh(convert, tmp_path, monkeypatch):
    interrupt(convert, monkeypatch)
    (file,) = (tmp_path / ".partial-result").glob("model-00001-of-*")
    os.truncate(file, 5000)
    assert convert().resumed == []


def test_a_done_file_that_was_damaged_is_found(convert, tmp_path, monkeypatch):
    interrupt(convert, monkeypatch)
    (file,) = (tmp_path / ".partial-result").glob("model-00001-of-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"model-00001.* is not what was written: tensor \S+ has another checksum"):
        convert()
    assert names(tmp_path) == ["source"]
    assert convert().resumed == []


def test_what_else_lies_in_the_partial_folder_goes(convert, tmp_path, monkeypatch):
    interrupt(convert, monkeypatch)
    partial = tmp_path / ".partial-result"
    (partial / "model-00099-of-00099.safetensors").write_bytes(b"old")
    (partial / "folder").mkdir()
    convert()
    assert "model-00099-of-00099.safetensors" not in names(tmp_path / "result")
    assert "folder" not in names(tmp_path / "result")


def start(work, moment) -> int:
    """Do some work in a process of its own, which calls ``moment`` after each block written or compared and before
    each file that is renamed or removed; its number."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # those that there were do not survive a fork
        for name in ("replace", "rename", "unlink"):
            done = getattr(Path, name)
            setattr(Path, name, lambda *arguments, done=done, **options: (moment(0), done(*arguments, **options))[1])
        try:
            work(progress=deliver.Progress(advance=moment))
        finally:
            os._exit(0)
    return process


def test_killed_at_any_moment(convert, tmp_path):
    """Each attempt goes on from the one before; in the end there is what an undisturbed one makes."""
    result, kills = tmp_path / "result", 0
    convert()
    expected = contents(result)
    shutil.rmtree(result)
    draw = random.Random(0)
    for _ in range(15):
        steps, last = itertools.count(1), draw.randint(1, 140)

        def kill(count: int, steps=steps, last=last) -> None:
            if next(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        kills += os.WIFSIGNALED(os.waitpid(start(convert, kill), 0)[1])
        if result.exists():
            assert contents(result) == expected
            shutil.rmtree(result)
    assert kills > 8
    convert(force=True)
    assert contents(result) == expected
    assert names(tmp_path) == ["result", "source"]


def test_a_killed_import_goes_on(convert, tmp_path):
    result = tmp_path / "result"
    convert()
    expected = contents(result)
    shutil.rmtree(result)
    (reads, writes), steps = os.pipe(), itertools.count(1)

    def wait(count: int) -> None:
        if next(steps) == 30:
            os.write(writes, b"now")
            signal.pause()

    process = start(convert, wait)
    assert os.read(reads, 3) == b"now"
    with pytest.raises(UserError, match="result is being written by another process"):
        convert()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not result.exists()
    assert len(convert().resumed) > 2
    assert contents(result) == expected
    assert names(tmp_path) == ["result", "source"]


def test_all_is_on_the_disk_before_it_gets_its_name(convert, tmp_path, monkeypatch):
    """A crash of the machine must not leave a model whose files are empty."""
    synced, early = set(), set()
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda self, target: early.update(synced) or rename(self, target))
    convert()
    result = tmp_path / "result"
    assert {path.stat().st_ino for path in (result, *result.iterdir())} <= early
    assert tmp_path.stat().st_ino in synced


def test_a_rename_that_fails_leaves_the_old_model(convert, tmp_path, monkeypatch):
    convert()
    before, rename = contents(tmp_path / "result"), Path.rename

    def refuse(self, target):
        if self.name.startswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"result could not be written: .*Permission denied"):
        convert(force=True, dtype=torch.bfloat16)
    assert contents(tmp_path / "result") == before
    monkeypatch.undo()
    convert(force=True, dtype=torch.bfloat16)
    assert names(tmp_path) == ["result", "source"]


# --- full and broken disks ---


class FullDisk:
    """A file on a disk that takes some bytes and then says that it is full."""

    def __init__(self, stream, room: list[int]):
        self.stream, self.room = stream, room

    def write(self, data):
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("kind", ["import", "export"])
@pytest.mark.parametrize("room", [0, 5000, 150_000])
def test_a_disk_that_fills_up(convert, tmp_path, monkeypatch, kind, room):
    opened, left = Path.open, [room]

    def limited(self, mode="r", *arguments, **options):
        stream = opened(self, mode, *arguments, **options)
        return FullDisk(stream, left) if mode == "wb" and self.suffix in (".safetensors", ".pth") else stream

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(RunError) as found:
        convert(kind)
    assert str(found.value).startswith(f"{tmp_path / 'result'} could not be written: the disk is full. Free space, and")
    assert found.value.exit_code == 1
    assert not (tmp_path / "result").exists()
    monkeypatch.undo()
    convert(kind)
    assert names(tmp_path) == ["result", "source"]


def test_a_disk_that_is_too_small(convert, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    for kind in ("import", "export"):
        with pytest.raises(UserError, match=r"result takes 0\.0 GB, but there are 0\.0 GB free\. Free space, or name"):
            convert(kind)
        assert names(tmp_path) == ["source"]


def test_what_is_done_counts_as_space(convert, tmp_path, monkeypatch):
    needed = convert().nbytes
    shutil.rmtree(tmp_path / "result")
    interrupt(convert, monkeypatch)
    done = sum(file.stat().st_size for file in (tmp_path / ".partial-result").glob("model*"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - done - 20_000))
    with pytest.raises(UserError, match="GB free"):
        convert()
    assert (tmp_path / ".partial-result").exists(), "what is done is not thrown away for that"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - done))
    assert len(convert().resumed) == 2


def test_a_folder_that_may_not_be_written_to(convert, tmp_path, monkeypatch):
    made = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name.startswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return made(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"\.partial-result cannot be made: Permission denied\. Name") as found:
        convert()
    assert found.value.exit_code == 2


def test_a_destination_below_a_file(convert, tmp_path, make_llama):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: Not a directory"):
        import_model(tmp_path / "source", tmp_path / "file" / "policy")


def test_two_at_once(convert, tmp_path):
    partial = tmp_path / ".partial-result"
    partial.mkdir()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"result is being written by another process\. Wait for it, or end it"):
        convert()
    assert partial.exists(), "the other's work"
    os.close(holder)
    convert()


def test_a_file_system_without_locks(convert, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    convert()


# --- what comes out is compared with what went in ---


def spoiled(spoil):
    """A writer whose files are spoiled once they are written."""

    def write(file, tensors, on_bytes):
        sums = safetensors_files_write(file, tensors, on_bytes)
        state = load_file(file)
        save_file(spoil(state), file)
        return sums

    return write


safetensors_files_write = safetensors_files.write
SPOILED = {
    "empty tensors": lambda state: {name: tensor[:0] for name, tensor in state.items()},
    "zeros": lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()},
    "one bit": lambda state: state | {max(state): flip(state[max(state)])},
    "a tensor is missing": lambda state: dict(sorted(state.items())[1:]),
    "a tensor too many": lambda state: state | {"x": torch.ones(2)},
    "another dtype": lambda state: {name: tensor.double() for name, tensor in state.items()},
    "another shape": lambda state: {name: tensor[None].clone() for name, tensor in state.items()},
    "two tensors exchanged": lambda state: dict(zip(state, reversed(list(state.values())), strict=True)),
}


def flip(tensor: torch.Tensor) -> torch.Tensor:
    result = tensor.clone()
    result.view(torch.int32).view(-1)[-1] ^= 1
    return result


@pytest.mark.parametrize("kind", ["import", "export"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_what_was_written_is_compared(convert, tmp_path, monkeypatch, make_llama, kind, spoil):
    monkeypatch.setattr(safetensors_files, "write", spoiled(SPOILED[spoil]))
    command = convert if kind == "import" else partial(export_model, tmp_path / "source", tmp_path / "result")
    with pytest.raises(RunError, match=r"is not what was written: .* when read back\. The result was removed") as found:
        command()
    assert found.value.exit_code == 1
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_was_written_for_meta_is_compared(convert, tmp_path, monkeypatch, spoil):
    write = torch_files.write

    def wrong(file, tensors, on_bytes):
        sums = write(file, tensors, on_bytes)
        torch.save(SPOILED[spoil](torch.load(file, weights_only=True)), file)
        return sums

    monkeypatch.setattr(torch_files, "write", wrong)
    with pytest.raises(RunError, match=r"is not what was written: .* when read back\. The result was removed"):
        convert("export")
    assert names(tmp_path) == ["source"]


def test_the_fingerprint_is_of_what_was_read_back(convert, tmp_path):
    done = convert()
    stored = json.loads((tmp_path / "result" / "trunk_fingerprint.json").read_text())
    assert stored == {"sha256": done.trunk_fingerprint}


def test_values_that_are_not_finite_leave_nothing(convert, tmp_path):
    rewrite(tmp_path / "source", lambda state: state["model.norm.weight"].fill_(torch.nan))
    for kind in ("import", "export"):
        with pytest.raises(UserError, match=r"model\.safetensors: model\.norm\.weight holds NaN") as found:
            convert(kind)
        assert found.value.exit_code == 2
        assert names(tmp_path) == ["source"]


def test_values_that_do_not_fit_leave_nothing(convert, tmp_path):
    rewrite(tmp_path / "source", lambda state: state["model.norm.weight"].fill_(1e6))
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 1e\+06, which float16 cannot"):
        convert(dtype=torch.float16)
    assert names(tmp_path) == ["source"]
    convert(dtype=torch.bfloat16)


# --- the destination ---


def test_a_destination_that_exists(convert, tmp_path):
    convert()
    before = contents(tmp_path / "result")
    with pytest.raises(UserError, match=r"result exists\. Name another destination, or replace it with --force"):
        convert()
    assert contents(tmp_path / "result") == before
    convert(dtype=torch.bfloat16, force=True)
    assert contents(tmp_path / "result") != before
    assert names(tmp_path) == ["result", "source"]


def test_a_failed_replacement_leaves_the_old_one(convert, tmp_path, monkeypatch):
    convert()
    before = contents(tmp_path / "result")
    interrupt(convert, monkeypatch, force=True, dtype=torch.bfloat16)
    assert contents(tmp_path / "result") == before
    rewrite(tmp_path / "source", lambda state: state["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(UserError, match="NaN"):
        convert(force=True)
    assert contents(tmp_path / "result") == before


def test_an_empty_folder_is_no_destination_that_exists(convert, tmp_path):
    (tmp_path / "result").mkdir()
    convert()
    assert "config.json" in names(tmp_path / "result")


def test_what_force_does_not_replace(convert, tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no model's folder: --force does not replace it\. Remove it yourself"):
        convert(force=True)
    shutil.rmtree(tmp_path / "result")
    (tmp_path / "result").write_text("a file")
    with pytest.raises(UserError, match=r"result exists and is no folder\. Name another destination"):
        convert(force=True)
    (tmp_path / "result").unlink()
    (tmp_path / "result").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match=r"lie in each other"):
        convert(force=True)


def test_source_and_destination_do_not_lie_in_each_other(convert, tmp_path):
    source = tmp_path / "source"
    for destination in (source, source / "inner", tmp_path, source / ".." / "source"):
        with pytest.raises(UserError, match=r"lie in each other\. Name another destination"):
            import_model(source, destination, force=True)
    assert "config.json" in names(source)


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        (".", r"^\. cannot be made anew\. Name the model's own folder"),
        ("..", r"^\.\. cannot be made anew"),
        ("a/..", r"a/\.\. cannot be made anew"),
        ("x" * 252, r"File name too long.*Name another destination"),
        ("loop", r"loop exists and is no folder\. Name another destination"),
    ],
)
def test_destinations_that_are_no_name(convert, tmp_path, monkeypatch, destination, message):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    for force in (False, True):
        with pytest.raises(UserError, match=message):
            import_model(tmp_path / "source", Path(destination), force=force)
    assert names(tmp_path) == ["here", "source"]
    assert names(tmp_path / "here") == ["loop"]


def test_folders_on_the_way_are_made(convert, tmp_path):
    import_model(tmp_path / "source", tmp_path / "a" / "b" / "policy")
    assert names(tmp_path / "a" / "b") == ["policy"]


def test_progress_counts_every_byte_twice(convert, monkeypatch):
    """Written, then read back; also what an interrupted attempt had written."""
    for resumes in (False, True):
        if resumes:
            interrupt(convert, monkeypatch, force=True)
        totals, counts = [], []
        done = convert(progress=deliver.Progress(totals.append, counts.append), force=True)
        assert totals == [2 * done.nbytes]
        assert sum(counts) == 2 * done.nbytes


def test_the_same_conversion_gives_the_same_bytes(convert, tmp_path):
    """No clock or random name is in what is written."""
    convert()
    first = contents(tmp_path / "result")
    convert(force=True)
    assert contents(tmp_path / "result") == first
