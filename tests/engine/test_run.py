"""The loop: same numbers whatever the sizes, memory back-off, generic results, errors."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scfm
from scfm import engine
from scfm.data import open_source
from scfm.engine import _memory


def embed(backbone, tokens):
    return backbone.embed(tokens)


def run(backbone, adata, compute=embed, **arguments):
    source = open_source(adata)
    arguments = {"shape": (5,), "task": {"output": "test"}, "progress": False, **arguments}
    return engine.run(backbone, source, backbone.vocab.match(source.var_names), compute, **arguments)


def test_results_are_right_and_in_order(bag, cells, expected):
    result = run(bag, cells)
    assert result.array.dtype == np.float32
    assert result.n_empty == 2
    np.testing.assert_allclose(result.array, expected, atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.none() | st.integers(1, 70),
    tokens_per_batch=st.none() | st.integers(1, 3000),
    block_size=st.none() | st.integers(1, 70),
)
def test_sizes_change_nothing(bag, cells, expected, batch_size, tokens_per_batch, block_size):
    got = run(bag, cells, batch_size=batch_size, tokens_per_batch=tokens_per_batch, block_size=block_size).array
    np.testing.assert_allclose(got, expected, atol=1e-6)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(60)), st.permutations(range(40)))
def test_orders(bag, cells, expected, cell_order, gene_order):
    got = run(bag, cells[list(cell_order), list(gene_order)].copy(), block_size=13).array
    np.testing.assert_allclose(got, expected[list(cell_order)], atol=1e-6)


def test_what_is_true_of_every_block_is_said_once(cells, capsys):
    backbone = scfm.load("cellfm-mini", device="cpu")
    cells.var_names = ["UNKNOWN", *backbone.vocab.names[backbone.vocab.is_gene][: cells.n_vars - 1]]
    source, options = open_source(cells), {"include_zeros": True, "unknown": "pad"}
    for repeats in (1, 2):
        engine.visit(
            backbone,
            source,
            backbone.vocab.match(source.var_names),
            embed,
            lambda *_: None,
            options=options,
            block_size=7,
        )
        assert capsys.readouterr().err.count("1 unknown genes of the panel") == 1, repeats


def test_settings_batch_size_bounds_the_cells(bag, cells):
    sizes = []

    def note(backbone, tokens):
        sizes.append(len(tokens))
        return backbone.embed(tokens)

    scfm.settings.batch_size = 3
    run(bag, cells, note)
    assert max(sizes) == 3
    sizes.clear()
    run(bag, cells, note, batch_size=11)
    assert 3 < max(sizes) <= 11


def test_only_usable_cells_are_computed_and_batches_are_short_of_padding(bag, cells):
    seen = []

    def note(backbone, tokens):
        assert tokens.valid.all()
        seen.append((len(tokens), tokens.max_length))
        return backbone.embed(tokens)

    run(bag, cells, note, tokens_per_batch=80)
    assert sum(n for n, _ in seen) == 58
    assert all(n == 1 or n * length <= 80 for n, length in seen)


@pytest.mark.parametrize("shape", [(), (5, 2), (3, 1, 2)])
def test_results_of_any_shape(bag, cells, expected, shape):
    def compute(backbone, tokens):
        first = backbone.embed(tokens)[:, 0]
        return first.reshape(-1, *[1] * len(shape)).expand(-1, *shape)

    result = run(bag, cells, compute, shape=shape, block_size=17).array
    assert result.shape == (60, *shape)
    np.testing.assert_allclose(result.reshape(60, -1)[:, 0], expected[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ],
)
def test_memory_runs_out(bag, cells, expected, error):
    sizes = []

    def compute(backbone, tokens):
        sizes.append(len(tokens) * tokens.max_length)
        if sizes[-1] > 100:
            raise error
        return backbone.embed(tokens)

    got = run(bag, cells, compute, batch_size=60, block_size=30).array
    np.testing.assert_allclose(got, expected, atol=1e-6)
    failures = [size for size in sizes if size > 100]
    assert len(failures) < 10
    # what was learnt in one block holds for the next
    assert max(sizes[len(sizes) // 2 :]) <= 100


def test_not_even_one_cell_fits(bag, cells):
    def compute(backbone, tokens):
        raise torch.OutOfMemoryError

    with pytest.raises(MemoryError, match="one cell with 40 tokens.*bfloat16"):
        run(bag, cells, compute)


def test_other_errors_are_not_hidden(bag, cells):
    def compute(backbone, tokens):
        msg = "shapes differ"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(bag, cells, compute)


def test_no_cells(bag, cells, tmp_path):
    nothing = cells[:0].copy()
    assert run(bag, nothing).array.shape == (0, 5)
    assert run(bag, nothing, out=tmp_path / "out.zarr").array.shape == (0, 5)


def test_reading_happens_in_one_other_thread(bag, cells):
    threads = set()
    tokenize = bag.tokenize
    bag.tokenize = lambda *args, **kwargs: threads.add(threading.current_thread()) or tokenize(*args, **kwargs)
    run(bag, cells, block_size=10)
    assert len(threads) == 1
    assert threads != {threading.current_thread()}


def test_errors_of_the_reading_thread_arrive(bag, cells):
    def refuse(block):
        if block.start == 20:
            msg = "bad block"
            raise ValueError(msg)

    with pytest.raises(ValueError, match="bad block"):
        run(bag, cells, check=refuse, block_size=10)


def test_options_per_cell_follow_their_cells(bag, cells):
    shift = np.linspace(0, 2, 60).astype(np.float32)
    whole = run(bag, cells, options={"shift": shift}, block_size=60).array
    parts = run(bag, cells, options={"shift": shift}, block_size=7).array
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert not np.allclose(whole, run(bag, cells).array, equal_nan=True)


def test_options_are_checked(bag):
    with pytest.raises(TypeError, match="bag has no option 'scales'; its tokenizer takes rng, scale, shift"):
        engine.check_options(bag, {"scales": 2}, 60)
    with pytest.raises(ValueError, match="shift must have one entry for each of the 60 cells; it has 59"):
        engine.check_options(bag, {"shift": np.zeros(59)}, 60)
    engine.check_options(bag, {"scale": 2, "shift": np.zeros(60)}, 60)


def test_prepare_sees_all_cells_once(bag, cells, monkeypatch):
    seen = []

    def prepare(self, blocks, match, options):
        seen.append(sum(block.sum() for block in blocks))
        return {**options, "scale": 2.0}

    monkeypatch.setattr(type(bag), "prepare", prepare)
    got = run(bag, cells, block_size=9).array
    assert seen == [cells.X.sum()]
    monkeypatch.undo()
    np.testing.assert_allclose(got, run(bag, cells, options={"scale": 2.0}).array, atol=1e-6)


def test_block_size_is_bounded_by_the_results(cells):
    source = open_source(cells)
    assert _memory.choose_block_size(source, (512,)) == 2048
    assert _memory.choose_block_size(source, (19264, 512)) < 10


def test_sizes_must_be_positive(bag, cells):
    for name in ("block_size", "batch_size", "tokens_per_batch"):
        with pytest.raises(ValueError, match=name):
            run(bag, cells, **{name: 0})


def test_progress(bag, cells, capsys, monkeypatch):
    monkeypatch.setattr("scfm.engine._progress._PATIENCE", 0)

    def slow(backbone, tokens):
        time.sleep(0.06)
        return backbone.embed(tokens)

    run(bag, cells, slow, progress=None, block_size=10)
    assert re.search(r"bag: +\d+%.* [1-9]\d*/60 .*<.*cells/s", capsys.readouterr().err)
    for arguments in ({"progress": False}, {"progress": None}):
        run(bag, cells, slow, block_size=10, **arguments)
        assert capsys.readouterr().err == ""
        scfm.settings.verbosity = 1  # the second time the setting decides
