"""Writing a file whole or not at all, and the files of a folder."""

import errno
import os
import uuid
from pathlib import Path

__all__ = ["files_in", "sync", "why", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


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
