"""Descriptions of parameters that many functions share, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable")

_PARTS = {
    "genes_of_data": """\
gene_symbols, gene_ids
        Columns of ``adata.var`` with gene symbols and Ensembl ids; by default they are looked for.
    aliases
        HGNC table of previous and alias symbols: a file, a data frame, or a :class:`scfm.genes.AliasTable`. By default
        ``hgnc_complete_set.txt`` in ``scfm.settings.cachedir`` if it is there; ``False`` uses none.
    duplicates
        Columns of the same gene are summed, kept apart, or refused; by default as the model's ``tokenize`` does,
        which is to sum counts.""",
    "compute": """\
device, precision
        Where and in which floating-point type to compute; ``"auto"`` follows ``scfm.settings``. A model that is loaded
        already stays as it is unless one of them is named.
    batch_size, tokens_per_batch
        Most cells, and most tokens with padding, in one forward pass. By default a token budget that suits the device.
        If memory runs out, the budget is halved and the run goes on.
    block_size
        Cells read at a time.""",
    "random": """\
rng
        Seed of random choices in the tokenizer; a generator gives one seed, which is recorded.
    draws
        Random numbers to use instead, for models whose tokenizer takes them; one entry for each cell.
    progress
        Whether to show a progress bar; by default if ``scfm.settings.verbosity`` is at least 2 and the run takes more
        than two seconds.""",
}


def shared_parameters(function: F) -> F:
    """Put the shared descriptions where the docstring says ``{genes_of_data}``, ``{compute}`` and ``{random}``."""
    for name, text in _PARTS.items():
        function.__doc__ = (function.__doc__ or "").replace("{" + name + "}", text)
    return function
