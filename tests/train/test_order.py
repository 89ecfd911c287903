"""Which cells share a micro-batch."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from scfm.train._order import Order

CELLS = np.sort(np.random.default_rng(0).choice(2000, size=1003, replace=False))


def take(order: Order, steps: int, lanes=None, first_step: int = 0):
    lanes = range(order.lanes) if lanes is None else lanes
    visits = islice(order.visits(lanes, first_step), steps * len(lanes))
    return {visit.number: visit.rows.tolist() for visit in visits}


@pytest.mark.parametrize("options", [{}, {"buffer_cells": 64}, {"block_size": 16}, {"tokens_per_batch": 400}])
def test_an_epoch_has_each_cell_at_most_once_and_the_next_one_another_order(options):
    if "block_size" in options:
        pytest.importorskip("scdataset")
    lengths = np.random.default_rng(1).integers(10, 100, size=len(CELLS))
    order = Order(CELLS, lanes=3, batch_size=8, lengths=lengths, seed=5, **options)
    steps = order.steps_per_epoch
    epoch = take(order, steps)
    assert sorted(epoch) == list(range(3 * steps))
    seen = np.concatenate(list(epoch.values()))
    assert len(np.unique(seen)) == len(seen)
    assert set(seen) <= set(CELLS)
    assert len(seen) > 0.9 * len(CELLS)
    following = take(order, steps, first_step=steps)
    assert len(set(np.concatenate(list(following.values()))) & set(seen)) > 0.8 * len(CELLS)
    assert following[3 * steps] != epoch[0]
    assert take(Order(CELLS, lanes=3, batch_size=8, lengths=lengths, seed=6, **options), 1) != take(order, 1)


def test_processes_share_the_micro_batches_of_one():
    order = Order(CELLS, lanes=4, batch_size=8, buffer_cells=128)
    alone = take(order, 40)
    first, second = take(order, 40, range(0, 4, 2)), take(order, 40, range(1, 4, 2))
    assert not first.keys() & second.keys()
    assert first | second == alone


@pytest.mark.parametrize("tokens", [None, 300])
def test_a_run_goes_on_anywhere(tokens):
    lengths = np.random.default_rng(1).integers(10, 100, size=len(CELLS))
    order = Order(CELLS, lanes=2, batch_size=8, buffer_cells=64, tokens_per_batch=tokens, lengths=lengths)
    steps = 2 * order.steps_per_epoch + 3
    alone = take(order, steps)
    for first_step in (1, order.steps_per_epoch, steps - 2):
        rest = take(order, steps - first_step, first_step=first_step)
        assert rest == {number: rows for number, rows in alone.items() if number >= 2 * first_step}


def test_a_token_budget_holds_with_padding():
    lengths = np.random.default_rng(1).integers(10, 100, size=len(CELLS))
    order = Order(CELLS, lanes=2, batch_size=32, tokens_per_batch=500, lengths=lengths)
    length_of = dict(zip(CELLS.tolist(), lengths.tolist(), strict=True))
    batches = take(order, order.steps_per_epoch).values()
    assert max(len(rows) * max(length_of[row] for row in rows) for rows in batches) <= 500
    assert max(map(len, batches)) > 2 * min(map(len, batches))  # many short cells or few long ones


def test_neighbours_are_read_together():
    pytest.importorskip("scdataset")
    order = Order(np.arange(4096), lanes=2, batch_size=16, block_size=64, buffer_cells=1024)
    rows = order.epoch(0).buffer_cells(1, 2)
    assert len(rows) == 512
    assert (np.diff(rows) > 1).sum() + 1 <= 512 // 64 + 1
    batch = order.epoch(0).buffer(1, 2)[0]
    assert len({row // 64 for row in batch.tolist()}) > 4  # but do not share a micro-batch


def test_too_few_cells_are_an_error():
    with pytest.raises(ValueError, match="fewer than one optimiser step"):
        Order(np.arange(15), lanes=2, batch_size=8)
