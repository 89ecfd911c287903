"""Work ahead in a second thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")

_END = object()


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield ``items`` while the next one is made in another thread, always the same one.

    At most two items exist at a time: the one in use and the next. HDF5 files are therefore touched by one thread
    only. An error in ``items`` is raised when its item is asked for.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="scfm-reader") as pool:
        upcoming = pool.submit(next, iterator, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = pool.submit(next, iterator, _END)
            yield item
            del item
