"""Writing a file or folder whole or not at all, taking one away in one step, and the files of a folder.

What is being written lies beside its place as `.NAME.partial-` and eight hexadecimal digits; so does what is being removed. After a process
was killed, `tidy` takes such remains away.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["files_in", "folder_beside", "remove", "sync", "tidy", "whole_file", "why", "write_whole"]

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, a file at which takes its place at the end, or is removed when anything goes wrong.

    Raises:
        OSError: it could not be written.
    """
    partial = _beside(path)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for the caller to fill and rename; what is still there at the end is removed.

    Raises:
        OSError: it could not be made.
    """
    partial = _beside(path)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove, in place, a file or folder; what is half removed does not bear its name."""
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
    """Remove, in place, what lies in a folder half-written or half-removed; nothing where there is no folder."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            remove(path)


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a folder and the folders in it, by their names within it with / between, in their order."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def why(error: OSError) -> str:
    """What was wrong, as a person would say it."""
    return "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))


def sync(path: Path) -> None:
    """Have a file or folder on the disk, whatever happens to the machine next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
