"""Use as many threads as the machine leaves this process cores, where that is faster.

The threads of a pass wait for each other many times. If other work, or a limit on this process, leaves them fewer cores than there
are threads, each time lasts until the system has run them all in turn.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from adapt_pruner.core import world
from adapt_pruner.core.words import counted
from adapt_pruner.reduce.work import Work
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.weights import taylor

__all__ = ["ENOUGH", "fit_threads", "in_words", "kept_threads", "seconds"]

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
    batch = torch.randint(work.model.config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    axes = [axis for axis in work.axes if axis.layer is not None]
    return _fitted(lambda: score(work.model, axes, [batch], metrics=[taylor], dtype=work.recipe.dtype))


def _fitted(do: Callable[[], object]) -> str:
    threads = torch.get_num_threads()
    for _ in range(2):  # the first of a process takes longest
        began = time.process_time()
        took = seconds(do)
        cores = (time.process_time() - began) / took
        if took > ENOUGH:
            break
    if cores >= _BUSY * threads:
        return in_words()
    fewer = min(threads - 1, max(1, round(cores)))
    torch.set_num_threads(fewer)
    faster = seconds(do)
    torch.set_num_threads(threads)
    if min(took, seconds(do)) < _GAIN * faster:  # asked again, since other work may have ended meanwhile
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


def seconds(do: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    do()
    return max(time.perf_counter() - began, 1e-6)
