"""``FastAttention`` of the package performer-pytorch, with a fixed projection."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from .._optional import require

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from .linear_attention import KeyMax


def attend(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, key_max: KeyMax) -> Tensor:
    """Attention output of shape ``(cells, heads, length, dim)``, in the type of ``v``.

    Raises
    ------
    MissingExtraError
        If performer-pytorch is not installed.
    ValueError
        If the installed version takes the maximum of the keys over something else.
    """
    if key_max != "cell":
        _check_convention(key_max)
        return _fast_attention(q, k, v, projection)
    if q.shape[1] > 1:  # of a single cell, "batch" is "cell"
        _check_convention("batch", wanted="cell")
    return torch.cat(
        [_fast_attention(*cell, projection) for cell in zip(*(x.split(1) for x in (q, k, v)), strict=True)]
    )


def _check_convention(needed: KeyMax, wanted: KeyMax | None = None) -> None:
    if _convention() == needed:
        return
    other = "before 1.1.1" if needed == "batch" else "from 1.1.1 on"
    able = "'head'" if _convention() == "head" else "'batch' and 'cell'"
    msg = (
        f"the installed performer-pytorch cannot give key_max={wanted or needed!r}, only {able}; "
        f"that takes a version {other}, or the backend 'scfm'"
    )
    raise ValueError(msg)


def _fast_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    kind = torch.promote_types(v.dtype, torch.float32)
    features, dim = projection.shape
    with torch.random.fork_rng(devices=[]):  # it draws a projection, which is not needed
        attention = _package().FastAttention(dim_heads=dim, nb_features=features)
    attention.projection_matrix = projection.to(kind)
    return attention(*(x.to(kind) for x in (q, k, v))).to(v.dtype)


def _package() -> ModuleType:
    return require("performer_pytorch", purpose="backend='performer-pytorch'")


@cache
def _convention() -> KeyMax:
    """What the installed version takes the maximum over; it changed from the batch to the head in 1.1.1."""
    _package()
    from performer_pytorch.performer_pytorch import softmax_kernel

    keys = torch.tensor([[[[0.0]], [[1.0]]]])  # two heads; the features of the first depend on the second or not
    both, first = (softmax_kernel(x, projection_matrix=torch.ones(1, 1), is_query=False) for x in (keys, keys[:, :1]))
    return "head" if torch.equal(both[:, :1], first) else "batch"
