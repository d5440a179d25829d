"""How much memory the process has held, and handing back what it holds no more."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process that runs another engine does not hold torch for a figure
    from collections.abc import Iterable

    from torch import Tensor, nn

__all__ = ["give_back", "peak_bytes", "peak_rss_bytes", "take_into_memory"]

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes.

    From /proc where there is one: what `getrusage` tells a process on Linux counts what its parent held when it started it.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(model: nn.Module) -> int:
    """The most memory held so far on the device of `model`, in bytes: of the GPU, or of this process."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)


def give_back() -> None:
    """Hand what is free to the system, where the C library is glibc: it keeps tensors' memory in its heaps, in pieces that the next phase cannot use."""
    if sys.platform == "linux":
        _call_glibc("malloc_trim", 0)


def take_into_memory(tensors: Iterable[Tensor]) -> None:
    """Give tensors, in place, memory of their own, aligned, where they still lie in a file.

    A product may round differently where a tensor is not aligned, a file that is removed meanwhile would keep its place on
    the disk, and one that is overwritten would change the model. The file's pages go one by one: all of them stay else until
    the last tensor has left, and the model is held twice.
    """
    files = _mapped_files()
    for tensor in tensors:
        there = tensor.data
        tensor.data = there.clone()
        _drop_pages(there.data_ptr(), there.nbytes, files)


def _mapped_files() -> list[range]:
    """Addresses at which this process has files mapped; none where the system does not tell (/proc/self/maps)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    fields = (line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines())
    spans = (span.split("-") for span, _, _, _, inode, *_ in fields if inode != "0")
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def _drop_pages(address: int, size: int, files: list[range]) -> None:
    """Take whole pages out of memory if they are a file's, which the system reads again; what was written there since is lost."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(first in file and last - 1 in file for file in files):
        _call_glibc("madvise", ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _call_glibc(function: str, *arguments: Any) -> None:
    """Call a function of the C library where that is glibc; where it is another, nothing."""
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
