"""The processes that share a run (`torchrun`, `accelerate launch`); with one process, these functions pass everything through.

Every process has the same recipe and takes the same decisions. The processes differ only in the batches that they read.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from adapt_pruner.core import heartbeat
from adapt_pruner.core.words import span
from adapt_pruner.errors import RunError, UsageError, first_line, of_all

__all__ = ["agreed", "any_of", "check_alone", "is_main", "joined", "on_main", "rank", "share", "size", "sum_in_place"]

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # one process tokenises a whole text while the others wait; `heartbeat` tells whether it is alive
_GATHERING = timedelta(minutes=10)  # by then all processes must have started
_alone = threading.Event()  # set while this process works alone and the others wait for it


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def check_alone(command: str) -> None:
    """Refuse to share the work of a command that cannot be shared.

    Raises:
        UsageError: a launcher started several processes.
    """
    number = max(size(), _num_started())
    if number > 1:
        raise of_all(
            UsageError(
                f"{command} works in one process, and {number} were started; start it without torchrun or accelerate, since only "
                "`adapt-pruner run` shares its work"
            )
        )


@contextmanager
def joined(*, lost: Callable[[str], object]) -> Iterator[None]:
    """Within this context the processes of a launcher are connected: by gloo on CPUs, NCCL on GPUs.

    Args:
        lost: called with a sentence, in a thread of its own, when another process has stopped or disappeared. This process then
            waits for it inside a call that nothing can interrupt, so `lost` must end this process.

    Raises:
        RunError: not all processes can be reached, or one has ended.
    """
    if _num_started() < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    def tell(peer: int) -> None:
        lost(
            f"process {peer} has sent nothing for {span(heartbeat.SILENCE)}: it was stopped, or its machine is gone; stop what "
            "is left of it and run the same command, which continues from the last checkpoint"
        )

    met = False
    try:
        store, its_rank, number = next(dist.rendezvous("env://", timeout=_GATHERING))  # type: ignore[attr-defined]
        beats = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        with heartbeat.listening(beats, rank=its_rank, size=number, lost=tell, busy=_alone.is_set):
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=its_rank, world_size=number, timeout=_PATIENCE)
            met = True
            try:
                yield
            finally:
                dist.destroy_process_group()
    except RuntimeError as error:
        if not _is_of_the_others(error):
            raise
        trouble = RunError(
            f"another process has ended or cannot be reached ({first_line(error)}); see its message, then run the same command, "
            "which continues from the last checkpoint"
        )
        raise of_all(trouble) if met else trouble from error  # a process that meets no other may be the only one


def _is_of_the_others(error: RuntimeError) -> bool:
    """Whether a torch error means that another process could not be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def share(items: Sequence[T]) -> Sequence[T]:
    """The items for this process: every `size()`-th, starting at number `rank()`."""
    return items[rank() :: size()] if size() > 1 else items


def sum_in_place(*tensors: Tensor) -> None:
    """Replace, in place, each tensor by its sum over all processes."""
    if size() > 1:
        for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()


def any_of(flag: bool) -> bool:
    """Whether `flag` is set on any process. Every process must call this."""
    count = torch.tensor(float(flag))
    sum_in_place(count)
    return bool(count)


def on_main(do: Callable[[], T]) -> T:
    """Call `do` on the main process only, and return its result on every process. The others wait.

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
    result, trouble = agreed(outcome)
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
