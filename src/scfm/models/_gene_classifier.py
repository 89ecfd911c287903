"""What genes do, learned from genes of which it is known."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score

from .. import _logging
from .._errors import CheckpointError
from ..backbones._device import resolve_device
from ..checkpoints._files import new_directory, read_json, recover, sha256
from ..genes import AliasTable, GeneVocab
from ..metrics import annotation_scores, gene_function_scores
from ..tasks.gene_classifier import GO_HIDDEN, PUBLISHED, GeneHead, HeadTraining, class_folds, random_folds, train_head
from ._codec import decode, encode
from ._gene_table import GeneTable, gene_table
from ._training import seed_or_default

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import Self

    from anndata import AnnData
    from torch import Tensor

    from ..backbones import Backbone
    from ..tasks.gene_classifier import Head

    Directory = str | os.PathLike[str]

_FORMAT = 1
_HEADER, _TENSORS = "model.json", "model.safetensors"
_SHOWN = 10


class GeneClassifier:
    """Classes or functions of genes, from the gene embeddings of any model.

    Labels with one class for each gene (dosage sensitivity, state of the promoter) are learned by the network that CellFM
    has for two classes, tables with a column of 0 and 1 for each function (Gene Ontology) by the one it has for these. The
    vectors of genes stay as they are.

    Parameters
    ----------
    model
        Model whose vectors of genes are taken: a name, a folder, or a model from :func:`scfm.load`.
    labels
        Known answers, indexed by gene symbols, or by Ensembl ids if the model has them or ``aliases`` does. A series has the class of each gene, which may be missing; a
        table has a column of 0 and 1 for each function. Genes that the model does not know are reported and left out.
    embeddings
        Vectors of genes instead of a model, one row for each gene.
    adata
        Cells. With ``model``, the states of genes in these cells, averaged, are taken in place of the vectors that the model
        has learned.
    use_rep
        Slot of ``adata.varm`` with vectors, instead of a model.
    layer
        Layer of ``adata`` with counts.
    head
        ``"binary"`` or ``"go"`` (CellFM), or ``"linear"``; by default the published one for the kind of labels.
    hidden
        Width of the first layer of ``"go"``.
    standardize
        Whether each value of the vectors is scaled to mean 0 and variance 1 over the genes that are trained on; by default
        for the linear head only, as the authors of the others do not.
    gene_symbols, gene_ids
        Columns of ``adata.var`` with gene symbols and Ensembl ids; by default they are looked for.
    aliases
        HGNC table of other names of genes, as in :func:`scfm.tl.embed`.
    tokenize
        Options of the model's tokenizer, for states in cells.
    device
        Where to compute.
    seed
        Seed of the weights of the head; by default ``scvi.settings.seed``.

    Attributes
    ----------
    classes
        Names of the classes or functions.
    genes
        Genes with a label and a vector, in the order of the labels.
    unknown_genes
        Genes with a label that have no vector.
    history
        Losses of the last training, one row for each epoch.

    Raises
    ------
    ValueError
        If there are fewer than two classes, labels contradict each other, are not 0 or 1, or no gene is known.

    References
    ----------
    Zeng et al., CellFM, Nature Communications 16, 4679 (2025); the labels are those of Theodoris et al., Geneformer, Nature
    618, 616 (2023).

    Examples
    --------
    >>> import scfm
    >>> model = scfm.models.GeneClassifier("scgpt", labels=sensitive)  # doctest: +SKIP
    >>> model.cross_validate()  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> model.predict_proba(["GATA1", "ENSG00000141510"])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backbone | None = None,
        labels: pd.Series | pd.DataFrame | None = None,
        *,
        embeddings: pd.DataFrame | None = None,
        adata: AnnData | None = None,
        use_rep: str | None = None,
        layer: str | None = None,
        head: Head | None = None,
        hidden: int = GO_HIDDEN,
        standardize: bool | None = None,
        gene_symbols: str | None = None,
        gene_ids: str | None = None,
        aliases: Any = None,
        tokenize: Mapping[str, Any] | None = None,
        device: str = "auto",
        seed: int | None = None,
    ) -> None:
        if not isinstance(labels, (pd.Series, pd.DataFrame)):
            msg = f"labels= needs a pandas Series or DataFrame indexed by gene, not {type(labels).__name__}"
            raise TypeError(msg)
        if isinstance(labels, pd.DataFrame) and labels.shape[1] == 1:
            labels = labels.iloc[:, 0]
        self.seed = seed_or_default(seed)
        table = gene_table(
            model,
            embeddings=embeddings,
            adata=adata,
            use_rep=use_rep,
            layer=layer,
            gene_symbols=gene_symbols,
            gene_ids=gene_ids,
            aliases=aliases,
            tokenize=tokenize,
            device=device,
            seed=self.seed,
        )
        self.device = resolve_device(device)
        names, codes, self.classes = _encoded(labels)
        self.several = codes.ndim == 2
        self._use_head(table, head or ("go" if self.several else "binary"), hidden, standardize)
        self._use_labels(names, codes)
        self.head = self._new_head(self.seed)
        self.is_trained, self.history = False, None

    def _use_head(self, table: GeneTable, style: Head, hidden: int, standardize: bool | None) -> None:
        self._table, self.style, self.hidden = table, style, hidden
        self.standardize = style == "linear" if standardize is None else bool(standardize)
        self._shift = torch.zeros(table.values.shape[1])
        self._scale = torch.ones(table.values.shape[1])

    def _use_labels(self, names: pd.Index, codes: np.ndarray) -> None:
        rows = self._table.rows(names)
        self.unknown_genes = names[rows < 0]
        order = np.flatnonzero(rows >= 0)
        rows, codes, names = rows[order], codes[order], names[order]
        # several names of one gene count once
        first = ~pd.Series(rows).duplicated().to_numpy()
        positions = pd.Series(np.flatnonzero(first), index=rows[first])[rows].to_numpy()
        differ = (codes != codes[positions]).reshape(len(codes), -1).any(1) if len(codes) else first
        if differ.any():
            msg = f"these names mean genes that have another label under another name: {', '.join(names[differ][:_SHOWN])}"
            raise ValueError(msg)
        self.genes, self._rows, self._codes = names[first], rows[first], codes[first]
        n_labelled = len(self.genes) + len(self.unknown_genes)
        _logging.info(f"{len(self.genes):,} of {n_labelled:,} labelled genes have a vector ({self._table.origin})")
        if len(self.unknown_genes):
            shown = ", ".join(map(str, self.unknown_genes[:_SHOWN])) + (
                " ..." if len(self.unknown_genes) > _SHOWN else ""
            )
            _logging.warning(f"{len(self.unknown_genes):,} labelled genes have no vector and are left out: {shown}")
        if not len(self.genes):
            msg = f"none of the labelled genes has a vector in {self._table.origin}; are these symbols of human genes?"
            by_id = pd.Index(self.unknown_genes).astype(str).str.startswith("ENSG").any()
            if by_id and self._table.vocab.ensembl_ids is None and self._table.aliases is None:
                msg = (
                    f"the labels have Ensembl ids, and {self._table.origin} knows genes by symbols only; give aliases=, a table "
                    "of HGNC that says which id is which symbol, or index the labels by symbols"
                )
            raise ValueError(msg)
        if not self.several and len(np.unique(self._codes)) < len(self.classes):
            lost = self.classes[~np.isin(np.arange(len(self.classes)), self._codes)]
            msg = f"no gene of the class {', '.join(map(str, lost))} has a vector"
            raise ValueError(msg)

    def _new_head(self, seed: int) -> GeneHead:
        dim = self._table.values.shape[1]
        return GeneHead(self.style, dim, len(self.classes), hidden=self.hidden, seed=seed).to(self.device).eval()

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int | None = None,
        lr: float | None = None,
        validation_size: float = 0.1,
        keep_best: bool = True,
        as_published: bool = False,
        seed: int | None = None,
    ) -> None:
        """Train the head on all labelled genes but those held out to find the best epoch.

        What is not given is as the authors of CellFM do it, see ``scfm.tasks.gene_classifier.PUBLISHED``. They keep
        the last epoch of two classes, and find that of functions on the genes they test on; here genes are held out
        from the training for it.

        Parameters
        ----------
        max_epochs, batch_size, lr
            Passes over the genes, genes of a step, learning rate (Adam).
        validation_size
            Share of the genes to hold out.
        keep_best
            Whether the weights of the epoch with the lowest loss of these genes count, or the last.
        as_published
            Double the loss of functions, as the authors' code does, see :func:`scfm.tasks.gene_classifier.gene_loss`.
        seed
            Seed of the split, the order and the dropout; by default that of the model.

        Raises
        ------
        ValueError
            If a number makes no sense, or the loss is not finite.
        """
        seed = self.seed if seed is None else int(seed)
        training = self._training(max_epochs, batch_size, lr, keep_best, as_published, seed)
        everything = np.arange(len(self.genes))
        self.head, self.history, self._shift, self._scale = self._fit(everything, training, validation_size, seed)
        self.is_trained = True

    def cross_validate(
        self,
        n_folds: int = 5,
        *,
        folds: pd.Series | None = None,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        validation_size: float = 0.1,
        keep_best: bool = True,
        as_published: bool = False,
        fold_seed: int = 0,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Test on each fold of the genes what is learned from the others; the model itself does not change.

        Genes to find the best epoch are held out from those that are trained on, never from the fold that is tested.

        Parameters
        ----------
        n_folds
            Number of folds, drawn as the authors of CellFM do, see :func:`scfm.tasks.gene_classifier.class_folds`.
        folds
            Folds instead, a series of whole numbers indexed by gene, with -1 for genes that are not used.
        max_epochs, batch_size, lr, validation_size, keep_best, as_published
            As in :meth:`train`.
        fold_seed
            Seed of the folds.
        seed
            Seed of everything else; by default that of the model.

        Returns
        -------
        Tidy table with the columns ``fold``, ``n_train``, ``n_validation``, ``n_test``, ``metric`` and ``value``. The metrics
        are ``accuracy``, ``macro F1`` (CellFM's average), and ``AUPR``, ``AUROC`` and ``Fmax`` of
        :func:`scfm.metrics.gene_function_scores`; of two classes the second one counts as yes, of several each.

        Raises
        ------
        ValueError
            If a class has fewer genes than there are folds, or a fold lacks a class to train on.
        """
        seed = self.seed if seed is None else int(seed)
        training = self._training(max_epochs, batch_size, lr, keep_best, as_published, seed)
        fold = self._folds(n_folds, folds, fold_seed)
        rows = []
        for number in np.unique(fold[fold >= 0]):
            test = np.flatnonzero(fold == number)
            rest = np.flatnonzero((fold >= 0) & (fold != number))
            if not self.several and len(np.unique(self._codes[rest])) < len(self.classes):
                msg = f"without fold {number} a class has no genes to train on"
                raise ValueError(msg)
            head, history, shift, scale = self._fit(rest, training, validation_size, seed)
            scores = self._scores(test, self._probabilities(head, self._rows[test], shift, scale))
            n_validation = history.attrs["n_validation"]
            sizes = int(number), len(rest) - n_validation, n_validation, len(test)
            rows += [(*sizes, metric, value) for metric, value in scores.items()]
        return pd.DataFrame(rows, columns=["fold", "n_train", "n_validation", "n_test", "metric", "value"])

    def _folds(self, n_folds: int, folds: pd.Series | None, seed: int) -> np.ndarray:
        if folds is None:
            if self.several:
                return random_folds(len(self.genes), n_folds, seed=seed)
            return class_folds(self._codes, n_folds, seed=seed)
        if missing := [gene for gene in self.genes if gene not in folds.index]:
            msg = f"folds= does not name {', '.join(map(str, missing[:_SHOWN]))}; use -1 for genes that are not used"
            raise ValueError(msg)
        fold = folds[~folds.index.duplicated()].loc[self.genes].to_numpy()
        if len(np.unique(fold[fold >= 0])) < 2:
            msg = "folds= needs at least two folds"
            raise ValueError(msg)
        return fold.astype(np.int64)

    def _training(
        self,
        max_epochs: int | None,
        batch_size: int | None,
        lr: float | None,
        keep_best: bool,
        as_published: bool,
        seed: int,
    ) -> HeadTraining:
        given = {"max_epochs": max_epochs, "batch_size": batch_size, "lr": lr}
        given = {name: value for name, value in given.items() if value is not None}
        if wrong := [name for name, value in given.items() if value <= 0]:
            msg = f"{', '.join(wrong)} must be positive"
            raise ValueError(msg)
        values = PUBLISHED[self.style] | given | {"keep_best": keep_best, "as_published": as_published, "seed": seed}
        return HeadTraining(**values)

    def _fit(
        self, genes: np.ndarray, training: HeadTraining, validation_size: float, seed: int
    ) -> tuple[GeneHead, pd.DataFrame, Tensor, Tensor]:
        """A head trained on some of the labelled genes, its losses, and how vectors are standardised."""
        if not 0 <= validation_size < 1:
            msg = f"validation_size={validation_size} is no share of the genes"
            raise ValueError(msg)
        train, validation = self._divide(genes, validation_size, seed)
        vectors = torch.from_numpy(self._table.take(self._rows[train]))
        shift, scale = torch.zeros(vectors.shape[1]), torch.ones(vectors.shape[1])
        if self.standardize:
            spread = vectors.std(0, correction=0)
            shift, scale = vectors.mean(0), torch.where(spread > 0, spread, 1)
        head = self._new_head(seed)
        held_out = (self._vectors(self._rows[validation], shift, scale), self._targets(validation))
        epochs = train_head(
            head,
            self._vectors(self._rows[train], shift, scale),
            self._targets(train),
            training,
            validation=held_out if len(validation) else None,
        )
        history = pd.DataFrame(list(epochs)).rename_axis("epoch")
        history.attrs["n_validation"] = len(validation)
        return head, history, shift, scale

    def _divide(self, genes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Genes to train and to validate on, the same share of each class."""
        codes = np.zeros(len(genes), dtype=np.int64) if self.several else self._codes[genes]
        order = np.random.default_rng(seed).permutation(len(genes))
        order = order[np.argsort(codes[order], kind="stable")]
        size = np.bincount(codes)
        place = np.arange(len(order)) - np.repeat(np.cumsum(size) - size, size)
        held_out = place < np.rint(share * size)[codes[order]]
        return genes[np.sort(order[~held_out])], genes[np.sort(order[held_out])]

    def _targets(self, genes: np.ndarray) -> Tensor:
        codes = torch.from_numpy(self._codes[genes])
        return codes.to(self.device, torch.float32 if self.several else torch.int64)

    def _vectors(self, rows: np.ndarray, shift: Tensor, scale: Tensor) -> Tensor:
        return ((torch.from_numpy(self._table.take(rows)) - shift) / scale).to(self.device)

    # -- what it gives -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probabilities(self, head: GeneHead, rows: np.ndarray, shift: Tensor, scale: Tensor) -> np.ndarray:
        logits = head(self._vectors(rows, shift, scale))
        values = logits.sigmoid() if self.several else logits.softmax(1)
        return values.cpu().numpy()

    def _scores(self, genes: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        truth = self._codes[genes]
        if self.several:
            answers = (probabilities >= 0.5).astype(np.int64)
            right = {
                "accuracy": float((answers == truth).mean()),
                "macro F1": float(f1_score(truth, answers, average="macro", zero_division=0)),
            }
            return right | gene_function_scores(truth, probabilities)
        known, predicted = self.classes[truth], self.classes[probabilities.argmax(1)]
        scores = annotation_scores(known, predicted, average="cellfm", classes=self.classes)
        right = {name: scores[name] for name in ("accuracy", "macro F1")}
        one_of = np.eye(len(self.classes), dtype=np.int64)[truth]
        if len(self.classes) == 2:
            return right | gene_function_scores(one_of[:, 1], probabilities[:, 1])
        return right | gene_function_scores(one_of, probabilities)

    def predict_proba(self, genes: Sequence[str] | None = None) -> pd.DataFrame:
        """Probability of each class or function.

        Parameters
        ----------
        genes
            Gene symbols or Ensembl ids; by default all genes that have a vector.

        Returns
        -------
        One row for each gene, one column for each class or function; NaN for genes without a vector.
        """
        if not self.is_trained:
            _logging.warning("the head is not trained; call train() first")
        genes = (
            self._table.names
            if genes is None
            else np.asarray([genes] if isinstance(genes, str) else list(genes), dtype=object)
        )
        rows = self._table.rows(genes)
        out = np.full((len(genes), len(self.classes)), np.nan, dtype=np.float32)
        if (rows >= 0).any():
            out[rows >= 0] = self._probabilities(self.head, rows[rows >= 0], self._shift, self._scale)
        return pd.DataFrame(out, index=pd.Index(genes, name="gene"), columns=pd.Index(self.classes))

    def predict(self, genes: Sequence[str] | None = None, *, threshold: float = 0.5) -> pd.DataFrame:
        """Predict classes or functions.

        Parameters
        ----------
        genes
            As in :meth:`predict_proba`.
        threshold
            Probability from which on a gene has a function.

        Returns
        -------
        For classes a table with ``label`` and ``confidence`` (its probability), for functions one column of 0 and 1 for each.
        Genes without a vector are missing.
        """
        table = self.predict_proba(genes)
        known = table.notna().all(axis=1)
        if self.several:
            return (table >= threshold).astype(float).where(known, np.nan, axis=0)
        label = np.full(len(table), None, dtype=object)
        values = table.to_numpy()
        label[known] = self.classes[values[known].argmax(1)]
        return pd.DataFrame({"label": label, "confidence": values.max(1)}, index=table.index)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(self, dir_path: Directory, *, overwrite: bool = False) -> None:
        """Save the classifier and the vectors of its genes to a directory, as JSON and safetensors.

        Parameters
        ----------
        dir_path
            The directory.
        overwrite
            Replace a classifier that lies there. Anything else is never replaced.

        Raises
        ------
        FileExistsError
            If the directory exists and may not be replaced.
        """
        path = Path(dir_path).expanduser()
        if overwrite and path.exists() and not (path / _HEADER).is_file() and any(path.iterdir()):
            msg = f"{path} holds something else than a saved model and is not replaced even with overwrite=True"
            raise FileExistsError(msg)
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        tensors |= {"vectors": torch.from_numpy(self._table.values), "shift": self._shift, "scale": self._scale}
        state = {
            "classes": self.classes,
            "several": self.several,
            "head": self.style,
            "hidden": self.hidden,
            "standardize": self.standardize,
            "seed": self.seed,
            "genes": self.genes.to_numpy(dtype=object),
            "unknown_genes": self.unknown_genes.to_numpy(dtype=object),
            "codes": self._codes,
            "rows": self._rows,
            "origin": self._table.origin,
            "is_trained": self.is_trained,
            "history": self.history,
        }
        header = {"format": _FORMAT, "scfm": version("scfm"), "class": type(self).__name__, "state": encode(state)}
        header["vocab"] = self._table.vocab.to_dict()
        with new_directory(path.resolve(), overwrite=overwrite) as directory:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / _TENSORS
            )
            header["sha256"] = sha256(directory / _TENSORS)
            (directory / _HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, dir_path: Directory, *, aliases: Any = None, device: str = "auto") -> Self:
        """Load a saved classifier.

        Parameters
        ----------
        dir_path
            The directory.
        aliases
            HGNC table of other names of genes.
        device
            Where to compute.

        Raises
        ------
        CheckpointError
            If a file is damaged or missing.
        ValueError
            If there is no saved classifier of genes.
        """
        path = Path(dir_path).expanduser()
        recover(path)
        header = read_json(path / _HEADER) if (path / _HEADER).is_file() else {}
        if header.get("class") != cls.__name__:
            msg = f"{path} holds no {cls.__name__} that scfm saved (it holds {header.get('class') or 'none'})"
            raise ValueError(msg)
        if header["format"] > _FORMAT:
            msg = f"{path} was saved by a newer scfm ({header.get('scfm')}); upgrade with: pip install -U scfm"
            raise CheckpointError(msg)
        file = path / _TENSORS
        if not file.is_file() or sha256(file) != header["sha256"]:
            msg = f"{file} is missing or damaged; copy the directory of the model again"
            raise CheckpointError(msg)
        tensors, state = load_file(file), decode(header["state"])
        model = cls.__new__(cls)
        model.seed, model.device = state["seed"], resolve_device(device)
        model.classes, model.several = state["classes"], state["several"]
        vocab = GeneVocab.from_dict(header["vocab"])
        table = GeneTable(vocab, tensors["vectors"].numpy(), state["origin"], AliasTable.resolve(aliases) or None)
        model._use_head(table, state["head"], state["hidden"], state["standardize"])
        model._shift, model._scale = tensors["shift"], tensors["scale"]
        model.genes, model.unknown_genes = pd.Index(state["genes"]), pd.Index(state["unknown_genes"])
        model._rows, model._codes = state["rows"], state["codes"]
        model.head = model._new_head(model.seed)
        model.head.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")})
        model.is_trained, model.history = state["is_trained"], state["history"]
        return model

    def __repr__(self) -> str:
        kind = "functions" if self.several else "classes"
        status = "trained" if self.is_trained else "not trained"
        return (
            f"GeneClassifier({len(self.classes)} {kind}, {len(self.genes):,} labelled genes, vectors of {self._table.origin}, "
            f"head {self.style!r}, {status})"
        )


def _encoded(labels: pd.Series | pd.DataFrame) -> tuple[pd.Index, np.ndarray, np.ndarray]:
    """Names of the genes, their answers as whole numbers, and the names of classes or functions."""
    names = labels.index.astype(str)
    if isinstance(labels, pd.DataFrame):
        values = labels.to_numpy()
        if not np.isin(pd.DataFrame(values).to_numpy(dtype=float, na_value=np.nan), (0, 1)).all():
            msg = "a table of functions has to hold 0 and 1 only; leave out genes of which nothing is known"
            raise ValueError(msg)
        codes, classes = values.astype(np.int64), labels.columns.astype(str).to_numpy(dtype=object)
        if not len(classes) or not len(codes):
            msg = "labels= is empty"
            raise ValueError(msg)
    else:
        known = labels.notna().to_numpy()
        names, labels = names[known], labels[known]
        classes, codes = np.unique(labels.astype(str).to_numpy(dtype=object), return_inverse=True)
        codes = codes.astype(np.int64)
        if len(classes) < 2:
            msg = f"labels= has {len(classes)} classes; at least two are needed"
            raise ValueError(msg)
    repeated = pd.Series(names).duplicated(keep=False).to_numpy()
    if repeated.any():
        table = pd.DataFrame(codes.reshape(len(codes), -1)[repeated], index=names[repeated])
        if (table.groupby(level=0).nunique() > 1).to_numpy().any():
            msg = f"genes have several labels that contradict each other, among them {', '.join(table.index.unique()[:_SHOWN])}"
            raise ValueError(msg)
        once = ~pd.Series(names).duplicated().to_numpy()
        names, codes = names[once], codes[once]
    return names, codes, np.asarray(classes, dtype=object)
