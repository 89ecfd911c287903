"""FAVOR+ linear attention of the Performer (Choromanski et al., ICLR 2021): softmax attention by random features.

Notation: ``c = dim**-0.25``, ``u = c x P^T`` with the projection ``P`` of shape ``(features, dim)``,
``g = c**2 |x|**2 / 2``. A query becomes ``exp(u - g - max(u)) + eps`` with its own maximum, a key becomes
``exp(u - g - M) + eps`` with a maximum ``M`` that it shares with other keys. As ``eps`` stands outside the
exponential, results depend on what ``M`` is taken over; :data:`KeyMax` names the conventions in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from .steps import rows_per_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

KeyMax = Literal["cell", "batch", "head"]
"""What the maximum of the key features is taken over: all heads of a cell, everything in the batch, or one head."""

Backend = Literal["scfm", "performer-pytorch"]
"""Whose code computes the attention."""

EPSILON = 1e-4
# numbers for each thread in the features of one step
_STEP_PER_THREAD = 1 << 20


def default_features(dim: int) -> int:
    """Usual number of random features for heads of width ``dim``: ``int(dim * ln(dim))``."""
    return int(dim * math.log(dim))


def orthogonal_random_features(
    n_features: int, dim: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw a projection: orthogonal blocks whose rows have the norms of standard normal vectors.

    Parameters
    ----------
    n_features, dim
        Rows and columns.
    generator
        Source of randomness; the global one by default.
    dtype
        Floating-point type of the result; drawn and orthogonalised in float64 so that types agree.

    Returns
    -------
    Shape ``(n_features, dim)``.
    """
    draw = {"generator": generator, "dtype": torch.float64}
    blocks = torch.randn(-(-n_features // dim), dim, dim, **draw)
    rows = torch.linalg.qr(blocks).Q.transpose(1, 2).reshape(-1, dim)[:n_features]
    return (rows * torch.randn(n_features, dim, **draw).norm(dim=1, keepdim=True)).to(dtype)


def _exponents(x: Tensor, scaled_projection: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents ``u`` of shape (..., features) and half squared norms ``g`` of shape (..., 1)."""
    x = x.to(scaled_projection.dtype)
    return x @ scaled_projection.T, _half_square(x)


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) * (x.shape[-1] ** -0.5 / 2)


def scaled(projection: Tensor) -> Tensor:
    """``c P``, never below float32: the exponents lose too much in bfloat16."""
    return projection.to(torch.promote_types(projection.dtype, torch.float32)) * projection.shape[-1] ** -0.25


def query_features(q: Tensor, projection: Tensor) -> Tensor:
    """Positive random features of queries, each with its own maximum; shape ``(..., features)``."""
    u, g = _exponents(q, scaled(projection))
    return (torch.exp(u - g - u.amax(-1, keepdim=True)) + EPSILON) * projection.shape[0] ** -0.5


def key_features(k: Tensor, projection: Tensor, *, key_max: KeyMax = "cell", padding: Tensor | None = None) -> Tensor:
    """Positive random features of keys.

    Parameters
    ----------
    k
        Shape ``(cells, heads, length, dim)``.
    projection
        Shape ``(features, dim)``.
    key_max
        What the maximum is taken over.
    padding
        True at keys to leave out, shape ``(cells, length)``; their features are zero and do not count for the maximum.

    Returns
    -------
    Shape ``(cells, heads, length, features)``, float32 or better.
    """
    check_key_max(key_max)
    u, g = _exponents(k, scaled(projection))
    seen = u if padding is None else u.masked_fill(padding[:, None, :, None], -math.inf)
    axes = {"cell": (1, 2, 3), "batch": (0, 1, 2, 3), "head": (2, 3)}[key_max]
    features = (torch.exp(u - g - seen.amax(axes, keepdim=True)) + EPSILON) * projection.shape[0] ** -0.5
    return features if padding is None else features.masked_fill(padding[:, None, :, None], 0)


def check_key_max(key_max: str) -> None:
    """Raise ``ValueError`` unless ``key_max`` names a convention."""
    if key_max not in get_args(KeyMax):
        msg = f"key_max must be one of {', '.join(get_args(KeyMax))}; got {key_max!r}"
        raise ValueError(msg)


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` is known."""
    if backend not in get_args(Backend):
        msg = f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}"
        raise ValueError(msg)


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    key_max: KeyMax = "cell",
    padding: Tensor | None = None,
    backend: Backend = "scfm",
) -> Tensor:
    """Linear attention with all features in memory; differentiable, gradients flow through the maxima too.

    Parameters
    ----------
    q, k, v
        Shape ``(cells, heads, length, dim)``.
    projection
        Shape ``(features, dim)``.
    key_max
        What the maximum of the key features is taken over.
    padding
        True at keys to leave out, shape ``(cells, length)``.
    backend
        ``"performer-pytorch"`` takes ``FastAttention`` of that package. Versions from 1.1.1 on have ``key_max="head"``
        and no gradients through the maxima, older ones ``"batch"`` and ``"cell"``. It knows no padding.

    Returns
    -------
    Shape and type of ``v``.

    Raises
    ------
    MissingExtraError
        If the package of the backend is not installed.
    ValueError
        If the convention is unknown, or the backend has no such convention or no padding.

    See Also
    --------
    KeySums : the same in pieces, for inference over long sequences.
    scfm.nn.linear_attention_gradient.ragged_attention : the same in pieces, with gradients.
    """
    check_key_max(key_max)
    check_backend(backend)
    # mixed-precision training must not make the exponents of the features in bfloat16
    with torch.autocast(q.device.type, enabled=False):
        if backend == "performer-pytorch":
            if padding is not None and bool(padding.any()):
                msg = "performer-pytorch knows no padding; take cells of equal length together, or backend='scfm'"
                raise ValueError(msg)
            from . import _performer_pytorch

            return _performer_pytorch.attend(q, k, v, projection, key_max)
        phi_q = query_features(q, projection)
        phi_k = key_features(k, projection, key_max=key_max, padding=padding)
        context = phi_k.transpose(-1, -2) @ v.to(phi_k.dtype)
        share = phi_q @ phi_k.sum(-2).unsqueeze(-1)
        return ((phi_q @ context) / share).to(v.dtype)


class Scratch:
    """Memory that is used again: fresh pages for the exponents can cost more than the product that fills them."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def take(self, *shape: int, like: Tensor) -> Tensor:
        """An array of some shape, overwritten by the next call."""
        size = math.prod(shape)
        if self._flat is None or self._flat.numel() < size:
            self._flat = like.new_empty(size)
        return self._flat[:size].view(shape)

    def exponents(self, x: Tensor, scaled_projection: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`_exponents` for ``x`` of shape ``(tokens, heads, dim)``; the next call overwrites ``u``."""
        x = x.to(scaled_projection.dtype)
        rows, features = x.shape[0] * x.shape[1], len(scaled_projection)
        u = self.take(rows, features, like=x)
        torch.mm(x.reshape(rows, x.shape[2]), scaled_projection.T, out=u)
        return u.view(*x.shape[:2], features), _half_square(x)


def tokens_per_step(x: Tensor, projection: Tensor) -> int:
    """Tokens whose features are made together."""
    return rows_per_step(x, x.shape[1] * len(projection), _STEP_PER_THREAD)


@dataclass
class KeySums:
    """All that queries need to know of the keys and values of one sequence, collected piece by piece.

    The epsilon of the features and the final scaling by the maximum are left to :meth:`context`, so the sums are taken
    with a running maximum per head and still give each convention of :data:`KeyMax` exactly.

    Parameters
    ----------
    projection
        Scaled projection ``dim**-0.25 * P``, shape ``(features, dim)``.
    maximum
        Largest exponent so far, shape ``(heads,)``.
    products, weights
        Sums of ``exp(u - g - maximum) v^T`` and ``exp(u - g - maximum)``, ``(heads, features, dim)`` and
        ``(heads, features)``.
    values
        Sum of the values, shape ``(heads, dim)``.
    scratch
        Memory for the features of one piece.
    length
        Number of keys so far.
    """

    projection: Tensor
    maximum: Tensor
    products: Tensor
    weights: Tensor
    values: Tensor
    scratch: Scratch
    length: int = 0

    @classmethod
    def empty(cls, heads: int, projection: Tensor) -> KeySums:
        """Start with no keys; the (unscaled) ``projection`` decides device and type, at least float32."""
        features, dim = projection.shape
        projection = scaled(projection)
        return cls(
            projection=projection,
            maximum=projection.new_full((heads,), -math.inf),
            products=projection.new_zeros(heads, features, dim),
            weights=projection.new_zeros(heads, features),
            values=projection.new_zeros(heads, dim),
            scratch=Scratch(),
        )

    def add(self, k: Tensor, v: Tensor) -> None:
        """Add keys and values of some tokens, both of shape ``(tokens, heads, dim)``."""
        step = tokens_per_step(k, self.projection)
        for some_k, some_v in zip(k.split(step), v.split(step), strict=True):
            self._add(some_k, some_v)

    def _add(self, k: Tensor, v: Tensor) -> None:
        v = v.to(self.products.dtype)
        u, g = self.scratch.exponents(k, self.projection)
        maximum = torch.maximum(self.maximum, u.amax((0, 2)))
        fade = torch.exp(self.maximum - maximum)
        phi = u.sub_(g.add_(maximum[:, None])).exp_()
        self.products.mul_(fade[:, None, None]).baddbmm_(phi.permute(1, 2, 0), v.transpose(0, 1))
        self.weights.mul_(fade[:, None]).add_(phi.sum(0))
        self.values.add_(v.sum(0))
        self.maximum = maximum
        self.length += len(k)

    def context(self, maximum: Tensor) -> KeyContext:
        """Sums of the key features for a shared ``maximum`` (one number, or one for each head)."""
        fade = torch.exp(self.maximum - maximum)[:, None]
        return KeyContext(
            self.projection,
            maximum.expand_as(self.maximum),
            products=self.products * fade[..., None] + EPSILON * self.values[:, None],
            weights=self.weights * fade + EPSILON * self.length,
            scratch=self.scratch,
        )


@dataclass
class KeyContext:
    """What :meth:`KeySums.context` gives: sums over keys of features times value, and of features alone."""

    projection: Tensor
    maximum: Tensor
    products: Tensor
    weights: Tensor
    scratch: Scratch

    def __post_init__(self) -> None:
        # numerator and denominator come from one product
        self.table = torch.cat([self.products, self.weights[..., None]], -1)
        # epsilon of the query features, taken out of the exponential and summed once for all queries
        self._floor = EPSILON * self.table.sum(1, keepdim=True)

    def read(self, q: Tensor) -> Tensor:
        """Attention output of some queries; ``q`` and the result have shape ``(tokens, heads, dim)``."""
        parts = [self._read(some) for some in q.split(tokens_per_step(q, self.projection))]
        return torch.cat([out.to(q.dtype) for out, _ in parts])

    def read_with_share(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The same, float32 or better, and the sums of the weights by which it was divided, ``(tokens, heads, 1)``."""
        parts = [self._read(some) for some in q.split(tokens_per_step(q, self.projection))]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _read(self, q: Tensor) -> tuple[Tensor, Tensor]:
        u, g = self.scratch.exponents(q, self.projection)
        phi = u.sub_(g.add_(u.amax(-1, keepdim=True))).exp_()
        both = torch.baddbmm(self._floor, phi.transpose(0, 1), self.table).transpose(0, 1)
        return both[..., :-1] / both[..., -1:], both[..., -1:]

    def map(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights of some queries to some of the keys that are in the sums.

        Parameters
        ----------
        q, k
            Shapes ``(queries, heads, dim)`` and ``(keys, heads, dim)``.

        Returns
        -------
        Shape ``(heads, queries, keys)``, float32 or better.
        """
        u, g = _exponents(q, self.projection)
        phi_q = u.sub_(g.add_(u.amax(-1, keepdim=True))).exp_().add_(EPSILON)
        u, g = _exponents(k, self.projection)
        phi_k = u.sub_(g.add_(self.maximum[:, None])).exp_().add_(EPSILON)
        share = (phi_q * self.weights).sum(-1).T
        return (phi_q.transpose(0, 1) @ phi_k.permute(1, 2, 0)).div_(share[..., None])


def shared_maxima(sums: Sequence[KeySums], key_max: KeyMax) -> list[Tensor]:
    """The maximum that each sequence of a batch has to use, given the sums over all of its keys."""
    check_key_max(key_max)
    if key_max == "head":
        return [item.maximum for item in sums]
    per_cell = torch.stack([item.maximum.amax() for item in sums])
    return list(per_cell) if key_max == "cell" else [per_cell.amax()] * len(sums)
