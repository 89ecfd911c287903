"""What happens to every kind of matrix and every kind of gene name that a user may bring."""

from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

import scfm
from scfm.tl import embed


def embedding(adata, model, **arguments) -> np.ndarray:
    return embed(adata, model, copy=True, progress=False, **arguments).obsm[f"X_{model.name}"]


def with_values(adata, function) -> ad.AnnData:
    out = adata.copy()
    out.X = sparse.csr_matrix(function(adata.X.toarray()).astype(np.float32))
    return out


# -- values --------------------------------------------------------------------------------------------------------------


def set_entry(value):
    def change(x):
        x[20, 1] = value
        return x

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry(-1), "adata.X does not hold what .* needs: it holds 1 negative values"),
        (set_entry(np.nan), "adata.X does not hold what .* needs: it holds 1 NaN"),
        (set_entry(np.inf), "adata.X does not hold what .* needs: it holds 0 NaN and 1 infinite"),
        (lambda x: x - x.mean(0), "they look scaled.*layer="),
    ],
    ids=["negative", "NaN", "infinite", "scaled"],
)
def test_values_that_no_model_takes(adata, model, change, message, tmp_path):
    broken = with_values(adata, change)
    with pytest.raises(ValueError, match=message):
        embed(broken, model, block_size=8)
    assert not broken.obsm
    assert not broken.uns
    broken.layers["spliced"] = broken.X
    broken.X = adata.X
    with pytest.raises(ValueError, match="layer 'spliced' does not hold"):
        embed(broken, model, layer="spliced")
    broken.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="layer 'spliced' of cells.h5ad does not hold"):
        embed(tmp_path / "cells.h5ad", model, layer="spliced")


def test_whole_numbers_as_floats(adata, model):
    np.testing.assert_array_equal(embedding(with_values(adata, np.float64), model), embedding(adata, model))


def test_the_option_for_normalised_values_is_named(adata, model):
    if model.kind == "scgpt":
        pytest.skip("takes both")
    normalised = with_values(adata, lambda x: np.log1p(x * 1.37))
    with pytest.raises(ValueError, match=f"say so: {model.normalized_option}"):
        embed(normalised, model)
    name, value = model.normalized_option.split("=")
    embed(normalised, model, **{name: True if value == "True" else value.strip("'")})
    assert np.isfinite(normalised.obsm[f"X_{model.name}"]).all()


def test_fractions(adata, scgpt, scfoundation, capsys):
    estimated = with_values(adata, lambda x: x * 1.37)
    with pytest.raises(ValueError, match=r"not whole numbers.*layer="):
        embed(estimated, scfoundation)
    capsys.readouterr()
    assert np.isfinite(embedding(estimated, scgpt)).all()
    assert "not whole numbers" in capsys.readouterr().err


def test_log_normalised(adata, scgpt, scfoundation, capsys):
    logs = adata.copy()
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    with pytest.raises(ValueError, match=r"log-normalised to 10,000 per cell.*recover_counts"):
        embed(logs, scfoundation)
    capsys.readouterr()
    assert np.isfinite(embedding(logs, scgpt)).all()
    assert "log-normalised" in capsys.readouterr().err
    embed(logs, scfoundation, pre_normalized=True)
    assert "WARNING" not in capsys.readouterr().err
    embed(adata, scfoundation, pre_normalized=True)
    assert "holds whole numbers, although" in capsys.readouterr().err


def test_wrong_values_late_in_a_file_leave_no_finished_result(adata, scgpt, tmp_path):
    broken = with_values(adata, lambda x: np.where(np.arange(37)[:, None] == 36, -x, x))
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            embed(broken, scgpt, block_size=8, out=tmp_path / "out.zarr")


# -- cells ---------------------------------------------------------------------------------------------------------------


def test_cells_without_any_known_gene(adata, model, capsys):
    some = with_values(adata, lambda x: x * (np.arange(37)[:, None] != 4))
    only_unknown = some.X.toarray()
    only_unknown[9, :50] = 0
    only_unknown[9, 50:] = 2
    some.X = sparse.csr_matrix(only_unknown)
    capsys.readouterr()
    got = embedding(some, model, block_size=10)
    assert f"2 of 37 cells have no expressed gene that {model.name} knows" in capsys.readouterr().err
    assert np.isnan(got[[4, 9]]).all()
    others = np.delete(np.arange(37), [4, 9])
    np.testing.assert_allclose(got[others], embedding(adata, model)[others], atol=2e-6)


