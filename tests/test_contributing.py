"""The worked recipe of CONTRIBUTING.md runs as it stands there."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scfm.backbones import _kinds
from scfm.checkpoints import _registry

ROOT = Path(__file__).parents[1]
GENES = ["CD3E", "LYZ", "MS4A1", "NKG7"]


@pytest.fixture
def genebag(tmp_path, monkeypatch) -> Path:
    """Install the recipe's package for one test; gives an official checkpoint folder of it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(
        r"^### \d\. `backbones/genebag/(\w+\.py)`.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    package = tmp_path / "site" / "genebag"
    package.mkdir(parents=True)
    for name, code in blocks:
        (package / name).write_text(code)
    info = tmp_path / "site" / "genebag-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: genebag\nVersion: 1.0\n")
    points = "[scfm.backbones]\ngenebag = genebag:GeneBagBackbone\n\n[scfm.registries]\ngenebag = genebag\n"
    (info / "entry_points.txt").write_text(points)
    (package / "registry.json").write_text(re.search(r"```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1])
    monkeypatch.syspath_prepend(package.parent)
    _forget()

    official = tmp_path / "official"
    official.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding.weight": (len(GENES) + 1, 8),
        "mlp.0.weight": (8, 8),
        "mlp.0.bias": (8,),
        "mlp.2.weight": (8, 8),
        "mlp.2.bias": (8,),
        "optimizer.step": (1,),
    }
    torch.save({k: torch.randn(s, generator=generator) for k, s in shapes.items()}, official / "genebag.pt")
    (official / "genes.txt").write_text("\n".join(GENES))
    yield official
    for name in [name for name in sys.modules if name.partition(".")[0] == "genebag"]:
        del sys.modules[name]
    _forget()


def _forget() -> None:
    _kinds._entry_points.cache_clear()
    _kinds.backbone_class.cache_clear()
    _registry.entries.cache_clear()
    _registry._names.cache_clear()


def test_recipe_of_the_fifth_model(genebag, tmp_path):
    import scfm

    backbone = scfm.load(genebag, device="cpu", precision="float32")
    assert backbone.kind == "genebag"
    assert list(backbone.load_report.dropped) == ["optimizer.step"]

    counts = csr_matrix(np.array([[3.0, 0, 1, 0, 5], [0, 0, 0, 0, 2], [0, 7, 0, 0, 0]]))
    tokens = backbone.tokenize(counts, ["NKG7", "LYZ", "CD3E", "MS4A1", "unknown"])
    cells = backbone.embed(tokens)
    assert cells.shape == (3, 8)
    assert torch.isnan(cells[1]).all()

    # by the formula of the recipe: weighted mean of gene vectors, then the small network
    weights = np.log1p(1e4 * np.array([3, 1]) / 4)
    vectors = backbone.gene_embeddings()[[backbone.vocab["NKG7"], backbone.vocab["CD3E"]]]
    mean = torch.tensor(weights / weights.sum(), dtype=torch.float32) @ vectors
    torch.testing.assert_close(cells[0], backbone.module.cell(mean))

    assert backbone.reconstruct(tokens.select([0, 2])).shape == (2, len(backbone.vocab))
    generator = torch.Generator().manual_seed(0)
    loss = backbone.pretraining_loss(tokens.select([0, 2]), generator, share=1.0)
    assert loss.n_hidden == 3
    assert loss.total > 0
    with pytest.raises(scfm.UnsupportedError, match="scgpt"):
        backbone.attention(tokens)

    again = scfm.load(backbone.save(tmp_path / "saved"), device="cpu", precision="float32")
    torch.testing.assert_close(again.embed(tokens), cells, rtol=0, atol=0, equal_nan=True)


def test_recipe_with_every_tool_and_by_its_name(genebag):
    import anndata as ad

    import scfm

    assert "genebag" in set(scfm.checkpoints.list()["name"])
    adata = ad.AnnData(csr_matrix(np.array([[3.0, 0, 1], [0, 2, 0]])))
    adata.var_names = ["NKG7", "LYZ", "CD3E"]
    with pytest.raises(scfm.OfflineError, match=r"genebag\.pt"):
        scfm.tl.embed(adata, model="genebag")
    shutil.copytree(genebag, scfm.checkpoints.info("genebag").directory)
    scfm.tl.embed(adata, model="genebag")
    assert adata.obsm["X_genebag"].shape == (2, 8)
    assert np.isfinite(adata.obsm["X_genebag"]).all()
    assert adata.uns["genebag"]["checkpoint"]["licence"] == "MIT"

    scfm.tl.gene_embeddings(adata, model="genebag")
    assert np.isfinite(adata.varm["genebag"]).all()
    scfm.tl.reconstruct(adata, model="genebag")
    assert adata.layers["genebag_reconstructed"].nnz == 3
    with pytest.raises(scfm.UnsupportedError, match="scgpt"):
        scfm.tl.gene_embeddings(adata, model="genebag", contextual=True)


def test_a_broken_registry_of_another_package_is_left_out(genebag, caplog):
    import scfm

    (Path(genebag).parent / "site" / "genebag" / "registry.json").write_text("{")
    _forget()
    assert "genebag" not in set(scfm.checkpoints.list()["name"])
    assert "scgpt" in set(scfm.checkpoints.list()["name"])
    assert "genebag" in caplog.text
