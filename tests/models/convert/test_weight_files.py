"""Files of weights that are read and written in blocks, against the libraries whose formats they are."""

import hashlib
import os
import pickle
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert import safetensors_files, tensors, torch_files
from wmtp_ds.models.convert.tensors import LazyTensor, portion
from wmtp_ds.models.convert.torch_files import TorchFile
from wmtp_ds.models.fingerprint import stored_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WRITERS = {"safetensors": safetensors_files.write, "torch": torch_files.write}


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor("file: name", tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop].clone())


def whole(tensor: LazyTensor) -> torch.Tensor:
    return torch.cat(list(tensor.blocks()))


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@st.composite
def states(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    state = {}
    for number, name in enumerate(names):
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        generator = torch.Generator().manual_seed(number)
        state[name] = torch.randn(shape, generator=generator).to(draw(st.sampled_from(FLOATS)))
    return state


ANY_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_FOLDER
@given(state=states().filter(lambda state: "__metadata__" not in state), block_bytes=st.sampled_from([1, 16, 10**6]))
def test_safetensors_are_the_librarys(tmp_path, state, block_bytes):
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", block_bytes)
        sums = safetensors_files.write(
            tmp_path / "model.safetensors", {n: lazy(t) for n, t in state.items()}, told.append
        )
    assert_same(load_file(tmp_path / "model.safetensors"), state)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "without which transformers refuses the file"
    assert sums == {name: sha(tensor) for name, tensor in state.items()}
    assert sum(told) == sum(tensor.nbytes for tensor in state.values())
    stored = stored_tensors(tmp_path)
    assert all(place.start % state[name].element_size() == 0 for name, place in stored.items()), "not aligned"
    save_file(state, tmp_path / "model.safetensors")
    found = {name: safetensors_files.stored(name, place) for name, place in stored_tensors(tmp_path).items()}
    assert_same({name: whole(tensor) for name, tensor in found.items()}, state)


@ANY_FOLDER
@given(state=states(), block_bytes=st.sampled_from([1, 16, 10**6]), mapped=st.sampled_from([0, 100, 10**9]))
def test_torch_files_are_torchs(tmp_path, state, block_bytes, mapped):
    file, told = tmp_path / "model.pth", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", block_bytes)
        patch.setattr(torch_files, "MAPPED_BYTES", mapped)
        sums = torch_files.write(file, {name: lazy(tensor) for name, tensor in state.items()}, told.append)
        for mmap in (True, False):
            assert_same(torch.load(file, weights_only=True, mmap=mmap), state)
        assert sums == {name: sha(tensor) for name, tensor in state.items()}
        assert sum(told) == sum(tensor.nbytes for tensor in state.values())
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, "other programs check the checksums"
            assert {record.compress_type for record in archive.infolist()} == {zipfile.ZIP_STORED}
        reader = torch._C.PyTorchFileReader(str(file))
        assert {reader.get_record_offset(f"data/{key}") % 64 for key in range(len(state))} == {0}
        torch.save(state, file)
        assert_same({name: whole(tensor) for name, tensor in TorchFile(file).tensors().items()}, state)


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_formats_at_once(tmp_path, dtype):
    state = {"b": torch.randn(7, 3).to(dtype), "a": torch.randn(5).to(dtype)}
    for kind, write in WRITERS.items():
        write(tmp_path / kind, {name: lazy(tensor) for name, tensor in state.items()}, lambda count: None)
    assert_same(load_file(tmp_path / "safetensors"), state)
    assert_same(torch.load(tmp_path / "torch", weights_only=True), state)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_bytes_each_time(tmp_path, kind):
    state = {"b": torch.randn(7, 3), "a": torch.randn(5)}
    for name in ("one", "two"):
        WRITERS[kind](tmp_path / name, {name: lazy(tensor) for name, tensor in state.items()}, lambda count: None)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("kind", WRITERS)
def test_values_that_are_not_finite_are_not_written(tmp_path, kind):
    with pytest.raises(UserError, match="holds NaN"):
        WRITERS[kind](tmp_path / "file", {"a": lazy(torch.tensor([[1.0, torch.nan]]))}, lambda count: None)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_written_file_is_on_the_disk(tmp_path, kind, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    WRITERS[kind](tmp_path / "file", {"a": lazy(torch.ones(40, 40))}, lambda count: None)
    assert synced == [(tmp_path / "file").stat().st_size], "nothing may follow, or stay in a buffer"


# --- what torch.save makes of all kinds of tensors ---


def test_shared_strided_and_wrapped_tensors(tmp_path):
    whole_one = torch.randn(10, 12)
    state = {
        "slice": whole_one[2:5],
        "columns": whole_one[:, 3:7],
        "transposed": whole_one.t(),
        "expanded": torch.randn(1, 4).expand(6, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(4, 2).half(),
    }
    torch.save(OrderedDict(state), tmp_path / "a.pth")
    found = TorchFile(tmp_path / "a.pth").tensors()
    assert_same({name: whole(tensor) for name, tensor in found.items()}, {n: t.detach() for n, t in state.items()})


@pytest.fixture
def no_file_is_open(monkeypatch):
    """Files of earlier tests, which live until their garbage is collected, count among the mapped ones, too."""
    monkeypatch.setattr(torch_files, "_OPEN", weakref.WeakSet())


def test_the_format_before_archives(tmp_path):
    state = {"a": torch.randn(5, 4), "b": torch.randn(3).bfloat16()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same({name: whole(tensor) for name, tensor in TorchFile(tmp_path / "a.pth").tensors().items()}, state)


def test_the_format_before_archives_is_held_one_file_at_a_time(tmp_path, no_file_is_open):
    """Such files are read whole: memory holds one shard, whatever their number."""
    files = []
    for number in range(3):
        torch.save(
            {"a": torch.full((5, 4), float(number))}, tmp_path / f"{number}", _use_new_zipfile_serialization=False
        )
        files.append(TorchFile(tmp_path / f"{number}"))
        assert [file._state is not None for file in files] == [False] * number + [True]
    for number in (0, 1, 1, 0, 2):
        assert torch.equal(whole(files[number].tensors()["a"]), torch.full((5, 4), float(number)))
        assert [file._state is not None for file in files] == [other == number for other in range(3)]


def test_the_format_before_archives_is_not_read_for_its_names(tmp_path):
    torch.save({"a": torch.ones(5, 4)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    file = TorchFile(tmp_path / "a.pth", verify=False)
    assert file._state is None
    (tensor,) = file.tensors().values()
    assert (tensor.dtype, tensor.shape) == (torch.float32, (5, 4))
    assert torch.equal(whole(tensor), torch.ones(5, 4))


def test_files_whose_checksums_were_not_computed(tmp_path):
    state = {"a": torch.randn(5, 4)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same({name: whole(tensor) for name, tensor in TorchFile(tmp_path / "a.pth").tensors().items()}, state)


def test_a_block_does_not_keep_the_map(tmp_path):
    torch.save({"a": torch.randn(50, 40)}, tmp_path / "a.pth")
    block = TorchFile(tmp_path / "a.pth").tensors()["a"].read(3, 5)
    assert block.untyped_storage().nbytes() == block.nbytes


@pytest.mark.parametrize("files", [1, 4])
def test_maps_are_given_up(tmp_path, monkeypatch, no_file_is_open, files):
    """Mapped pages count as memory: no more than a bounded part of all files may be mapped and touched."""
    tensors = []
    for number in range(files):
        torch.save({"a": torch.full((64, 256), float(number))}, tmp_path / f"{number}.pth")
        tensors.append(TorchFile(tmp_path / f"{number}.pth").tensors()["a"])
    monkeypatch.setattr(torch_files, "MAPPED_BYTES", 40_000)
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(args[0].stem) or load(*args, **options))
    for row in range(64):
        for number, tensor in enumerate(tensors):
            assert torch.equal(tensor.read(row, row + 1), torch.full((1, 256), float(number)))
    # 64 KiB a file, in pieces of 40,000 bytes of all together; each map is made anew after each.
    assert loads.count("0") == files * 65536 // 40_000
    assert len(loads) == pytest.approx(files * loads.count("0"), abs=files)


def test_large_files_may_keep_a_quarter_mapped(tmp_path, monkeypatch, no_file_is_open):
    """Else making maps would take longer than reading does."""
    torch.save({"a": torch.ones(1000, 1000)}, tmp_path / "a.pth")
    tensor = TorchFile(tmp_path / "a.pth").tensors()["a"]
    monkeypatch.setattr(torch_files, "MAPPED_BYTES", 1000)
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(1) or load(*args, **options))
    for row in range(1000):
        tensor.read(row, row + 1)
    assert len(loads) == 3


# --- damage ---


class Evil:
    def __reduce__(self):
        return os.system, ("touch never",)


def damages(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Contents of a file, and what is said of it."""
    torch.save({"a": torch.randn(20, 20)}, folder / "good")
    good = (folder / "good").read_bytes()
    torch.save({"a": Evil()}, folder / "evil")
    torch.save([torch.ones(2)], folder / "list")
    torch.save({"a": torch.ones(2), "epoch": 3}, folder / "number")
    torch.save({3: torch.ones(2)}, folder / "key")
    torch.save({"model": {"a": torch.ones(2)}}, folder / "nested")
    torch.save({"a": torch.ones(2, 2).to_sparse()}, folder / "sparse")
    middle = good.index(b"data/0") + 200
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    return {
        "cut in the middle": (good[: len(good) // 2], "is damaged: it is cut short"),
        "cut at the end": (good[:-1], "is damaged: it is cut short"),
        "empty": (b"", "is damaged: it is no file of torch.save"),
        "text": (b"hello, world", "is damaged: it is no file of torch.save"),
        "a flipped bit": (flipped, "is damaged: its record .*data/0"),
        "code": ((folder / "evil").read_bytes(), r"was not read: it asks for \w+\.system to be run.*safetensors"),
        "code, in a bare pickle": (pickle.dumps({"a": Evil()}, protocol=2), "was not read|is damaged"),
        "a list": ((folder / "list").read_bytes(), "is damaged: it holds a list"),
        "a number": ((folder / "number").read_bytes(), "is damaged: its entry 'epoch' is no tensor"),
        "a key that is no name": ((folder / "key").read_bytes(), "is damaged: its entry 3 is no tensor"),
        "nested": ((folder / "nested").read_bytes(), "is damaged: its entry 'model' is no tensor"),
        "sparse": ((folder / "sparse").read_bytes(), "is damaged: its entry 'a' is no tensor"),
        "an archive of something else": (make_zip(folder / "zip"), "is damaged: "),
    }


def make_zip(file: Path) -> bytes:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return file.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "cut in the middle",
        "cut at the end",
        "empty",
        "text",
        "a flipped bit",
        "code",
        "code, in a bare pickle",
        "a list",
        "a number",
        "a key that is no name",
        "nested",
        "sparse",
        "an archive of something else",
    ],
)
def test_damaged_torch_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = damages(tmp_path)[name]
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"^weights file {tmp_path}/x\.pth {message}") as found:
        TorchFile(tmp_path / "x.pth")
    assert "\n" not in str(found.value)
    assert "weights_only" not in str(found.value), "advice that nobody should take"
    assert not (tmp_path / "never").exists()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_gives_other_values(tmp_path, data):
    """Wherever a byte is changed or the file is cut: an error of ours, or the very tensors that were saved."""
    file = tmp_path / "x.pth"
    state = {"a": torch.arange(60.0).view(6, 10), "b": torch.ones(3).half()}
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    file.write_bytes(content)
    try:
        found = {name: whole(tensor) for name, tensor in TorchFile(file).tensors().items()}
    except UserError:
        return
    assert_same(found, state)


def test_a_missing_torch_file(tmp_path):
    with pytest.raises(UserError, match=r"x\.pth is missing\. Copy the model again"):
        TorchFile(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_may_not_be_read(tmp_path, monkeypatch, kind):
    state = {"a": torch.ones(4, 4)}
    if kind == "torch":
        torch.save(state, tmp_path / "model.safetensors")
    else:
        save_file(state, tmp_path / "model.safetensors")
        tensor = safetensors_files.stored("a", stored_tensors(tmp_path)["a"])

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        UserError, match=r"model\.safetensors may not be read: Permission denied\. Check its permissions"
    ):
        TorchFile(tmp_path / "model.safetensors") if kind == "torch" else tensor.read(0, 1)
    if kind == "safetensors":
        with pytest.raises(UserError, match=r"may not be read: Permission denied\. Check its permissions"):
            stored_tensors(tmp_path)


def test_a_safetensors_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.ones(400, 4)}, tmp_path / "model.safetensors")
    tensor = safetensors_files.stored("a", stored_tensors(tmp_path)["a"])
    os.truncate(tmp_path / "model.safetensors", 900)
    with pytest.raises(UserError, match=r"model\.safetensors ends within tensor a"):
        whole(tensor)


def test_integers_are_quantised_weights(tmp_path):
    save_file({"a": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a is stored as I8: quantised weights cannot be trained"):
        safetensors_files.stored("a", stored_tensors(tmp_path)["a"])


def test_portions_of_a_stored_tensor(tmp_path):
    matrix = torch.randn(12, 8)
    save_file({"a": matrix}, tmp_path / "model.safetensors")
    tensor = safetensors_files.stored("a", stored_tensors(tmp_path)["a"])
    assert torch.equal(whole(portion(tensor, 0, 2, 3)), matrix[8:])
    assert torch.equal(whole(portion(tensor, 1, 1, 4)), matrix[:, 2:4])
