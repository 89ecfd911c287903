"""Cell types of new cells, learned from labelled ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from .. import _keys, _logging
from .._docs import shared_parameters
from .._label_names import label_names
from ..models import CellTypeClassifier
from ..tasks.linear import linear_votes
from ..tasks.neighbors import Votes, check_k, find_neighbors, vote
from ._embedder import Embedder
from ._inputs import check_can_hold_results, load_backbone, result_name, run_record, seed_of, storable
from ._labels import Labels, write_labels

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from .. import engine
    from .._settings import Precision
    from ._inputs import Aliases, Model

_METHODS = ("knn", "linear", "finetune")
_MODEL = "scgpt"
_K = 10
_BELONGS = {"knn": ("k",), "linear": ("class_weight",), "finetune": ("head", "split_by", "train", "save_model")}
_DATA_SUFFIXES = (".h5ad", ".h5mu", ".h5", ".zarr", ".loom", ".csv")


@shared_parameters
def annotate(
    adata: AnnData,
    reference: AnnData | CellTypeClassifier | str | os.PathLike[str],
    *,
    labels_key: str | None = None,
    model: Model | None = None,
    method: Literal["knn", "linear", "finetune"] | None = None,
    key_added: str | None = None,
    min_confidence: float | None = None,
    k: int | None = None,
    class_weight: Literal["balanced"] | None = None,
    head: str | None = None,
    split_by: str | None = None,
    train: Mapping[str, Any] | None = None,
    save_model: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    pooling: str | None = None,
    weights: str | None = None,
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
        Column of ``reference.obs`` with the labels: text, categories or whole numbers. Cells without a label are left out.
        Beside a trained classifier it only names the results.
    model
        As in :func:`scfm.tl.embed`; by default ``"scgpt"``.
    method
        See above; by default ``"knn"``. A trained classifier is one of ``"finetune"``.
    key_added
        Name of the results; by default ``"<labels_key>_predicted"``.
    min_confidence
        Cells with a lower confidence are rejected: their label is missing, while confidence and probabilities stay.
    k
        Neighbours for ``"knn"``; by default 10.
    class_weight
        ``"balanced"`` gives all labels the same weight (``"linear"``).
    head
        Head of the classifier (``"finetune"``).
    split_by
        Column of ``reference.obs`` with donors, batches or studies; whole ones are held out while the classifier is
        trained (``"finetune"``).
    train
        Further arguments of :meth:`scfm.models.CellTypeClassifier.train`, such as ``{{"max_epochs": 5}}``
        (``"finetune"``).
    save_model
        Folder to save the trained classifier to (``"finetune"``).
    layer
        Layer with the counts, in both objects; by default ``X``, or the layer that a trained classifier was set up with
        (``"X"`` then stands for ``X``).
    pooling
        As in :func:`scfm.tl.embed`; for ``"finetune"`` what the heads ``"mlp"`` and ``"linear"`` start from.
    weights
        Which weights of a checkpoint that holds several; by default those the authors take for embeddings, and for
        ``"finetune"`` those they fine-tune.
    {genes_of_data}
    {compute}
    rng
        Seed of everything random.
    progress
        Whether to show a progress bar.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``, the same for all cells; for ``"finetune"`` beside or instead of those of the
        paper.

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
        Arguments (``params``), checkpoint (the one that training started from), genes matched, share of cells ``rejected``
        and ``without_label``, and the ``labels``.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    KeyError
        If a column or layer does not exist.
    TypeError
        If labels are fractions, the reference is no AnnData or classifier, or the model's tokenizer has no such option.
    ValueError
        If there are no cells or fewer than two labels, an argument makes no sense or belongs to another method, or the
        result would replace a column of ``adata``.
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
    given = {
        name: value
        for name, value in {
            "method": method,
            "model": model,
            "weights": weights,
            "k": k,
            "class_weight": class_weight,
            "head": head,
            "pooling": pooling,
            "split_by": split_by,
            "train": train,
            "save_model": save_model,
            "precision": None if precision in ("auto", "float32") else precision,
        }.items()
        if value is not None
    }
    _check_reference(reference)
    fitted = not isinstance(reference, AnnData)
    _check_arguments(given, fitted=fitted)
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        msg = f"min_confidence is a probability between 0 and 1; got {min_confidence!r}"
        raise ValueError(msg)
    for data, what in ((adata, "adata"), *(() if fitted else ((reference, "the reference"),))):
        if not data.n_obs:
            msg = f"{what} has no cells"
            raise ValueError(msg)
    seed = seed_of(rng)
    classifier = _fitted(reference, device) if fitted else None
    method = "finetune" if fitted else method or _METHODS[0]
    if fitted:
        labels_key = labels_key or classifier.labels_key
    elif labels_key is None:
        msg = "labels_key= has to name the column of reference.obs with the labels"
        raise ValueError(msg)
    key = _free_key(adata, labels_key, key_added)
    adata = adata.copy() if copy else adata
    start = _logging.info(f"labelling {adata.n_obs:,} cells ({method})")
    model = _MODEL if model is None else model
    inputs = {"layer": layer, "gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases}
    sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size}
    params: dict[str, Any] = {"labels_key": labels_key, "method": method, "min_confidence": min_confidence, "rng": seed}
    if fitted:
        labels = Labels(np.arange(0), pd.Index(classifier.classes))
    else:
        labels = Labels.of(reference.obs, labels_key, "the reference", whole_numbers=True)
    if method == "finetune":
        own = dict(tokenize_options) if duplicates is None else {**tokenize_options, "duplicates": duplicates}
        asked = own if fitted else {}
        if not fitted:
            classifier = _trained(
                reference,
                labels_key,
                inputs,
                {
                    "checkpoint": model,
                    "weights": weights,
                    "head": head,
                    "pooling": pooling,
                    "device": device,
                    "seed": seed,
                    "tokenize": own or None,
                },
                {"split_by": split_by, "seed": seed, **_progress_of_training(progress), **(train or {})},
            )
            params |= {"split_by": split_by, "train": dict(train or {}) or None}
        if save_model is not None:
            classifier.save(save_model, overwrite=True)
        learner = classifier.learner
        params |= {
            "head": learner.style,
            "pooling": classifier.backbone.check_pooling(learner.pooling) if learner.head is not None else None,
            "tokenize_options": {**learner.tokenize, **asked} or None,
        }
        with classifier._any_cells(adata, **inputs, **asked) as task:
            votes = _votes(classifier._probabilities(task, progress=progress, **sizes), labels)
            record = _record_of(classifier, task, params, layer)
    else:
        embedder = Embedder(
            load_backbone(model, device=device, precision=precision, weights=weights),
            pooling=pooling,
            seed=seed,
            duplicates=duplicates,
            tokenize_options=tokenize_options,
            layer=layer,
            names={name: value for name, value in inputs.items() if name != "layer"},
            sizes=sizes,
            progress=progress,
        )
        embedder.check_comparable(adata, reference)
        known, found = embedder(reference, "the reference"), embedder(adata, "the query")
        k = _K if k is None else k
        votes = _from_embeddings(method, known.array, labels, found.array, k, class_weight)
        params |= {"model": result_name(embedder.backbone), "class_weight": class_weight}
        params["k"] = k if method == "knn" else None
        record = {**found.record, "params": {**found.record["params"], **_stored(params)}}
    rejected = np.zeros(adata.n_obs, bool) if min_confidence is None else votes.confidence < min_confidence
    record |= {"rejected": float(rejected.mean()), "without_label": float((votes.codes < 0).mean())}
    added = write_labels(adata, key, labels, votes, record, rejected=rejected)
    if n_missing := int((votes.codes < 0).sum()):
        _logging.warning(f"{n_missing:,} cells have no expressed gene that the model knows; they get no label")
    _logging.info("    finished", time=start, deep=f"added{added}")
    return adata if copy else None


def _check_arguments(given: Mapping[str, Any], *, fitted: bool) -> None:
    """Refuse what the method, or a classifier that is trained already, would ignore.

    Parameters
    ----------
    given
        Arguments that were given and that not all methods have.
    fitted
        Whether the reference is a classifier.
    """
    method = given.get("method", _METHODS[0])
    if method not in _METHODS:
        msg = f"method must be one of {', '.join(_METHODS)}; got {method!r}"
        raise ValueError(msg)
    if fitted:
        # naming what it is, or where to save it, does no harm
        wrong = [name for name in given if name != "save_model" and (name, method) != ("method", "finetune")]
        if wrong:
            names = ", ".join(f"{name}=" for name in wrong)
            msg = f"the reference is a trained classifier, for which {names} cannot be chosen any more"
            raise ValueError(msg)
        return
    for other, names in _BELONGS.items():
        if other != method and (wrong := [name for name in names if name in given]):
            msg = f"{', '.join(f'{name}=' for name in wrong)} belongs to method={other!r}; the method is {method!r}"
            raise ValueError(msg)
    if method == "finetune" and "precision" in given:
        msg = f"precision={given['precision']!r}: a classifier is trained in float32; see train={{'precision': ...}}"
        raise ValueError(msg)


def _progress_of_training(progress: bool | None) -> dict[str, bool]:
    return {} if progress is None else {"enable_progress_bar": progress}


def _check_reference(reference: Any) -> None:
    """Raise for what is neither data nor a classifier, nor the folder of one."""
    if isinstance(reference, (str, os.PathLike)):
        path = Path(reference).expanduser()
        if path.is_file() or path.suffix in _DATA_SUFFIXES:
            msg = (
                f"{path} is no folder of a saved classifier; a reference with labels has to be read first, with "
                "anndata.read_h5ad or anndata.read_zarr"
            )
            raise ValueError(msg)
        if not path.exists():
            msg = f"{path} does not exist; give labelled data, a CellTypeClassifier, or the folder of a saved one"
            raise FileNotFoundError(msg)
    elif not isinstance(reference, (AnnData, CellTypeClassifier)):
        msg = (
            "reference must be an AnnData object with labels, a CellTypeClassifier or the folder of a saved one; got "
            f"{type(reference).__name__}"
        )
        raise TypeError(msg)


def _fitted(reference: CellTypeClassifier | str | os.PathLike[str], device: str) -> CellTypeClassifier:
    """The classifier that was given, or is saved in the folder."""
    if not isinstance(reference, CellTypeClassifier):
        reference = CellTypeClassifier.load(reference, adata=False)
    if not reference.is_trained:
        msg = "the classifier is not trained yet; call its train() first"
        raise ValueError(msg)
    if device != "auto":
        reference.to_device(device)
    return reference


def _record_of(
    classifier: CellTypeClassifier, task: engine.Task, params: dict[str, Any], layer: str | None
) -> dict[str, Any]:
    """What was done with a classifier; the checksum is that of the weights from which its training started."""
    backbone = classifier.backbone
    record = run_record(
        backbone, task.source.where, task.match, {**params, "layer": layer, "model": result_name(backbone)}
    )
    record["checkpoint"]["sha256"] = backbone.provenance.start_sha256
    return record


def _stored(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: storable(value) for name, value in params.items() if value is not None}


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
    setup: dict[str, Any],
    options: dict[str, Any],
    train: dict[str, Any],
) -> CellTypeClassifier:
    """A classifier trained on the reference, which is left as it is."""
    data = reference.copy() if reference.is_view else AnnData(**_parts(reference, setup["layer"]))
    CellTypeClassifier.setup_anndata(data, labels_key=labels_key, **setup)
    classifier = CellTypeClassifier(data, **options)
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
    table = probabilities.reindex(columns=label_names(labels.categories).to_list()).to_numpy(dtype=np.float32)
    known = np.isfinite(probabilities.to_numpy()).all(1)
    table[known] = np.nan_to_num(table[known])
    codes, confidence = np.full(len(table), -1, dtype=np.int64), np.full(len(table), np.nan)
    codes[known] = table[known].argmax(1)
    confidence[known] = table[known].max(1)
    return Votes(codes, confidence, table)
