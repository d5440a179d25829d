"""The processes that share a run (`torchrun`, `accelerate launch`); with one process, these functions pass everything through.

Every process has the same recipe and takes the same decisions. The processes differ only in the batches that they read.

They watch each other, so that a run is given up within minutes once one of them has stopped. A process that waits for another cannot tell why. The other may be working alone, perhaps for hours: it reads a whole text, scores
tasks, writes a checkpoint. Or it was stopped, or its machine is gone. So each process has a thread that counts up all the time
and watches the counts of the others. A process whose count does not move for `SILENCE` seconds is lost.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from adapt_pruner.core.events.words import span
from adapt_pruner.errors import RunError, UsageError, first_line, of_all

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # one process tokenises a whole text while the others wait; `listening` tells whether it is alive
_GATHERING = timedelta(minutes=10)  # by then all processes must have started
_alone = threading.Event()  # set while this process works alone and the others wait for it
_apart = threading.Event()  # set while each process works as if it were the only one


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not _apart.is_set() else 1


def rank() -> int:
    """Number of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0)) if _num_started() > 1 else 0


def is_main() -> bool:
    """Whether this is the main process, which alone prints and writes files."""
    return rank() == 0


def _num_started() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_alone(command: str, why: str) -> None:
    """Refuse to share the work of a command that cannot be shared, for the reason `why`.

    Raises:
        UsageError: a launcher started several processes.
    """
    number = max(size(), _num_started())
    if number > 1:
        raise of_all(
            UsageError(
                f"{command} works in one process, since {why}, and {number} were started; start it without torchrun or accelerate: "
                "`prune`, `run` and `shrink` share their work"
            )
        )


@contextmanager
def apart() -> Iterator[None]:
    """Within this context every process works as if it were the only one, all at the same time."""
    _apart.set()
    try:
        yield
    finally:
        _apart.clear()


@contextmanager
def joined(*, lost: Callable[[str], object]) -> Iterator[None]:
    """Within this context the processes of a launcher are connected: by gloo on CPUs, NCCL on GPUs.

    Args:
        lost: called with a sentence, in a thread of its own, when another process has stopped or disappeared. This process then
            waits for it inside a call that nothing can interrupt, so `lost` must end this process.

    Raises:
        UsageError: the launcher did not say where the processes meet.
        RunError: not all processes can be reached, or one has ended.
    """
    if _num_started() < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    def tell(peer: int) -> None:
        lost(
            f"process {peer} has sent nothing for {span(SILENCE)}: it was stopped, or its machine is gone; stop what "
            "is left of it and run the same command again; `run` and `shrink` continue from the last checkpoint"
        )

    met = False
    try:
        store, mine, number = next(dist.rendezvous("env://", timeout=_GATHERING))  # type: ignore[attr-defined]
        beats = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        with listening(beats, rank=mine, size=number, lost=tell, busy=_alone.is_set):
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=mine, world_size=number, timeout=_PATIENCE)
            met = True
            try:
                yield
            finally:
                dist.destroy_process_group()
    except ValueError as error:
        if met or isinstance(error, UsageError):
            raise
        raise UsageError(
            f"WORLD_SIZE says that {_num_started()} processes were started, but not where they meet ({first_line(error)}); start them with "
            "torchrun or accelerate, or remove WORLD_SIZE from the environment"
        ) from error
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # another process could not be reached
            raise
        trouble = RunError(
            f"another process has ended or cannot be reached ({first_line(error)}); see its message, then run the same command again; "
            "`run` and `shrink` continue from the last checkpoint"
        )
        raise of_all(trouble) if met else trouble from error  # a process that meets no other may be the only one


def share(items: Sequence[T]) -> Sequence[T]:
    """The items for this process: every `size()`-th, starting at number `rank()`."""
    return items[rank() :: size()] if size() > 1 else items


def sum_in_place(*tensors: Tensor) -> None:
    """Replace, in place, each tensor by its sum over all processes."""
    if size() > 1:
        for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()


def most_of(number: int) -> int:
    """The largest `number` of all processes. Every process must call this."""
    most = torch.tensor(int(number))
    if size() > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def meet() -> None:
    """Wait until every process has come here."""
    sum_in_place(torch.zeros(1))


@dataclass(frozen=True)
class _Asked:
    key: str


@contextmanager
def together(key: str) -> Iterator[None]:
    """For the main process within `on_main`: meanwhile the others call the function that they have under this key."""
    agreed(_Asked(key))
    _alone.clear()
    try:
        yield
    finally:
        _alone.set()


def on_main(do: Callable[[], T], *, helped: Mapping[str, Callable[[], object]] | None = None) -> T:
    """Call `do` on the main process only, and return its result on every process. The others wait, or help.

    Args:
        do: what the main process does.
        helped: what the others do when it asks them to by `together`.

    Raises:
        UsageError, RunError: `do` raised it; then every process raises it.
    """
    if size() == 1:
        return do()
    outcome: tuple[T | None, UsageError | RunError | None] = (None, None)
    if is_main():
        _alone.set()
        try:
            outcome = (do(), None)
        except (UsageError, RunError) as error:
            outcome = (None, error)
        finally:
            _alone.clear()
    while isinstance(answer := agreed(outcome), _Asked):
        (helped or {})[answer.key]()
    result, trouble = answer
    if trouble is not None:
        raise of_all(trouble)
    return cast(T, result)


def agreed(value: T) -> T:
    """The main process's `value`, on every process; plain data and CPU tensors only."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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
