"""``scfm.pp.match_genes``: what it writes, and from where it takes names."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scfm
from scfm.genes import GeneVocab

VOCAB = GeneVocab(["<pad>", "TP53", "ACTB", "SEPTIN7", "PTEN"], specials=["<pad>"])
IDS = {"TP53": "ENSG00000141510", "ACTB": "ENSG00000075624", "PTEN": "ENSG00000171862"}


def make(names, **columns):
    return ad.AnnData(np.ones((2, len(names)), dtype=np.float32), var=pd.DataFrame(columns, index=list(names)))


@pytest.fixture
def hgnc(tmp_path):
    path = tmp_path / "hgnc.tsv"
    path.write_text(
        "symbol\tprev_symbol\talias_symbol\tensembl_gene_id\n"
        "SEPTIN7\tSEPT7\t\tENSG00000122545\n" + "".join(f"{name}\t\t\t{id_}\n" for name, id_ in IDS.items())
    )
    return path


def test_writes_names_and_record(hgnc):
    adata = make(["PTEN", "SEPT7", "XIST", "<pad>"])
    assert scfm.pp.match_genes(adata, VOCAB, aliases=hgnc) is None
    assert adata.var["scfm_gene"].tolist() == ["PTEN", "SEPTIN7", "", ""]
    assert adata.var["scfm_match"].astype(object).fillna("").tolist() == ["symbol", "alias", "", ""]
    record = adata.uns["match_genes"]
    assert (record["n_genes"], record["n_matched"], record["n_vocabulary"]) == (4, 2, 4)
    assert (record["gene_symbols"], record["gene_ids"]) == ("index", "")


def test_result_can_be_stored(hgnc, tmp_path):
    adata = make(["PTEN", "XIST"])
    scfm.pp.match_genes(adata, VOCAB, aliases=hgnc)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.var["scfm_gene"].tolist() == ["PTEN", ""]
    assert again.uns["match_genes"]["n_matched"] == 1


def test_copy_and_key(hgnc):
    adata = make(["PTEN"])
    out = scfm.pp.match_genes(adata, VOCAB, key_added="mine", copy=True)
    assert out.var["mine"].tolist() == ["PTEN"]
    assert out.var["mine_how"].tolist() == ["symbol"]
    assert "mine" in out.uns
    assert "mine" not in adata.var


def test_view_becomes_its_own_object():
    adata = make(["PTEN", "ACTB", "XIST"])
    view = adata[:, 1:]
    with pytest.warns(ad.ImplicitModificationWarning):
        scfm.pp.match_genes(view, VOCAB)
    assert view.var["scfm_gene"].tolist() == ["ACTB", ""]
    assert "scfm_gene" not in adata.var


def test_ensembl_index_with_symbol_column():
    adata = make([IDS["TP53"], f"{IDS['ACTB']}.12"], feature_name=["TP53", "ACTB"])
    scfm.pp.match_genes(adata, VOCAB)
    assert adata.var["scfm_gene"].tolist() == ["TP53", "ACTB"]
    assert adata.uns["match_genes"]["gene_symbols"] == "feature_name"


def test_ensembl_index_with_versions_needs_the_table(hgnc):
    adata = make([f"{IDS['TP53']}.18", "ACTB"])  # mixed names
    scfm.pp.match_genes(adata, VOCAB, aliases=hgnc)
    assert adata.var["scfm_gene"].tolist() == ["TP53", "ACTB"]
    with pytest.raises(ValueError, match=r"human Ensembl ids.*gene_symbols=.*aliases="):
        scfm.pp.match_genes(make(IDS.values()), VOCAB)


def test_the_table_of_the_cache_is_used_unless_forbidden(hgnc):
    scfm.settings.cachedir.mkdir(parents=True)
    (scfm.settings.cachedir / "hgnc_complete_set.txt").write_text(hgnc.read_text())
    adata = make(["SEPT7", "PTEN"])
    scfm.pp.match_genes(adata, VOCAB)
    assert adata.var["scfm_gene"].tolist() == ["SEPTIN7", "PTEN"]
    assert "4 approved symbols" in adata.uns["match_genes"]["aliases"]
    scfm.pp.match_genes(adata, VOCAB, aliases=False)
    assert adata.var["scfm_gene"].tolist() == ["", "PTEN"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_duplicate_names_are_said(capsys):
    adata = make(["PTEN", "PTEN", "ACTB"])
    scfm.pp.match_genes(adata, VOCAB)
    assert "2 of them share 1 entry: PTEN" in capsys.readouterr().err
    assert adata.uns["match_genes"]["n_sharing_an_entry"] == 2


def test_few_known_genes_warn(capsys):
    scfm.pp.match_genes(make(["PTEN", "x", "y"]), VOCAB)
    err = capsys.readouterr().err
    assert err.startswith("WARNING: 1 of 3 genes (33.3%)")


def test_mouse_symbols_raise_with_the_reason():
    with pytest.raises(ValueError, match=r"none of the 3 genes.*mouse symbols.*orthologs"):
        scfm.pp.match_genes(make(["Pten", "Actb", "Trp53"]), VOCAB)


def test_missing_column_is_named():
    with pytest.raises(KeyError, match="gene_symbols='symbol'"):
        scfm.pp.match_genes(make(["PTEN"]), VOCAB, gene_symbols="symbol")


def test_a_loaded_model_gives_its_name():
    model = SimpleNamespace(name="toy", vocab=VOCAB)
    adata = make(["PTEN"])
    scfm.pp.match_genes(adata, model)
    assert adata.uns["match_genes"]["model"] == "toy"
    with pytest.raises(ValueError, match="genes of toy"):
        scfm.pp.match_genes(make(["nope"]), model)
