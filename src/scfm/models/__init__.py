"""Foundation models with the interface of scvi-tools."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

from ..backbones import backbone_kinds
from ._base import FoundationModel
from ._chemical import ChemicalPerturbation
from ._classifier import CellTypeClassifier
from ._gene_classifier import GeneClassifier
from ._integrator import BatchIntegrator
from ._multiome import MultiomeIntegrator
from ._perturbation import GeneticPerturbation
from ._regulatory_network import RegulatoryNetwork
from ._task import TaskModel
from ._transport import ChemicalTransport

__all__ = [
    "SCGPT",
    "BatchIntegrator",
    "CellFM",
    "CellTypeClassifier",
    "ChemicalPerturbation",
    "ChemicalTransport",
    "FoundationModel",
    "GeneClassifier",
    "GeneticPerturbation",
    "MultiomeIntegrator",
    "RegulatoryNetwork",
    "SCFoundation",
    "SCLong",
    "TaskModel",
    "model_class",
]


class SCGPT(FoundationModel):
    """scGPT (Cui et al., Nature Methods 2024) with the interface of scvi-tools models.

    See :class:`scfm.models.FoundationModel`.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.SCGPT.setup_anndata(adata, layer="counts")  # doctest: +SKIP
    >>> model = scfm.models.SCGPT(adata, checkpoint="scgpt-mini")  # doctest: +SKIP
    >>> model.train(max_epochs=5)  # doctest: +SKIP
    >>> adata.obsm["X_tuned"] = model.get_latent_representation()  # doctest: +SKIP
    """

    kind: ClassVar[str] = "scgpt"


class SCFoundation(FoundationModel):
    """scFoundation (Hao et al., Nature Methods 2024) with the interface of scvi-tools models.

    See :class:`scfm.models.FoundationModel`; ``weights="gene"`` and the like choose among the weights of the official file.
    """

    kind: ClassVar[str] = "scfoundation"


class CellFM(FoundationModel):
    """CellFM (Zeng et al., Nature Communications 2025) with the interface of scvi-tools models.

    See :class:`scfm.models.FoundationModel`.
    """

    kind: ClassVar[str] = "cellfm"


class SCLong(FoundationModel):
    """scLong (Bai et al., Nature Communications 2026) with the interface of scvi-tools models.

    See :class:`scfm.models.FoundationModel`.
    """

    kind: ClassVar[str] = "sclong"


@cache
def model_class(kind: str) -> type[FoundationModel]:
    """Model class of any installed backbone, those of other packages included.

    Parameters
    ----------
    kind
        Name of the backbone class, see :func:`scfm.backbones.backbone_kinds`.

    Raises
    ------
    KeyError
        If no such backbone is installed.

    Examples
    --------
    >>> import scfm
    >>> scfm.models.model_class("scgpt").__name__
    'SCGPT'
    """
    if kind not in backbone_kinds():
        msg = f"no backbone class {kind!r} is installed; there are {', '.join(backbone_kinds()) or 'none'}"
        raise KeyError(msg)
    for known in (SCGPT, SCFoundation, CellFM, SCLong):
        if known.kind == kind:
            return known
    return type(kind, (FoundationModel,), {"kind": kind, "__doc__": f"The backbone {kind!r} as a scvi-tools model."})
