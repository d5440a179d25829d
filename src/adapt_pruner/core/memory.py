"""How much memory the process has held, and handing back what it holds no more."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process that runs another engine does not hold torch for a figure
    from torch import nn

__all__ = ["drop_pages", "give_back", "mapped_files", "peak_bytes", "peak_rss_bytes"]

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
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def mapped_files() -> list[range]:
    """Addresses at which this process has files mapped; none where the system does not tell (/proc/self/maps)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    fields = (line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines())
    spans = (span.split("-") for span, _, _, _, inode, *_ in fields if inode != "0")
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def drop_pages(address: int, size: int, files: list[range]) -> None:
    """Take out of memory the whole pages of `size` bytes at `address`, if they are a file's; the system reads them again when they are asked for.

    Bytes that were written there since, which no file has, are lost. Memory that is no part of `files` is left alone.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(first in file and last - 1 in file for file in files):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
