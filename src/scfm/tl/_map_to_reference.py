"""Labels from the nearest cells of a reference."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from .. import __version__, _keys, _logging
from .._docs import shared_parameters
from .._optional import require
from ..tasks.atlas import AtlasIndex, is_atlas
from ..tasks.neighbors import check_choices, check_k, find_neighbors, vote
from ._embedder import Embedder, embedding_of
from ._inputs import check_can_hold_results, load_backbone, seed_of, storable
from ._labels import Labels, write_labels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from numpy.typing import NDArray

    from .._settings import Precision
    from ..tasks.neighbors import Index, Metric, Neighbors, Weights
    from ._inputs import Aliases, Model

_K, _K_ATLAS = 10, 50
_QUERY, _REFERENCE = "the query", "the reference"
_ATLAS = "atlas"


@shared_parameters
def map_to_reference(
    adata: AnnData,
    reference: AnnData | AtlasIndex | str | os.PathLike[str],
    labels_key: str | Sequence[str] | None = None,
    *,
    model: Model = "scgpt",
    use_rep: str | None = None,
    k: int | None = None,
    metric: Metric = "euclidean",
    weights: Weights = "uniform",
    index: Index = "exact",
    min_confidence: float | None = None,
    layer: str | None = None,
    pooling: str | None = None,
    key_added: str | Sequence[str] | None = None,
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
    """Give each cell the label that most of its nearest reference cells have.

    Both are embedded with the same model, as in the reference mapping of scGPT (Cui et al., Nature Methods 2024). An
    embedding that :func:`scfm.tl.embed` left in either object is used if its record names the same checkpoint and
    options; what is computed here is kept in ``adata``, unless that slot is taken, and never in the reference, so embed
    a large reference once.

    Parameters
    ----------
    adata
        Annotated data to label.
    reference
        Annotated data with labels; or an atlas, as :class:`scfm.tasks.atlas.AtlasIndex` or its folder (needs faiss).
    labels_key
        Column of ``reference.obs`` with labels, or several: text, categories, or booleans. Reference cells without a
        label are left out. An atlas has one set of labels, for which this is only a name; ``"atlas"`` by default.
    model
        As in :func:`scfm.tl.embed`. Of a checkpoint with several weight sets, give one from :func:`scfm.load`.
    use_rep
        Slot of ``obsm``, in both objects, to use instead of a model, which is not loaded then.
    k
        Number of neighbours; by default 10, and 50 in an atlas.
    metric
        ``"euclidean"`` or ``"cosine"``; an atlas has the former. For scGPT, whose embeddings have unit length, they
        give the same neighbours.
    weights
        ``"uniform"`` (majority), ``"distance"`` (votes divided by the distance) or ``"proportion"`` (divided by the
        label's proportion in the reference, as in the atlas mode of scGPT); see :func:`scfm.tasks.neighbors.vote`.
    index
        ``"exact"``, or ``"faiss"`` for candidates from a flat index of faiss; both find the same neighbours. An atlas
        has an index of its own.
    min_confidence
        Cells whose winning label has a smaller share of the votes than this are rejected: their label is missing, while
        confidence and probabilities stay. By default none is.
    layer
        Layer with the counts, in all objects that are embedded here; by default ``X``. If they lie in different places,
        call :func:`scfm.tl.embed` first.
    pooling
        As in :func:`scfm.tl.embed`.
    key_added
        Name of the results, one for each column of labels; by default ``"<labels_key>_mapped"``. A default name that
        is a column of ``adata.obs`` already is refused unless it comes from an earlier run; a name given here replaces
        what is there.
    {genes_of_data}
    {compute}
    rng
        Seed of random choices in the tokenizer; a generator gives one seed, which is recorded.
    progress
        Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2 and the run takes more
        than two seconds.
    copy
        Return a copy of ``adata`` with the results instead of changing ``adata``.
    **tokenize_options
        Options of the model's own ``tokenize``, the same for all cells.

    Returns
    -------
    ``None``, or a copy of ``adata`` if ``copy``. These are set:

    ``.obs["<labels_key>_mapped"]``
        Label, categorical with the categories of the reference. Missing for rejected cells, and for cells without any
        gene that the model knows.
    ``.obs["<labels_key>_mapped_confidence"]``
        Share of the votes for the winning label; NaN for cells that could not be embedded.
    ``.obsm["<labels_key>_mapped_proba"]``
        Share of the votes for every label, a data frame of float32; ``/`` in names of labels is ``_`` there.
    ``.uns["<labels_key>_mapped"]``
        Arguments (``params``), record of the ``embedding``, size of the ``reference``, share of cells ``rejected`` and
        ``without_label`` for lack of an embedding, and all ``labels`` in the order of the columns.
    ``.obsm["X_<model>"]``, ``.uns["<model>"]``
        Embedding and its record, as :func:`scfm.tl.embed` leaves them, if there was none.

    Raises
    ------
    FileNotFoundError
        If a folder is no atlas.
    KeyError
        If a column, layer or slot does not exist.
    MissingExtraError
        If faiss is needed and not installed.
    TypeError
        If labels are numbers, or the model's tokenizer has no such option.
    ValueError
        If there are no cells or no labels, widths do not fit, ``k`` is larger than the reference, the atlas was embedded
        in another way, or an argument is out of range.
    UnsupportedError
        If the model has no cell embeddings.

    See Also
    --------
    scfm.tl.embed : The embedding alone.
    scfm.tasks.atlas.AtlasIndex : An atlas of your own.

    Examples
    --------
    >>> import scfm
    >>> scfm.tl.map_to_reference(query, reference, "cell_type", model="scgpt")  # doctest: +SKIP
    >>> query.obs["cell_type_mapped"]  # doctest: +SKIP
    """
    atlas = _checked_reference(adata, reference)
    check_can_hold_results(adata)
    check_choices(metric=metric, index=index, weights=weights)
    if atlas is not None and (metric != "euclidean" or index != "exact"):
        msg = "an atlas has an index of its own, with Euclidean distances; leave metric= and index= at their defaults"
        raise ValueError(msg)
    if index == "faiss":
        require("faiss", purpose="index='faiss'")
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        msg = f"min_confidence is a share of votes between 0 and 1; got {min_confidence!r}"
        raise ValueError(msg)
    if use_rep is not None and tokenize_options:
        msg = f"with use_rep= no model is run, so that there is no option {', '.join(map(repr, tokenize_options))}"
        raise TypeError(msg)
    columns = _columns(labels_key, atlas)
    keys = _result_keys(adata, columns, key_added)
    labels = [
        Labels.of(reference.obs, column, _REFERENCE) if atlas is None else Labels(atlas.codes, atlas.categories)
        for column in columns
    ]
    if k is None:
        k = _K if atlas is None else _K_ATLAS
    for column, one in zip(columns, labels, strict=True):
        check_k(k, int((one.codes >= 0).sum()), _with_label(column))

    adata = adata.copy() if copy else adata
    n_reference = reference.n_obs if atlas is None else len(atlas)
    start = _logging.info(f"mapping {adata.n_obs:,} cells to a reference of {n_reference:,} cells")
    embedder = embedded = known = None
    if use_rep is None:
        backbone = load_backbone(model, device=device, precision=precision, weights=None)
        embedder = Embedder(
            backbone,
            pooling=pooling,
            layer=layer,
            seed=seed_of(rng),
            duplicates=duplicates,
            tokenize_options=tokenize_options,
            names={"gene_symbols": gene_symbols, "gene_ids": gene_ids, "aliases": aliases},
            sizes={"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "block_size": block_size},
            progress=progress,
        )
        if atlas is None:
            embedder.check_comparable(adata, reference)
            known = embedder(reference, _REFERENCE).array
        else:
            _check_atlas(atlas, embedder)
        embedded = embedder(adata, _QUERY)
        query = embedded.array
    else:
        if atlas is None:
            known = embedding_of(reference, use_rep, _REFERENCE)
        query = embedding_of(adata, use_rep, _QUERY)

    # an embedding that is in the way, made otherwise, stays where it is
    keeps = embedded is not None and embedded.fresh and embedder.slots[0] not in adata.obsm
    if embedded is not None and (keeps or not embedded.fresh):
        use_rep = embedder.slots[0]
    params = {
        "use_rep": use_rep,
        "k": k,
        "metric": metric,
        "weights": weights,
        "index": index if atlas is None else "atlas",
        "min_confidence": min_confidence,
    }
    record = {"scfm_version": __version__}
    if embedded is not None:
        record["embedding"] = {name: embedded.record[name] for name in ("params", "checkpoint")}
    search = _Search(query, known if atlas is None else atlas, k, metric, index)
    among = [search.among(one, column) for column, one in zip(columns, labels, strict=True)]
    added = ""
    for column, key, one, (neighbors, codes) in zip(columns, keys, labels, among, strict=True):
        votes = vote(neighbors, codes, len(one.categories), weights=weights)
        rejected = np.zeros(adata.n_obs, bool) if min_confidence is None else votes.confidence < min_confidence
        record |= {
            "params": storable({"labels_key": column, **params}),
            "reference": {"n_obs": n_reference, "n_used": len(codes), "kind": "AnnData" if atlas is None else "atlas"},
            "rejected": float(rejected.mean()),
            "without_label": float((votes.codes < 0).mean()),
        }
        added += write_labels(adata, key, one, votes, record, rejected=rejected)
        if atlas is None:
            _copy_colors(reference, column, adata, key)
    if keeps:
        slot, record_slot = embedder.slots
        adata.obsm[slot], adata.uns[record_slot] = embedded.array, embedded.record
        added += f"\n    {slot!r}, cell embedding (adata.obsm)\n    {record_slot!r}, its record (adata.uns)"
    _logging.info("    finished", time=start, deep=f"added{added}")
    return adata if copy else None


@dataclass(frozen=True, eq=False)
class _Search:
    """Neighbours of the query among the labelled cells of a reference or an atlas.

    Parameters
    ----------
    query
        Embedding of the query.
    known
        Embedding of the reference, or an atlas.
    k, metric, index
        As in :func:`scfm.tasks.neighbors.find_neighbors`.
    """

    query: NDArray
    known: NDArray | AtlasIndex
    k: int
    metric: Metric
    index: Index
    _found: dict[bytes, Neighbors] = field(default_factory=dict, init=False)

    def among(self, labels: Labels, column: str) -> tuple[Neighbors, NDArray[np.integer]]:
        """Neighbours, and the labels of the cells that they are numbers of."""
        if isinstance(self.known, AtlasIndex):
            return self.known.search(self.query, self.k), labels.codes
        cells = (labels.codes >= 0) & np.isfinite(self.known).all(1)
        check_k(self.k, int(cells.sum()), f"{_with_label(column)} and an embedding")
        # columns in which the same cells have labels share one search
        same = np.packbits(cells).tobytes()
        if same not in self._found:
            known = self.known if cells.all() else self.known[cells]
            self._found[same] = find_neighbors(known, self.query, self.k, metric=self.metric, index=self.index)
        return self._found[same], labels.codes[cells]


def _with_label(column: str) -> str:
    return f"cells with a label in {column!r}"


def _checked_reference(adata: AnnData, reference: Any) -> AtlasIndex | None:
    """The atlas, if the reference is one."""
    if not isinstance(adata, AnnData):
        msg = f"adata must be an AnnData object; got {type(adata).__name__}"
        raise TypeError(msg)
    if adata.n_obs == 0:
        msg = "adata has no cells, so there is nothing to label"
        raise ValueError(msg)
    if isinstance(reference, AnnData):
        if reference.n_obs == 0:
            msg = "the reference has no cells"
            raise ValueError(msg)
        return None
    if isinstance(reference, AtlasIndex):
        return reference
    if not isinstance(reference, (str, os.PathLike)):
        msg = f"reference must be an AnnData object, an AtlasIndex or its folder; got {type(reference).__name__}"
        raise TypeError(msg)
    if not is_atlas(reference):
        msg = (
            f"{os.fspath(reference)} is no folder with an atlas (index.faiss, meta.h5ad); "
            "read data with anndata.read_h5ad or anndata.read_zarr first"
        )
        raise FileNotFoundError(msg)
    return AtlasIndex.read(reference)


def _columns(labels_key: str | Sequence[str] | None, atlas: AtlasIndex | None) -> list[str]:
    if labels_key is None and atlas is not None:
        return [_ATLAS]
    columns = [labels_key] if isinstance(labels_key, str) else list(labels_key or ())
    if not columns or len(set(columns)) < len(columns):
        msg = f"labels_key must name columns of reference.obs, each once; got {labels_key!r}"
        raise ValueError(msg)
    if atlas is not None and len(columns) > 1:
        msg = f"an atlas has one set of labels; got {len(columns)} names for it"
        raise ValueError(msg)
    return columns


def _result_keys(adata: AnnData, columns: list[str], key_added: str | Sequence[str] | None) -> list[str]:
    """Names of the results; a column of the user is replaced only if its name was given."""
    if key_added is not None:
        keys = [key_added] if isinstance(key_added, str) else list(key_added)
        if len(keys) != len(columns) or len(set(keys)) < len(keys):
            msg = f"key_added must have one name for each of the {len(columns)} columns of labels; got {key_added!r}"
            raise ValueError(msg)
        return keys
    keys = [_keys.mapped(column) for column in columns]
    for key in keys:
        record = adata.uns.get(key)
        if key in adata.obs and not (isinstance(record, Mapping) and "labels_key" in record.get("params", {})):
            msg = (
                f"obs has a column {key!r} already, which this function did not make; name the results with key_added="
            )
            raise ValueError(msg)
    return keys


def _check_atlas(atlas: AtlasIndex, embedder: Embedder) -> None:
    """Raise ``ValueError`` if the atlas says that it was embedded in another way."""
    record = atlas.config.get("embedding")
    if record is not None and (problem := embedder.difference(record)):
        msg = (
            f"the embedding of the atlas does not fit that of the query: {problem}. Take the model and options of the "
            "atlas, or embed first and name the slot with use_rep="
        )
        raise ValueError(msg)


def _copy_colors(reference: AnnData, column: str, adata: AnnData, key: str) -> None:
    """Plots show the labels in the colours that they have in the reference."""
    colors = reference.uns.get(_keys.colors(column))
    if colors is not None and len(colors) == len(adata.obs[key].cat.categories):
        adata.uns[_keys.colors(key)] = list(colors)
