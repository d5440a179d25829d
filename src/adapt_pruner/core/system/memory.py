"""Measure the memory that the process has held, and decide when freed memory is returned to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process that runs another engine does not hold torch for a figure
    from collections.abc import Iterable, Iterator

    import torch
    from torch import Tensor, nn


_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and use, of version 2 and 1 of Linux' control groups."""
_CONTAINER = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # what mallopt calls them
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 * 2**20}  # where glibc's own adjustment ends up with large tensors


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes.

    Read from /proc if it exists. On Linux `getrusage` also counts the memory that the parent held when it started this process.
    """
    if (most := _sizes_in(_STATUS).get("VmHWM")) is not None:
        return most
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processes_here() -> int:
    """Number of processes that a launcher started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def usable_bytes() -> int | None:
    """Bytes of memory that this process may hold: those it holds, and those free on this machine and in its container.

    None if the system does not say. A container's file cache counts as free, since the kernel gives it up. Processes that torchrun
    started on this machine share what is free.
    """
    free, held = _sizes_in(_SYSTEM).get("MemAvailable"), _sizes_in(_STATUS).get("VmRSS")
    if free is None or held is None:
        return None
    for limit, used in _GROUPS:
        with suppress(OSError, ValueError):  # no such group, or its limit is `max`
            most, now = (int((_CONTAINER / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = (_CONTAINER / used).with_name("memory.stat").read_text(encoding="ascii")
            cache = sum(int(line.split()[1]) for line in stat.splitlines() if line.split()[0] in ("inactive_file", "active_file"))
            free = min(free, max(0, most - now + cache))
    return free // processes_here() + held


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that this process may use in all: what is free and what it holds; None if the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return usable_bytes()


def _sizes_in(path: Path) -> dict[str, int]:
    """The sizes in a file of /proc, in bytes; none if there is no such file."""
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def peak_bytes(model: nn.Module) -> int:
    """The most memory held so far on the model's device, in bytes: on the GPU, or by this process on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)


def give_back() -> None:
    """Return freed heap memory to the operating system (glibc only).

    glibc would keep the memory of tensors in pieces that the next phase cannot use.
    """
    if sys.platform == "linux":
        _call_glibc("malloc_trim", 0)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Keep freed memory for the next tensors while the context lasts (glibc only); at its end, return it to the system.

    glibc takes the memory of each large tensor from the system and returns it when the tensor is freed, and the system fills
    every new page with zeros. For work that allocates the same tensors again and again, such as training, that is a fifth of the
    processor's time. Results are the same to the last bit.
    """
    _call_glibc("mallopt", _MMAP_MAX, 0)
    _call_glibc("mallopt", _TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            _call_glibc("mallopt", option, value)
        give_back()


def take_into_memory(tensors: Iterable[Tensor]) -> None:
    """Copy tensors that lie in a mapped file, in place, to aligned memory of their own.

    Without a copy, a product of a tensor that is not aligned may round differently, a removed file keeps its place on the disk,
    and an overwritten file changes the model. The file's pages are dropped tensor by tensor; otherwise all pages stay until the
    last tensor is copied, and the model is held twice.
    """
    files = _mapped_files()
    for tensor in tensors:
        mapped = tensor.data
        tensor.data = mapped.clone()
        _drop_pages(mapped.data_ptr(), mapped.nbytes, files)


def _mapped_files() -> list[range]:
    """Addresses at which this process has mapped files, by /proc/self/maps; none if the system lacks that file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    fields = (line.split(maxsplit=5) for line in maps.read_text(encoding="utf-8", errors="replace").splitlines())
    spans = (span.split("-") for span, _, _, _, inode, *_ in fields if inode != "0")
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def _drop_pages(address: int, size: int, files: list[range]) -> None:
    """Drop whole pages of a mapped file from memory. The system can read them again; changes made to them are lost."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(first in file and last - 1 in file for file in files):
        _call_glibc("madvise", ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _call_glibc(function: str, *arguments: Any) -> None:
    """Call a function of glibc; do nothing with another C library."""
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
