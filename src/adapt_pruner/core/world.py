"""The processes that share a run (`torchrun`, `accelerate launch`); with one process, these functions pass everything through.

Every process has the same recipe and takes the same decisions. The processes differ only in the batches that they read.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from adapt_pruner.errors import RunError, UsageError

__all__ = ["agreed", "is_main", "joined", "on_main", "rank", "share", "size", "sum_in_place"]

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # one process tokenises a whole text while the others wait


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


@contextmanager
def joined() -> Iterator[None]:
    """Connect the processes that a launcher started, while the context lasts: gloo on CPUs, NCCL on GPUs."""
    if _num_started() < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """The items for this process: every `size()`-th, from number `rank()` on."""
    return items[rank() :: size()] if size() > 1 else items


def sum_in_place(*tensors: Tensor) -> None:
    """Replace, in place, each tensor by its sum over all processes."""
    if size() > 1:
        for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()


def on_main(do: Callable[[], T]) -> T:
    """Call `do` on the main process only, and return its result on every process; the others wait.

    Raises:
        UsageError, RunError: `do` raised it; then every process raises it.
    """
    if size() == 1:
        return do()
    told: tuple[T | None, UsageError | RunError | None] = (None, None)
    if is_main():
        try:
            told = (do(), None)
        except (UsageError, RunError) as error:
            told = (None, error)
    result, trouble = agreed(told)
    if trouble is not None:
        raise trouble
    return cast(T, result)


def agreed(value: T) -> T:
    """The main process's `value`, on every process; plain data and CPU tensors only."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
