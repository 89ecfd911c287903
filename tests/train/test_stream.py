"""Counts of many files as micro-batches."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scfm.backbones import backbone_class, from_config
from scfm.genes import GeneVocab
from scfm.train._cells import Cells
from scfm.train._order import Order
from scfm.train._stream import Stream

GENES = ["A", "B", "C", "D"]
VOCAB = GeneVocab(["<pad>", *GENES], specials=["<pad>"])


@pytest.fixture
def mixed(tmp_path):
    """CSR in HDF5, CSC in zarr, dense in memory; other orders of genes, unknown genes, one gene twice."""
    rng = np.random.default_rng(0)
    names = [["D", "X", "A", "B", "C"], ["C", "A", "Y", "D"], ["A", "B", "B", "C", "Z"]]
    dense = [rng.poisson(1.0, (n, len(genes))).astype(np.float32) for n, genes in zip((20, 30, 25), names, strict=True)]
    parts = [AnnData(sparse.csr_matrix(dense[0])), AnnData(sparse.csc_matrix(dense[1])), AnnData(dense[2])]
    for part, genes in zip(parts, names, strict=True):
        part.var_names = genes
    parts[0].write_h5ad(tmp_path / "a.h5ad")
    parts[1].write_zarr(tmp_path / "b.zarr")
    expected = np.zeros((75, 5), dtype=np.float32)  # no source has more than one unknown gene
    start = 0
    for counts, genes in zip(dense, names, strict=True):
        for column, gene in enumerate(genes):
            target = GENES.index(gene) if gene in GENES else 4
            expected[start : start + len(counts), target] += counts[:, column]
        start += len(counts)
    return [tmp_path / "a.h5ad", str(tmp_path / "b.zarr"), parts[2]], expected


@pytest.mark.parametrize("in_memory", [True, False])
def test_counts_of_all_sources_over_the_vocabulary(mixed, in_memory):
    sources, expected = mixed
    cells = Cells(sources, VOCAB, in_memory=in_memory)
    assert cells.n_cells == 75
    rows = np.array([0, 3, 4, 19, 20, 49, 50, 74])
    counts = cells.read(rows)
    np.testing.assert_array_equal(counts.toarray(), expected[rows])
    np.testing.assert_array_equal(cells.known_genes(counts), (expected[rows, :4] > 0).sum(1))
    assert cells.genes.ids.tolist() == [1, 2, 3, 4, -1]
    assert (cells.lengths() >= (expected > 0).sum(1)).all()


def test_values_that_are_no_counts_are_refused_by_name(tmp_path):
    adata = AnnData(sparse.csr_matrix(np.full((3, 2), 0.5, dtype=np.float32)))
    adata.var_names = ["A", "B"]
    adata.write_h5ad(tmp_path / "normalised.h5ad")
    with pytest.raises(ValueError, match=r"raw counts, but X of normalised.h5ad"):
        Cells([tmp_path / "normalised.h5ad"], VOCAB)


def test_tokens_are_those_of_the_whole_matrix():
    """Also for models whose values contain the counts of genes they do not know."""
    rng = np.random.default_rng(0)
    adata = AnnData(sparse.csr_matrix(rng.poisson(2.0, (12, 12)).astype(np.float32)))
    adata.var_names = [f"G{i}" for i in range(8)] + [f"OTHER{i}" for i in range(4)]
    cls = backbone_class("sclong")
    vocab = GeneVocab([*cls.specials, *(f"G{i}" for i in range(8))], specials=cls.specials)
    config = {"n_positions": 9, "top_length": 3, "dim": 12, "large_dim": 12, "n_edges": 0}
    sizes = {
        f"{stack}_{name}": 1 + (name == "dim_head")
        for stack in ("large", "mini", "decoder")
        for name in ("depth", "heads", "dim_head")
    }
    backbone = from_config("sclong", cls.config_from_dict(config | sizes), vocab)
    cells = Cells([adata], vocab)
    generator = torch.Generator().manual_seed(0)
    streamed = backbone.tokenize_for_training(cells.read(np.arange(12)), cells.genes, generator)
    direct = backbone.tokenize_for_training(adata.X, np.array(adata.var_names), generator)
    assert torch.equal(streamed.flat_ids, direct.flat_ids)
    torch.testing.assert_close(streamed.flat_values, direct.flat_values)


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_micro_batch_holds_its_cells(mixed, world_size):
    sources, expected = mixed
    cells = Cells(sources, VOCAB, in_memory=False)
    order = Order(np.arange(75), lanes=2, batch_size=6, buffer_cells=24)
    wanted = {visit.number: visit.rows for visit in islice(order.visits(range(2)), 30)}
    got = {}
    for rank in range(world_size):
        stream = Stream(cells, order, rank, world_size)
        got |= {batch.number: batch.cells.toarray() for batch in islice(stream, 30 // world_size)}
        stream.close()
    assert got.keys() == wanted.keys()
    for number, rows in wanted.items():
        kept = expected[np.sort(rows)]
        np.testing.assert_array_equal(got[number], kept[(kept[:, :4] > 0).any(1)])


def test_nothing_before_the_first_step_is_read(mixed, monkeypatch):
    sources, _ = mixed
    cells = Cells(sources, VOCAB, in_memory=False)
    order = Order(np.arange(75), lanes=1, batch_size=5, buffer_cells=15)
    read = []
    monkeypatch.setattr(
        Cells, "read", lambda self, rows, original=Cells.read: read.append(rows) or original(self, rows)
    )
    stream = Stream(cells, order, first_step=10)
    first = next(iter(stream))
    stream.close()
    assert first.number == 10
    epoch = order.epoch(0)
    assert 1 <= len(read) <= 2  # the buffer of step 10, and perhaps the next
    np.testing.assert_array_equal(read[0], epoch.buffer_cells(0, 3))


@pytest.mark.slow
def test_processes_that_read_change_nothing(files):
    cells = Cells(files, GeneVocab([f"G{i}" for i in range(30)]), in_memory=False)
    order = Order(np.arange(160), lanes=2, batch_size=8, buffer_cells=32)
    batches = []
    for readers in (0, 2):
        stream = Stream(cells, order, readers=readers)
        batches.append([batch.cells.toarray() for batch in islice(stream, 12)])
        stream.close()
    for alone, helped in zip(*batches, strict=True):
        np.testing.assert_array_equal(alone, helped)
