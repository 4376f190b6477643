"""Threads for the kernels, which hold no lock while they run."""

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

from .protocol import Kernels

MAX_THREADS = 8  # that each hold a part of a tensor in memory

ENOUGH = 1 << 19  # weights that keep a thread busy for longer than it takes to start, 0.1 ms

RANGES = 4  # per thread, as some are faster than others

Item = TypeVar("Item")

Result = TypeVar("Result")

_this_thread = threading.local()


def cores() -> int:
    """How many threads may run kernels: the cores of this process, at most NUMBA_NUM_THREADS."""
    import numba

    config: Any = numba.config
    most: int = config.NUMBA_NUM_THREADS
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else most
    return min(most, allowed)


def max_threads(kernels: Kernels) -> int:
    """How many threads may call the kernels at the same time, each for a part of a tensor."""
    return min(cores(), MAX_THREADS) if kernels.device == "cpu" else 1


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Generator[Result]:
    """work(item) for every item, in their order; on several threads, which start no others."""
    threads = min(threads, len(items))
    if threads < 2 or hasattr(_this_thread, "is_ours"):
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=_mark_thread) as pool:  # ends: a fork is safe
        yield from pool.map(work, items)


def share_out(work: Callable[[int, int], None], count: int, weights: int) -> None:
    """work(start, stop) for ranges that make up range(count), on several threads if it is long.

    Parameters
    ----------
    weights : how many it goes through; those that it goes through twice count twice
    """
    threads = min(cores(), weights // ENOUGH)
    ranges = min(threads * RANGES, count) if threads > 1 else 1
    spans = list(pairwise(count * i // ranges for i in range(ranges + 1)))
    for _ in side_by_side(lambda span: work(*span), spans, threads):
        pass


def _mark_thread() -> None:
    _this_thread.is_ours = True
