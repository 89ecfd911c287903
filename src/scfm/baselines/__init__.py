"""What every result of a foundation model is compared with."""

from __future__ import annotations

from ._pca import hvg_pca
from ._scvi import scvi_latent

__all__ = ["hvg_pca", "scvi_latent"]
