"""The reader of MindSpore checkpoints, on files that a writer of our own made."""

from __future__ import annotations

import warnings

import pytest
import torch

import scfm
from scfm.checkpoints import mindspore

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "double": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "scalar": torch.tensor(0.25),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(2, 0),
    **{
        str(kind): torch.tensor([1, 0, 100], dtype=kind) for kind in (torch.int8, torch.int16, torch.int32, torch.int64)
    },
    **{
        str(kind): torch.tensor([1, 0, 200]).to(kind)
        for kind in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    },
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def same(read, expected):
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slice_bytes", [None, 8])
@pytest.mark.parametrize("crc", [False, True])
def test_all_types_and_layouts(path, mindspore_writer, packed, slice_bytes, crc):
    unknown = (
        mindspore_writer.field(9, b"later") + mindspore_writer.field(10, 300) + b"\x5d" + b"1234" + b"\x61" + b"8" * 8
    )
    mindspore_writer.write(path, TENSORS, crc=crc, slice_bytes=slice_bytes, packed=packed, extra=unknown)
    same(mindspore.read(path, check_crc=True), TENSORS)


def test_a_scalar_may_have_a_size_of_zero(path, mindspore_writer):
    path.write_bytes(mindspore_writer.record("lr", [0], "Float32", torch.tensor(0.5).numpy().tobytes()))
    assert mindspore.read(path)["lr"].item() == 0.5
    assert mindspore.read(path)["lr"].shape == ()


def test_texts_are_kept_apart(path, mindspore_writer):
    mindspore_writer.write(path, {"note": "größe", "w": torch.ones(2)})
    file = mindspore.MindSporeFile(path)
    assert file.text("note") == "größe"
    assert list(file.read()) == ["w"]
    with pytest.raises(KeyError, match="text"):
        file.tensor("note")


def test_of_several_with_one_name_the_last_counts(path, mindspore_writer):
    first = mindspore_writer.write(path, {"w": torch.zeros(2), "v": torch.ones(1)}).read_bytes()
    second = mindspore_writer.write(path, {"w": torch.ones(3)}).read_bytes()
    path.write_bytes(first + second)
    same(mindspore.read(path), {"v": torch.ones(1), "w": torch.ones(3)})


def test_skipped_tensors_are_left_out(path, mindspore_writer):
    mindspore_writer.write(path, TENSORS)
    assert set(mindspore.read(path, skip=lambda name: name != "half")) == {"half"}


def test_tensors_are_views_that_never_change_the_file(path, mindspore_writer):
    mindspore_writer.write(path, {"w": torch.ones(4)})
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = mindspore.MindSporeFile(path)
        first, second = file.tensor("w"), file.tensor("w")
    assert first.data_ptr() == second.data_ptr()
    first += 1
    assert second.tolist() == [2, 2, 2, 2]
    assert path.read_bytes() == before
    file.release()
    assert first.tolist() in ([1, 1, 1, 1], [2, 2, 2, 2])


def test_tensors_outlive_the_file_object(path, mindspore_writer):
    mindspore_writer.write(path, TENSORS)
    same(mindspore.read(path), TENSORS)


@pytest.mark.parametrize("slice_bytes", [None, 16])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_files_that_are_cut_off_are_refused(path, mindspore_writer, share, slice_bytes):
    mindspore_writer.write(path, {"weight": torch.ones(30, 7)}, slice_bytes=slice_bytes)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(scfm.CheckpointError, match="cut off"):
        mindspore.read(path)


def test_a_file_that_ends_between_the_slices_of_a_tensor_is_refused(path, mindspore_writer):
    content = torch.ones(4).numpy().tobytes()
    path.write_bytes(mindspore_writer.record("w", [4], "Float32", content[:8]))
    with pytest.raises(scfm.CheckpointError, match="cut off: 'w' has 8 bytes"):
        mindspore.read(path)


def test_too_many_bytes_are_refused(path, mindspore_writer):
    path.write_bytes(mindspore_writer.record("w", [4], "Float32", b"\0" * 20))
    with pytest.raises(scfm.CheckpointError, match="too many"):
        mindspore.read(path)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 a zip file", b"\x80\x02 a pickle", b"\x0a", b"\x0a\xff", b"text and more text", b"\x0a\x02\x0a\x00"],
)
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(scfm.CheckpointError, match="no MindSpore checkpoint"):
        mindspore.read(path)
    assert not mindspore.names(path)


def test_empty_encrypted_and_missing_files_say_so(path):
    with pytest.raises(FileNotFoundError):
        mindspore.read(path)
    path.write_bytes(b"")
    with pytest.raises(scfm.CheckpointError, match="empty"):
        mindspore.read(path)
    path.write_bytes(0x7F3A5ED8.to_bytes(4, "little") + b"\1" * 60)
    with pytest.raises(scfm.CheckpointError, match="encrypted; decrypt"):
        mindspore.read(path)
    assert not mindspore.names(path)


def test_an_unknown_type_is_named(path, mindspore_writer):
    path.write_bytes(mindspore_writer.record("w", [4], "Complex64", b"\0" * 32))
    with pytest.raises(scfm.CheckpointError, match="Complex64"):
        mindspore.read(path)


def test_a_wrong_checksum_is_found_on_request(path, mindspore_writer):
    mindspore_writer.write(path, TENSORS, crc=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"weight") + 40] ^= 1
    path.write_bytes(content)
    mindspore.read(path)
    with pytest.raises(scfm.CheckpointError, match="checksum"):
        mindspore.read(path, check_crc=True)


def test_a_file_above_two_gibibytes_costs_neither_time_nor_memory(path, mindspore_writer):
    shape = (600_000, 1_000)
    n_bytes = 4 * shape[0] * shape[1]
    head, tail = torch.ones(3), torch.full((2,), 7.0)
    first = mindspore_writer.write(path, {"head": head}).read_bytes()
    last = mindspore_writer.write(path, {"tail": tail}).read_bytes()
    varint, field = mindspore_writer.varint, mindspore_writer.field
    sizes = b"".join(field(1, dim) for dim in shape) + field(2, b"Float32")
    content = varint(3 << 3 | 2) + varint(n_bytes)
    tensor = varint(2 << 3 | 2) + varint(len(sizes) + len(content) + n_bytes) + sizes + content
    tag = field(1, b"big")
    record = varint(1 << 3 | 2) + varint(len(tag) + len(tensor) + n_bytes) + tag + tensor
    with path.open("wb") as file:
        file.write(first + record)
        file.seek(n_bytes, 1)
        file.write(last)
    if path.stat().st_blocks * 512 > 2**24:
        pytest.skip("the file system has no sparse files")
    tensors = mindspore.read(path)
    assert tensors["big"].shape == shape
    assert tensors["big"][-1, -1] == 0
    assert torch.equal(tensors["head"], head)
    assert torch.equal(tensors["tail"], tail)
