"""Use as many threads as the machine leaves this process cores, where that is faster.

The threads of a pass wait for each other many times. If other work, or a limit on this process, leaves them fewer cores than there
are threads, each time lasts until the system has run them all in turn.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.core.events.words import counted
from adapt_pruner.core.system import world
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.weights import taylor
from adapt_pruner.work import Work

__all__ = ["ENOUGH", "fit_threads", "in_words", "kept_threads", "random_rows", "score_rows", "seconds_of"]

_TOKENS = 128  # of the pass that is timed
_BUSY = 0.75  # cores that this process gets per thread; below, fewer threads may be faster
_GAIN = 2.0  # times that fewer threads have to be faster: on an idle machine a short pass gains less
ENOUGH = 10.0
"""Seconds of a pass over one row; a slower one is not repeated."""


def fit_threads(work: Work) -> str:
    """Use fewer threads from now on if the run's model is then scored in half of the time; only on a CPU, in a single process.

    Returns:
        How many threads are used, in words.
    """
    threads = torch.get_num_threads()
    if threads == 1 or next(work.model.parameters()).device.type != "cpu" or world.size() > 1:
        return in_words()
    return _fitted(partial(score_rows, work, random_rows(work.model, 1, _TOKENS)))


def random_rows(model: Any, count: int, length: int) -> Tensor:
    """Random tokens to time a pass with, int64 [count, length] on the CPU; the same each time."""
    return torch.randint(model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def score_rows(work: Work, rows: Tensor) -> None:
    """The pass that is timed: score a run's model on these rows by first-order Taylor."""
    axes = [axis for axis in work.axes if axis.layer is not None or axis.kind in work.recipe.axes]
    score(work.model, axes, [rows], metrics=[taylor], dtype=work.recipe.dtype)


def _fitted(do: Callable[[], object]) -> str:
    threads = torch.get_num_threads()
    for _ in range(2):  # the first of a process takes longest
        began = time.process_time()
        took = seconds_of(do)
        cores = (time.process_time() - began) / took
        if took > ENOUGH:
            break
    if cores >= _BUSY * threads:
        return in_words()
    fewer = min(threads - 1, max(1, round(cores)))
    torch.set_num_threads(fewer)
    faster = seconds_of(do)
    torch.set_num_threads(threads)
    if min(took, seconds_of(do)) < _GAIN * faster:  # asked again, since other work may have ended meanwhile
        return in_words()
    torch.set_num_threads(fewer)
    return f"{fewer} of {threads} threads, which is faster at present"


@contextmanager
def kept_threads() -> Iterator[None]:
    """After this context as many threads are used as before it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_words() -> str:
    """How many threads are used."""
    threads = torch.get_num_threads()
    return counted(threads, "thread")


def seconds_of(do: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    do()
    return max(time.perf_counter() - began, 1e-6)
