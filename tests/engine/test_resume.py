"""Results on disk: every state that a kill can leave is resumable, other runs are never mixed in."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from scfm import engine
from scfm.data import open_source
from scfm.engine import _writer


class Kill(BaseException):
    """Not an Exception, so that nothing on the way can handle it."""


def embed(backbone, tokens):
    return backbone.embed(tokens)


def run(backbone, adata, out, compute=embed, **arguments):
    source = open_source(adata)
    arguments = {"shape": (5,), "task": {"pooling": "sum"}, "block_size": 8, "progress": False, **arguments}
    return engine.run(backbone, source, backbone.vocab.match(source.var_names), compute, out=out, **arguments)


class Counting:
    """Counts cells; fails after some calls if asked to."""

    def __init__(self, stop_after=None):
        self.n_cells, self.left = 0, stop_after

    def __call__(self, backbone, tokens):
        if self.left == 0:
            raise Kill
        if self.left is not None:
            self.left -= 1
        self.n_cells += len(tokens)
        return backbone.embed(tokens)


def test_array_on_disk(bag, cells, expected, tmp_path):
    result = run(bag, cells, tmp_path / "deep" / "out.zarr")
    stored = zarr.open_array(tmp_path / "deep" / "out.zarr", mode="r")
    assert stored.dtype == np.float32
    assert stored.chunks == (8, 5)
    np.testing.assert_allclose(stored[...], expected, atol=1e-6)
    np.testing.assert_array_equal(result.array[...], stored[...])


def test_finished_blocks_are_not_done_again(bag, cells, expected, tmp_path):
    out = tmp_path / "out.zarr"
    first = Counting(stop_after=5)
    with pytest.raises(Kill):
        run(bag, cells, out, first, batch_size=8)
    second = Counting()
    # another block size on the way is fine: the array keeps its own
    result = run(bag, cells, out, second, block_size=50)
    assert second.n_cells < 58
    assert first.n_cells + second.n_cells < 58 + 8
    np.testing.assert_allclose(result.array[...], expected, atol=1e-6)
    assert result.n_empty == 2
    third = Counting()
    assert run(bag, cells, out, third).n_empty == 2
    assert third.n_cells == 0


def test_killed_between_the_numbers_and_the_note(bag, cells, expected, tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    original = _writer.ZarrWriter.write

    def write(self, start, values, n_empty):
        if start == 16:
            self.array[start : start + len(values)] = values
            raise Kill
        original(self, start, values, n_empty)

    monkeypatch.setattr(_writer.ZarrWriter, "write", write)
    with pytest.raises(Kill):
        run(bag, cells, out)
    monkeypatch.undo()
    np.testing.assert_allclose(run(bag, cells, out).array[...], expected, atol=1e-6)


def test_killed_in_the_middle_of_the_note(bag, cells, expected, tmp_path):
    out = tmp_path / "out.zarr"
    run(bag, cells, out)
    note = out / _writer._DONE_FILE
    whole = note.read_bytes()
    array = zarr.open_array(out, mode="r+")
    array[16:] = np.nan
    # the line "24 0" was cut: as "2" it must not count as another block
    note.write_bytes(whole[: whole.index(b"\n24") + 2])
    np.testing.assert_allclose(run(bag, cells, out).array[24:], expected[24:], atol=1e-6)
    assert sorted(int(line.split()[0]) for line in note.read_text().splitlines()) == list(range(0, 60, 8))


def test_killed_while_the_array_is_created(bag, cells, expected, tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    create = zarr.create_array

    def killed(*args, **kwargs):
        create(*args, **kwargs)
        raise Kill

    monkeypatch.setattr(_writer.zarr, "create_array", killed)
    with pytest.raises(Kill):
        run(bag, cells, out)
    assert not out.exists()
    monkeypatch.undo()
    np.testing.assert_allclose(run(bag, cells, out).array[...], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("pooling", lambda cells: {"task": {"pooling": "max"}}),
        ("options", lambda cells: {"options": {"scale": 2.0}}),
        ("cell_names", lambda cells: {"adata": cells[::-1].copy()}),
        ("genes", lambda cells: {"adata": cells[:, ::-1].copy()}),
        ("cells", lambda cells: {"adata": cells[:50].copy()}),
        ("shape", lambda cells: {"shape": (4,)}),
    ],
)
def test_another_run_is_refused(bag, cells, tmp_path, named, change):
    run(bag, cells, tmp_path / "out.zarr")
    before = zarr.open_array(tmp_path / "out.zarr")[...]
    with pytest.raises(ValueError, match=f"another run: .*{named}.*overwrite=True"):
        run(bag, out=tmp_path / "out.zarr", **{"adata": cells, **change(cells)})
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "out.zarr")[...], before)


@pytest.mark.parametrize(
    ("named", "change"),
    [("weights", lambda bag: bag.module.table.mul_(2)), ("precision", lambda bag: bag.to("cpu", "bfloat16"))],
)
def test_another_model_is_refused(bag, cells, tmp_path, named, change):
    run(bag, cells, tmp_path / "out.zarr")
    change(bag)
    with pytest.raises(ValueError, match=f"another run: .*{named}"):
        run(bag, cells, tmp_path / "out.zarr")


def test_overwrite(bag, cells, expected, tmp_path):
    out = tmp_path / "out.zarr"
    run(bag, cells, out, options={"scale": 3.0})
    np.testing.assert_allclose(run(bag, cells, out, overwrite=True).array[...], expected, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_touched(bag, cells, tmp_path, overwrite):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("data")
    zarr.create_array(tmp_path / "other.zarr", shape=(60, 5), chunks=(60, 5), dtype="float32")
    (tmp_path / "file").touch()
    for name in ("folder", "other.zarr", "file"):
        with pytest.raises(FileExistsError, match=name):
            run(bag, cells, tmp_path / name, overwrite=overwrite)
        assert (tmp_path / name).exists()
    assert (tmp_path / "folder" / "precious.txt").read_text() == "data"
