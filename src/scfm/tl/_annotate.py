"""Cell types of new cells, learned from labelled ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from .. import __version__, _keys, _logging
from .._docs import shared_parameters
from ..models import CellTypeClassifier
from ..tasks.linear import linear_votes
from ..tasks.neighbors import Votes, check_k, find_neighbors, vote
from ._embedder import Embedder
from ._inputs import check_can_hold_results, load_backbone, seed_of, storable
from ._labels import Labels, write_labels

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from .._settings import Precision
    from ._inputs import Aliases, Model

_METHODS = ("knn", "linear", "finetune")
_K = 10


@shared_parameters
def annotate(
    adata: AnnData,
    reference: AnnData | CellTypeClassifier | str | os.PathLike[str],
    *,
    labels_key: str | None = None,
    model: Model = "scgpt",
    method: Literal["knn", "linear", "finetune"] = "knn",
    key_added: str | None = None,
    min_confidence: float | None = None,
    k: int = _K,
    class_weight: Literal["balanced"] | None = None,
    head: str | None = None,
    split_by: str | None = None,
    train: Mapping[str, Any] | None = None,
    save_model: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    pooling: str | None = None,
    gene_symbols: str | None = None,
    gene_ids: str | None = None,
    aliases: Aliases = None,
    duplicates: Literal["sum", "keep", "error"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    block_size: int | None = None,
    rng: int | np.random.Generator = 0,
    progress: bool | None = None,
    copy: bool = False,
    **tokenize_options: Any,
) -> AnnData | None:
    """Label cells with the cell types of a reference.

    Three ways, from cheap to dear: a vote among the nearest reference cells (``"knn"``), a logistic regression
    (``"linear"``), both on embeddings of the model as it is, and a classifier for which the model itself is trained
    (``"finetune"``, see :class:`scfm.models.CellTypeClassifier`). Put the same question to
    :func:`scfm.benchmark.cells` before you trust an answer: on many data sets a logistic regression on highly variable
    genes is as good.

    Parameters
    ----------
    adata
        Annotated data to label.
    reference
        Annotated data with labels; or a trained :class:`scfm.models.CellTypeClassifier`, or the folder of a saved one,
        which then is all that is needed.
    labels_key
        Column of ``reference.obs`` with the labels. Cells without a label are left out.
    model
        As in :func:`scfm.tl.embed`.
    method
        See above.
    key_added
        Name of the results; by default ``"<labels_key>_predicted"``.
    min_confidence
        Cells with a lower confidence are rejected: their label is missing, while confidence and probabilities stay.
    k
        Neighbours for ``"knn"``.
    class_weight
        ``"balanced"`` gives all labels the same weight (``"linear"``).
    head
        Head of the classifier (``"finetune"``).
    split_by
        Column of ``reference.obs`` with donors, batches or studies; whole ones are held out while the classifier is
        trained (``"finetune"``).
    train
        Further arguments of :meth:`scfm.models.CellTypeClassifier.train`, such as ``{{"max_epochs": 5}}``.
    save_model
        Folder to save the trained classifier to.
    layer
        Layer with the counts, in both objects; by default ``X``.
    pooling
        As in :func:`scfm.tl.embed`.
    {genes_of_data}
    {compute}
    rng
        Seed of everything random.
    progress
        Whether to show a progress bar.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``, the same for all cells.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.obs["<labels_key>_predicted"]``
        Label, categorical with the categories of the reference. Missing for rejected cells, and for cells without any
        gene that the model knows.
    ``.obs["<labels_key>_predicted_confidence"]``
        Probability of the label: the share of the votes, or what the classifier gives.
    ``.obsm["<labels_key>_predicted_proba"]``
        Probabilities of all labels, a data frame.
    ``.uns["<labels_key>_predicted"]``
        Arguments, checkpoint, share of cells ``rejected`` and ``without_label``, and the ``labels``.

    Raises
    ------
    KeyError
        If a column or layer does not exist.
    TypeError
        If labels are numbers, or the reference is no AnnData or classifier.
    ValueError
        If there are no cells or fewer than two labels, an argument makes no sense, or the result would replace a column
        of ``adata``.
    UnsupportedError
        If the model has no cell embeddings.

    See Also
    --------
    scfm.tl.map_to_reference : More about neighbours: several columns, other votes, an atlas.
    scfm.pl.annotation : Confusion matrix.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.annotate(query, reference, labels_key="cell_type", model="scgpt")  # doctest: +SKIP
    >>> query.obs["cell_type_predicted"]  # doctest: +SKIP
    """
    check_can_hold_results(adata)
    if method not in _METHODS:
        msg = f"method must be one of {', '.join(_METHODS)}; got {method!r}"
        raise ValueError(msg)
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        msg = f"min_confidence is a probability between 0 and 1; got {min_confidence!r}"
        raise ValueError(msg)
    if not adata.n_obs:
        msg = "adata has no cells, so there is nothing to label"
        raise ValueError(msg)
    seed = seed_of(rng)
    classifier = _fitted(reference)
    if classifier is not None:
        method, labels_key = "finetune", labels_key or classifier.labels_key
    elif labels_key is None:
        msg = "labels_key= has to name the column of reference.obs with the labels"
        raise ValueError(msg)
    key = _free_key(adata, labels_key, key_added)
    adata = adata.copy() if copy else adata
    start = _logging.info(f"labelling {adata.n_obs:,} cells ({method})")
    params: dict[str, Any] = {"labels_key": labels_key, "method": method, "min_confidence": min_confidence, "rng": seed}
    if method == "finetune":
        if classifier is None:
            labels = Labels.of(reference.obs, labels_key, "the reference")
            names = {"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
            classifier = _trained(
                reference,
                labels_key,
                model,
                {"layer": layer} | names,
                {
                    "head": head,
                    "pooling": pooling,
                    "device": device,
                    "seed": seed,
                    "tokenize": tokenize_options or None,
                },
                {"split_by": split_by, "seed": seed} | dict(train or {}),
            )
        else:
            labels = Labels(np.zeros(0, np.int64), pd.Index(classifier.classes))
        if save_model is not None:
            classifier.save(save_model, overwrite=True)
        votes = _votes(classifier.predict(adata, soft=True, batch_size=batch_size), labels)
        params |= {"head": classifier.learner.style, "train": storable(dict(train or {}))}
        checkpoint = {"id": classifier.backbone.provenance.id, "licence": classifier.backbone.provenance.licence}
    else:
        labels = Labels.of(reference.obs, labels_key, "the reference")
        embedder = Embedder(
            load_backbone(model, device=device, precision=precision, weights=None),
            pooling=pooling,
            layer=layer,
            seed=seed,
            duplicates=duplicates,
            tokenize_options=tokenize_options,
            names={"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases},
            sizes={"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size},
            progress=progress,
        )
        embedder.check_comparable(adata, reference)
        known, found = embedder(reference, "the reference"), embedder(adata, "the query")
        votes = _from_embeddings(method, known.array, labels, found.array, k, class_weight)
        params |= {"k": k} if method == "knn" else {"class_weight": class_weight}
        checkpoint = found.record["checkpoint"]
        params["pooling"] = embedder.pooling
    rejected = np.zeros(adata.n_obs, bool) if min_confidence is None else votes.confidence < min_confidence
    record = {
        "params": {name: storable(value) for name, value in params.items() if value is not None},
        "checkpoint": checkpoint,
        "rejected": float(rejected.mean()),
        "without_label": float((votes.codes < 0).mean()),
        "scfm_version": __version__,
    }
    added = write_labels(adata, key, labels, votes, record, rejected=rejected)
    if n_missing := int((votes.codes < 0).sum()):
        _logging.warning(f"{n_missing:,} cells have no expressed gene that the model knows; they get no label")
    _logging.info("    finished", time=start, deep=f"added{added}")
    return adata if copy else None


def _fitted(reference: Any) -> CellTypeClassifier | None:
    """The classifier that was given, if one was."""
    if isinstance(reference, AnnData):
        if not reference.n_obs:
            msg = "the reference has no cells"
            raise ValueError(msg)
        return None
    if isinstance(reference, (str, os.PathLike)):
        return CellTypeClassifier.load(reference, adata=False)
    if not isinstance(reference, CellTypeClassifier):
        msg = (
            "reference must be an AnnData object with labels, a CellTypeClassifier or the folder of a saved one; got "
            f"{type(reference).__name__}"
        )
        raise TypeError(msg)
    if not reference.is_trained:
        msg = "the classifier is not trained yet; call its train() first"
        raise ValueError(msg)
    return reference


def _free_key(adata: AnnData, labels_key: str, key_added: str | None) -> str:
    """Name of the results; a column of the user is replaced only if its name was given."""
    key = key_added or _keys.predicted(labels_key)
    record = adata.uns.get(key)
    ours = hasattr(record, "keys") and "method" in record.get("params", {})
    if key_added is None and key in adata.obs and not ours:
        msg = f"obs has a column {key!r} already, which this function did not make; name the results with key_added="
        raise ValueError(msg)
    return key


def _trained(
    reference: AnnData,
    labels_key: str,
    model: Model,
    setup: dict[str, Any],
    options: dict[str, Any],
    train: dict[str, Any],
) -> CellTypeClassifier:
    """A classifier trained on the reference, which is left as it is."""
    data = reference.copy() if reference.is_view else AnnData(**_parts(reference, setup["layer"]))
    CellTypeClassifier.setup_anndata(data, labels_key=labels_key, **setup)
    classifier = CellTypeClassifier(data, checkpoint=model, **options)
    classifier.train(**train)
    return classifier


def _parts(adata: AnnData, layer: str | None) -> dict[str, Any]:
    """What a classifier needs of the reference, without copying counts."""
    if layer is not None and layer not in adata.layers:
        msg = f"the reference has no layer {layer!r}; there are {', '.join(adata.layers) or 'none'}"
        raise KeyError(msg)
    layers = {} if layer is None else {layer: adata.layers[layer]}
    return {"X": adata.X if layer is None else None, "obs": adata.obs.copy(), "var": adata.var.copy(), "layers": layers}


def _from_embeddings(
    method: str, known: np.ndarray, labels: Labels, found: np.ndarray, k: int, class_weight: str | None
) -> Votes:
    if method == "linear":
        return linear_votes(known, labels.codes, found, len(labels.categories), class_weight=class_weight)
    usable = (labels.codes >= 0) & np.isfinite(known).all(1)
    check_k(k, int(usable.sum()), "labelled cells with an embedding")
    neighbors = find_neighbors(known[usable], found, k)
    return vote(neighbors, labels.codes[usable], len(labels.categories))


def _votes(probabilities: pd.DataFrame, labels: Labels) -> Votes:
    """Probabilities of a classifier in the order of the categories of the reference."""
    table = probabilities.reindex(columns=list(map(str, labels.categories))).to_numpy(dtype=np.float32)
    known = np.isfinite(probabilities.to_numpy()).all(1)
    table[known] = np.nan_to_num(table[known])
    codes, confidence = np.full(len(table), -1, dtype=np.int64), np.full(len(table), np.nan)
    codes[known] = table[known].argmax(1)
    confidence[known] = table[known].max(1)
    return Votes(codes, confidence, table)
