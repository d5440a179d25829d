"""Processes that share a run hear of each other while it lasts, so that one that stands still is given up after minutes.

A process that waits for another cannot tell whether the other works alone, as it may for hours (it reads a whole text, scores tasks,
writes a checkpoint), or was stopped, or lies on a machine that is gone. So each has a thread that counts, whatever the process works on,
and looks at how far the others have counted. One whose count stands still for `SILENCE` seconds is lost.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["SILENCE", "listening"]

SILENCE = 300.0  # seconds; longer than one call of a library holds Python's lock
_BEAT = 5.0  # seconds between two counts


@contextmanager
def listening(store: Any, *, rank: int, size: int, lost: Callable[[int], object], busy: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, count for the other processes and look at their counts.

    Args:
        store: torch's key-value store of the processes; used by nobody else, since one call of it waits for another.
        rank: number of this process.
        size: number of processes.
        lost: called with the number of a process that was not heard of for `SILENCE` seconds, from a thread of its own.
        busy: whether this process is at something that is not to be cut short; `lost` waits for its end.
    """
    over = threading.Event()
    heard = {peer: time.monotonic() for peer in range(size) if peer != rank}
    threads = [
        threading.Thread(target=_count, args=(store, rank, heard, over), daemon=True),
        threading.Thread(target=_watch, args=(heard, over, lost, busy), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(timeout=_BEAT)  # one that asks a store which does not answer is left behind


def _count(store: Any, rank: int, heard: dict[int, float], over: threading.Event) -> None:
    """Count in the store, and note when another's count has moved on."""
    store.set_timeout(timedelta(seconds=max(1.0, _BEAT)))
    counts: dict[int, bytes] = {}
    number = 0
    while not over.is_set():
        try:
            store.set(str(rank), str(number := number + 1))
            for peer in heard:
                if store.check([str(peer)]) and (count := store.get(str(peer))) != counts.get(peer):
                    counts[peer], heard[peer] = count, time.monotonic()
        except RuntimeError:
            pass  # the store may be with a process that stands still
        over.wait(_BEAT)


def _watch(heard: dict[int, float], over: threading.Event, lost: Callable[[int], object], busy: Callable[[], bool]) -> None:
    """Call `lost` when another process was not heard of for too long; time in which this one stood still itself does not count."""
    before = time.monotonic()
    while not over.wait(min(_BEAT, SILENCE / 4)):
        now = time.monotonic()
        if now - before > 4 * _BEAT:
            heard.update(dict.fromkeys(heard, now))
        before = now
        silent = [peer for peer, when in heard.items() if now - when > SILENCE]
        if silent and not busy():
            lost(silent[0])
            return
