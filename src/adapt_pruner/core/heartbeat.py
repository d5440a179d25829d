"""Processes that share a run watch each other, so that a run is given up within minutes once one of them has stopped.

A process that waits for another cannot tell why. The other may be working alone, perhaps for hours: it reads a whole text, scores
tasks, writes a checkpoint. Or it was stopped, or its machine is gone. So each process has a thread that counts up all the time
and watches the counts of the others. A process whose count does not move for `SILENCE` seconds is lost.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["SILENCE", "listening"]

SILENCE = 300.0  # seconds; longer than any single library call holds Python's lock
_BEAT = 5.0  # seconds between two counts


@contextmanager
def listening(store: Any, *, rank: int, size: int, lost: Callable[[int], object], busy: Callable[[], bool]) -> Iterator[None]:
    """Within this context, count for the other processes and watch their counts.

    Args:
        store: torch's key-value store of the processes. Nothing else may use this connection, since its calls wait for each
            other.
        rank: number of this process.
        size: number of processes.
        lost: called from a thread of its own with the number of a process that was silent for `SILENCE` seconds.
        busy: whether this process is at work that must not be interrupted; `lost` is called after that work.
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
            thread.join(timeout=_BEAT)  # a thread whose store does not answer is left behind


def _count(store: Any, rank: int, heard: dict[int, float], over: threading.Event) -> None:
    """Count in the store, and note when another process's count has moved on."""
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
            pass  # the process that holds the store may have stopped
        over.wait(_BEAT)


def _watch(heard: dict[int, float], over: threading.Event, lost: Callable[[int], object], busy: Callable[[], bool]) -> None:
    """Call `lost` when another process was silent for too long; time in which this process itself stood still does not count."""
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
