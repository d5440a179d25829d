"""Write a file or folder whole or not at all, remove one in one step, and list the files of a folder.

While a file is written or removed, it lies beside its place under the name `.NAME.partial-` and eight hexadecimal digits. `tidy`
removes such files after a process was killed.
"""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapt_pruner.errors import UsageError

__all__ = [
    "MOST_TEXT",
    "check_regular",
    "files_in",
    "folder_beside",
    "remove",
    "sync",
    "tidy",
    "whole_file",
    "why",
    "write_whole",
]

MOST_TEXT = 2**28
"""Bytes of a file of somebody else's that is read whole: JSON, YAML, a tokenizer. The longest known tokenizer.json has 2^25."""

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


def check_regular(path: Path, *, most: int | None = MOST_TEXT) -> None:
    """Refuse what is no regular file, which may never end, and one that is too large to be read whole; what is not there passes.

    Args:
        path: of a file that somebody else may have put there; a link counts as what it leads to.
        most: bytes it may have; None where it is not read whole.

    Raises:
        UsageError: it is a device, a pipe or a socket, or larger.
    """
    try:
        found = path.stat()
    except OSError:
        return  # who reads it says what is wrong
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UsageError(f"{path} is a device, a pipe or a socket; put a regular file there, or remove it")
    if most is not None and stat.S_ISREG(found.st_mode) and found.st_size > most:
        raise UsageError(f"{path} has {found.st_size:,} bytes, and at most {most:,} are read; get the right file")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file that is written there replaces `path` at the end, or is removed on an error.

    Raises:
        OSError: the file could not be written.
    """
    partial = _beside(path)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: the file could not be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`. The caller fills and renames it; a folder that was not renamed is removed at the end.

    Raises:
        OSError: the folder could not be created.
    """
    partial = _beside(path)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so that nothing half-removed has its name."""
    if not _PARTIAL.fullmatch(path.name):
        try:
            path = path.rename(_beside(path))
        except FileNotFoundError:
            return  # what another process puts there meanwhile stays
        except OSError:
            pass  # it is removed where it is, as far as that can be done
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove half-written and half-removed files from a folder, in place; does nothing if the folder does not exist."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            remove(path)


def files_in(folder: Path) -> dict[str, Path]:
    """All files in a folder and its subfolders: path within the folder, with /, -> file, sorted."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def why(error: OSError) -> str:
    """What went wrong, in words for people."""
    return "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))


def sync(path: Path) -> None:
    """Write a file or folder through to the disk (fsync), so that it survives a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
