"""The PCA baseline."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scipy import sparse

from scfm.baselines import hvg_pca


def test_pca_separates_groups_and_leaves_the_data_alone():
    rng = np.random.default_rng(0)
    rate = np.ones((60, 50))
    rate[:30, :10] *= 8
    adata = AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    before = adata.X.copy()
    out = hvg_pca(adata, n_top_genes=20)
    assert out.shape == (60, 19)
    assert out.dtype == np.float32
    assert (before != adata.X).nnz == 0
    first = out[:, 0]
    separation = abs(first[:30].mean() - first[30:].mean()) / first[:30].std()
    assert separation > 3
