"""Write a file or folder whole or not at all, remove one in one step, and list the files of a folder.

While a file or folder is written, it lies beside its place under the name `.NAME.partial-` and 16 hexadecimal digits. Meanwhile
its process holds a lock: on the file itself, or on the file `.lock` in the folder. Something being removed has such a name too,
but no lock. Eight of the digits are computed from the rest of the name, so no other file is mistaken for one of these. `tidy`
removes those whose process has ended. Everything that writes a file tidies the folder that it writes to.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapt_pruner.errors import UsageError

__all__ = [
    "MOST_TEXT",
    "check_regular",
    "disk_full_reason",
    "expanded",
    "file_beside",
    "files_in",
    "folder_beside",
    "named",
    "read_plain",
    "remove",
    "sync",
    "tidy",
    "weight_bytes",
    "whole_file",
    "why",
    "write_failure",
    "write_whole",
]

MOST_TEXT = 2**28
"""The most bytes of a foreign file that is read whole: JSON, YAML, a tokenizer. The longest known tokenizer.json has 2^25."""

_NAME = re.compile(r"\.(.+)\.partial-([0-9a-f]{8})([0-9a-f]{8})")
_WRITTEN, _REMOVED = "written", "removed"
_LOCK = ".lock"
_LONG = 3600.0  # seconds
_MOST_BYTES = 100  # of NAME that go into the temporary name, because file systems limit the length of names
_LACKS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than a file may be there (ulimit -f, or the file system's limit)",
}


def check_regular(path: Path, *, most: int | None = MOST_TEXT) -> None:
    """Refuse a file that is not regular, because reading it may never end, or that is too large. A missing file passes.

    Args:
        path: a file that somebody else may have put there; for a link, its target is checked.
        most: the most bytes it may have; None if it is not read whole.

    Raises:
        UsageError: it is a device, a pipe or a socket, or larger than `most`.
    """
    try:
        status = path.stat()
    except OSError:
        return  # whoever reads it reports the error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UsageError(f"{path} is a device, a pipe or a socket; put a regular file there, or remove it")
    if most is not None and stat.S_ISREG(status.st_mode) and status.st_size > most:
        raise UsageError(f"{path} has {status.st_size:,} bytes, and at most {most:,} are read; get the right file")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file written there replaces `path` at the end; on an error it is removed.

    Raises:
        OSError: the file could not be written.
    """
    with file_beside(path) as partial:
        yield partial
        sync(partial)
        partial.rename(path)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`. It is removed at the end unless it was renamed.

    Raises:
        OSError: the file could not be created.
    """
    tidy(path.parent)
    partial, lock = _locked_new(path, folder=False)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: the file could not be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`. The caller fills it and renames it with `named`; otherwise it is removed at the end.

    Raises:
        OSError: the folder could not be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
    partial, lock = _locked_new(path, folder=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def named(partial: Path, path: Path) -> Path:
    """Rename a folder that `folder_beside` made to `path`.

    Raises:
        OSError: the name is taken.
    """
    (partial / _LOCK).unlink(missing_ok=True)
    return partial.rename(path)


def remove(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so that nothing half-removed bears its name."""
    if _kind(path.name) != _REMOVED:
        try:
            path = path.rename(_beside(path, _REMOVED))
        except FileNotFoundError:
            return  # something that another process puts there meanwhile stays
        except OSError:
            pass  # it cannot be renamed, so it is removed in place as far as possible
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove from a folder, in place, what ended processes left half-written or half-removed.

    A missing folder is no error. Subfolders are not searched.
    """
    paths: list[Path] = []
    with suppress(OSError):  # a folder may be writable and still not listable
        paths = list(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        kind = _kind(path.name)
        with suppress(OSError):  # another process may be tidying, too
            if kind == _REMOVED:
                remove(path)
            elif kind == _WRITTEN:
                _remove_abandoned(path)


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights: model.safetensors, else the files that its index names; 0 if there is neither."""
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # who loads the weights tells of a damaged one
            names = set(json.loads(read_plain(index))["weight_map"].values())
    return sum(file.stat().st_size for name in names if (file := folder / str(name)).is_file())


def expanded(name: str | Path) -> Path:
    """The path that a person typed, with ~ and ~user replaced.

    Raises:
        UsageError: there is no such user, or the text cannot be a path.
    """
    if "\0" in str(name):
        raise UsageError(f"{str(name)!r} cannot be a file name: it contains the character NUL; remove it")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{str(name)!r} names the home folder of an unknown user; write the path in full") from error


def read_plain(path: Path, *, most: int = 2**30) -> bytes:
    """The content of a file. A pipe or a device, which may have no end, is not read.

    Args:
        path: the file.
        most: the most bytes it may have.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, and only files are read", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, and at most {most:,} are read", str(path))
        return file.read(status.st_size)  # a file of /proc states a size of 0, so nothing of it is read


def files_in(folder: Path) -> dict[str, Path]:
    """All files in a folder and its subfolders except the lock: path within the folder (with /) -> file, sorted."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files.pop(_LOCK, None)
    return files


def why(error: OSError) -> str:
    """What went wrong, in words for people."""
    return disk_full_reason(error) or error.strerror or str(error)


def write_failure(error: BaseException) -> str | None:
    """Why a library could not write, in words for people; None if the error is about something else than the disk."""
    return why(error) if isinstance(error, OSError) else disk_full_reason(error)


def disk_full_reason(error: BaseException) -> str | None:
    """Why there is no room for a file, in words for people; None if the error is about something else.

    Libraries wrap the system's error: Rust libraries keep its number in their text, and numpy says how much it wrote.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(match[1])
    if code is None and isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):
        code = errno.ENOSPC
    return _LACKS.get(code) if code is not None else None


def sync(path: Path) -> None:
    """Write a file or folder through to the disk (fsync), so that it survives a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, kind: str) -> Path:
    stem = os.fsencode(path.name)[:_MOST_BYTES].decode(errors="ignore")
    drawn = uuid.uuid4().hex[:8]
    return path.with_name(f".{stem}.partial-{drawn}{_digits(kind, stem, drawn)}")


def _digits(kind: str, stem: str, drawn: str) -> str:
    return hashlib.sha256(f"adapt-pruner {kind} {stem} {drawn}".encode(errors="surrogateescape")).hexdigest()[:8]


def _kind(name: str) -> str | None:
    """Whether the name is one that we give to something being written or being removed; None for other names."""
    if (parts := _NAME.fullmatch(name)) is None:
        return None
    return next((kind for kind in (_WRITTEN, _REMOVED) if _digits(kind, parts[1], parts[2]) == parts[3]), None)


def _locked_new(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new file or folder beside `path`, and the handle whose lock shows that its process is alive."""
    while True:
        partial = _beside(path, _WRITTEN)
        if folder:
            partial.mkdir()
        place = partial / _LOCK if folder else partial
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process took it for a leftover and is removing it
        except OSError:
            return partial, handle  # the file system has no locks, so nobody can tidy there
        else:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), place.stat()):
                    return partial, handle
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove something half-written if its lock exists and nobody holds it."""
    place = path / _LOCK if path.is_dir() and not path.is_symlink() else path
    try:
        handle = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if time.time() - path.lstat().st_mtime > _LONG:  # its process was killed between its last write and the rename
            remove(path)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if somebody holds it, or on a file system without locks
        remove(path)
    finally:
        os.close(handle)
