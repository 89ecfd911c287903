"""Places for the labelled nodes of a graph, so that no label covers another."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, shortest_path

_STEPS = 150
_PUSHES = 600
_GAP = 0.08


def layout(n: int, source: np.ndarray, target: np.ndarray, sizes: np.ndarray, *, aspect: float = 1.25) -> np.ndarray:
    """Centres of the boxes of all nodes, in the unit of ``sizes``.

    Within each connected part, distances in the picture follow those in the graph (stress majorisation). Parts are put side
    by side, and boxes that still overlap are pushed apart. The same graph gets the same picture.

    Parameters
    ----------
    n
        Number of nodes.
    source, target
        Ends of the edges.
    sizes
        Width and height of each node's label, ``(n, 2)``.
    aspect
        Wanted ratio of width to height of the picture.
    """
    graph = csr_matrix((np.ones(len(source)), (source, target)), shape=(n, n))
    n_parts, part = connected_components(graph, directed=False)
    distance = shortest_path(graph, directed=False, unweighted=True)
    # about what two boxes beside each other need, and more where there are few
    length = (0.5 * sizes[:, 0].mean() + 1.6 * sizes[:, 1].mean()) * np.clip(1.7 - n / 120, 1, 1.6)
    room = sizes + np.clip(0.16 - n / 600, 0, None)
    places = np.zeros((n, 2))
    boxes = []
    for number in range(n_parts):
        nodes = np.flatnonzero(part == number)
        inside = _stress(distance[np.ix_(nodes, nodes)]) * length
        places[nodes] = push_apart(_wide(inside, aspect), room[nodes])
        low, high = _frame(places[nodes], sizes[nodes])
        places[nodes] -= low
        boxes.append((nodes, high - low))
    _shelve(places, boxes, aspect)
    return places - _frame(places, sizes)[0]


def _stress(distance: np.ndarray) -> np.ndarray:
    """Places in the plane whose distances are those of the graph, near ones first (SMACOF)."""
    n = len(distance)
    if n == 1:
        return np.zeros((1, 2))
    places = _start(distance)
    weight = 1 / np.where(np.eye(n, dtype=bool), 1, distance) ** 2
    np.fill_diagonal(weight, 0)
    laplacian = np.diag(weight.sum(1)) - weight
    inverse = np.linalg.pinv(laplacian)
    for _ in range(_STEPS):
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
        ratio = -weight * distance / np.maximum(apart, 1e-9)
        np.fill_diagonal(ratio, 0)
        np.fill_diagonal(ratio, -ratio.sum(1))
        places = inverse @ (ratio @ places)
    return places


def _start(distance: np.ndarray) -> np.ndarray:
    """Classical scaling, a little disturbed, because nodes with the same neighbours would stay in one place."""
    n = len(distance)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ distance**2 @ centre)
    # the sign of an eigenvector is arbitrary
    vectors = vectors[:, -2:] * np.where(vectors[np.abs(vectors).argmax(0), np.arange(n)][-2:] < 0, -1, 1)
    places = vectors * np.sqrt(np.maximum(values[-2:], 0))
    if places.shape[1] < 2:
        places = np.column_stack([places, np.zeros(n)])
    return places + np.random.default_rng(0).normal(0, 0.05, places.shape)


def _wide(places: np.ndarray, aspect: float) -> np.ndarray:
    """Turned so that the longer side lies flat, and stretched a little towards the wanted ratio."""
    if len(places) < 2:
        return places
    centred = places - places.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    turned = centred @ axes[:, ::-1]
    turned *= np.where(turned[np.abs(turned).argmax(0), [0, 1]] < 0, -1, 1)
    ratio = np.ptp(turned[:, 0]) / max(np.ptp(turned[:, 1]), 1e-9)
    if ratio > aspect:
        turned[:, 1] *= min(1.6, ratio / aspect)
    return turned


def push_apart(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Move boxes until none overlaps another; all are spread first if there is much overlap.

    Parameters
    ----------
    places
        Centres, ``(n, 2)``.
    sizes
        Widths and heights, ``(n, 2)``.
    """
    places = places.copy()
    if len(places) < 2:
        return places
    needed = (sizes[:, None] + sizes[None]) / 2 + _GAP
    random = np.random.default_rng(0)
    for step in range(_PUSHES):
        between = places[:, None] - places[None]
        lacking = np.clip(needed - np.abs(between), 0, None)
        np.einsum("iij->ij", lacking)[:] = 0
        overlap = (lacking > 1e-6).all(-1)
        if not overlap.any():
            return places
        if step % 20 == 19:
            # crowded: make room everywhere
            places = places.mean(0) + (places - places.mean(0)) * 1.05
            continue
        # along the direction in which less is lacking
        along = lacking.argmin(-1)
        sign = np.sign(np.take_along_axis(between, along[..., None], -1)[..., 0])
        tie = (sign == 0) & overlap
        if tie.any():
            flips = np.triu(random.choice([-1.0, 1.0], sign.shape), 1)
            sign = np.where(tie, flips - flips.T, sign)
        shift = np.where(overlap, sign * np.take_along_axis(lacking, along[..., None], -1)[..., 0] * 0.52, 0)
        for axis in (0, 1):
            places[:, axis] += np.where(along == axis, shift, 0).sum(1) / np.maximum(1, overlap.sum(1)) ** 0.5
    return places


def _frame(places: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (places - sizes / 2).min(0), (places + sizes / 2).max(0)


def _shelve(places: np.ndarray, boxes: list[tuple[np.ndarray, np.ndarray]], aspect: float) -> None:
    """Put the parts into rows, tall ones first; changes ``places``."""
    gap = 3 * _GAP
    areas = sum(float(np.prod(size + gap)) for _, size in boxes)
    width = max(1.15 * np.sqrt(areas * aspect), max(size[0] for _, size in boxes))
    left = top = height = 0.0
    for nodes, size in sorted(boxes, key=lambda box: -box[1][1]):
        if left > 0 and left + size[0] > width:
            left, top, height = 0.0, top + height + gap, 0.0
        places[nodes] += [left, top]
        left, height = left + size[0] + gap, max(height, size[1])
    # the first row is the upper one
    places[:, 1] = -places[:, 1]