def test_all_cells_empty(adata, model):
    assert np.isnan(embedding(with_values(adata, np.zeros_like), model)).all()


def test_cell_with_one_gene(adata, model):
    one = with_values(adata, lambda x: np.where(np.arange(x.shape[1]) == 4, 3, 0) + 0 * x)
    got = embedding(one[:2].copy(), model)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)


def test_no_cells(adata, model):
    empty = adata[:0].copy()
    assert embedding(empty, model).shape == (0, model.embedding_dim())
    assert list(embed(empty, model, copy=True).uns) == [model.name]


def test_no_genes(adata, model):
    with pytest.raises(ValueError, match="no genes"):
        embed(adata[:, :0].copy(), model)


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_no_known_gene(adata, model):
    with pytest.raises(ValueError, match=f"none of the 6 genes of the data .* of {model.name}"):
        embed(adata[:, 50:].copy(), model)


def test_mouse_symbols(adata, model):
    mouse = adata.copy()
    mouse.var_names = [f"Gene{i}" for i in range(56)]
    with pytest.raises(ValueError, match="mouse.*orthologs"):
        embed(mouse, model)


def test_few_known_genes(adata, model, capsys):
    few = adata.copy()
    few.var_names = [name if i < 12 else f"LNC{i}" for i, name in enumerate(adata.var_names)]
    capsys.readouterr()
    got = embedding(few, model)
    assert f"WARNING: only {12 / 56:.1%} of the expressed genes are known to {model.name}." in capsys.readouterr().err
    assert got.shape[0] == 37


def test_genes_that_are_not_expressed_do_not_count(adata, model, capsys):
    silent = sparse.csr_matrix((37, 300), dtype=np.float32)
    wide = ad.AnnData(sparse.hstack([adata.X, silent], format="csr"), obs=adata.obs)
    wide.var_names = [*adata.var_names, *(f"SILENT{i}" for i in range(300))]
    embed(wide, model)
    assert "WARNING" not in capsys.readouterr().err


def test_old_symbols(adata, model, tmp_path):
    renamed = adata.copy()
    renamed.var_names = ["OLD7" if name == "GENE7" else name for name in adata.var_names]
    (tmp_path / "hgnc.txt").write_text("symbol\tprev_symbol\nGENE7\tOLD7\n")
    out = embed(renamed, model, aliases=tmp_path / "hgnc.txt", copy=True)
    assert out.uns[model.name]["genes"]["renamed"] == 1
    np.testing.assert_allclose(out.obsm[f"X_{model.name}"], embedding(adata, model), atol=1e-6)
    # the table in the cache is used without being named, unless it is switched off
    scfm.settings.cachedir.mkdir(parents=True, exist_ok=True)
    (tmp_path / "hgnc.txt").rename(scfm.settings.cachedir / "hgnc_complete_set.txt")
    np.testing.assert_allclose(embedding(renamed, model), embedding(adata, model), atol=1e-6)
    assert embed(renamed, model, aliases=False, copy=True).uns[model.name]["genes"]["matched"] == 49


# -- objects -------------------------------------------------------------------------------------------------------------


def test_missing_layer_and_columns(adata, model):
    adata.layers["raw_counts"] = adata.X
    with pytest.raises(KeyError, match="no layer 'counts'; layers: 'raw_counts'"):
        embed(adata, model, layer="counts")
    with pytest.raises(KeyError, match="gene_symbols='symbol'"):
        embed(adata, model, gene_symbols="symbol")


def test_mudata(adata, model):
    other = adata.copy()
    other.var_names = [f"prot{i}" for i in range(56)]
    mdata = mudata.MuData({"rna": adata, "prot": other})
    with pytest.raises(TypeError, match=r"mdata\['rna'\]"):
        embed(mdata, model)
    embed(mdata["rna"], model)
    assert f"X_{model.name}" in mdata["rna"].obsm


def test_view_of_a_backed_object_is_refused_before_the_work(adata, model, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    view = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")[:10]
    with pytest.raises(ValueError, match=r"to_memory\(\)"):
        embed(view, model)


def test_missing_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="cells.h5ad"):
        embed(tmp_path / "cells.h5ad", model)


def test_unknown_model(adata):
    with pytest.raises(ValueError, match="scgtp"):
        embed(adata, "scgtp")
