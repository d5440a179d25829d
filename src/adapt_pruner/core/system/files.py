"""Write a file or folder whole or not at all, if it can be written there at all; know our own files; list and remove them.

While a file or folder is written, it lies beside its place under the name `.NAME.partial-` and 16 hexadecimal digits. Meanwhile
its process holds a lock: on the file itself, or on the file `.lock` in the folder. Something being removed has such a name too,
but no lock. Eight of the digits are computed from the rest of the name, so no other file is mistaken for one of these. `tidy`
removes those whose process has ended. Everything that writes a file tidies the folder that it writes to.

We recognise our own files by their names, a mark in the folders that we write, and a foot on our pages. `check_place` looks at
names, links, permissions and room before hours of work go into a place.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapt_pruner.core.system import filenames
from adapt_pruner.errors import UsageError

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


def tidy(folder: Path, *, ours: str | None = None) -> None:
    """Remove from a folder, in place, what ended processes left half-written or half-removed. A missing folder is no error.

    Args:
        folder: where to look; subfolders are not searched.
        ours: a regular expression for names that only the caller writes there. What is half-written under these names goes even
            where no lock shows that its process has ended: one may be killed before it has its lock, or after it gave it back.
    """
    paths: list[Path] = []
    with suppress(OSError):  # a folder may be writable and still not listable
        paths = list(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        kind, parts = _kind(path.name), _NAME.fullmatch(path.name)
        is_ours = ours is not None and parts is not None and re.fullmatch(ours, parts[1]) is not None
        with suppress(OSError):  # another process may be tidying, too
            if kind == _REMOVED or (kind == _WRITTEN and is_ours):
                remove(path)
            elif kind == _WRITTEN:
                _remove_abandoned(path)


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights: model.safetensors, else the files that its index names; 0 if there is neither."""
    index, names = folder / filenames.WEIGHTS_INDEX, {filenames.WEIGHTS}
    if not (folder / filenames.WEIGHTS).is_file() and index.is_file():
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


def cache_folder() -> Path:
    """The folder for things that can be made again: $ADAPT_PRUNER_CACHE, or ~/.cache/adapt-pruner."""
    return expanded(os.environ.get("ADAPT_PRUNER_CACHE") or "~/.cache/adapt-pruner")


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


PAGE_FOOT = "Written by adapt-pruner"
"""The text at the foot of every page."""

_DOCTYPE = b"<!doctype html"


def mark(folder: Path, kind: str) -> bool:
    """Mark a folder as a run or a comparison. Returns whether the mark is new.

    Raises:
        OSError: the mark could not be written.
    """
    if is_marked(folder, kind):
        return False
    write_whole(folder / filenames.MARK, f"adapt-pruner {kind}\n")
    return True


def is_marked(folder: Path, kind: str) -> bool:
    """Whether a folder bears the mark of its kind."""
    place = folder / filenames.MARK
    with suppress(OSError, ValueError):
        return place.is_file() and not place.is_symlink() and place.read_text(encoding="utf-8") == f"adapt-pruner {kind}\n"
    return False


def is_card(path: Path) -> bool:
    """Whether a README.md is a model card that we wrote: its front matter has our tag."""
    with suppress(OSError):
        if path.is_file():
            front = path.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
            return "\n- adapt-pruner\n" in f"{front}\n"
    return False


def is_page(path: Path) -> bool:
    """Whether a file is an HTML page that we wrote."""
    with suppress(OSError):
        if path.is_file():  # neither a device nor a pipe
            content = path.read_bytes()
            return content[: len(_DOCTYPE)].lower() == _DOCTYPE and PAGE_FOOT.encode() in content
    return False


_LONGEST_INSIDE = 256  # bytes by which the path of a file in a result may be longer than the path of the result


def check_place(path: Path, *, inside: bool = False) -> None:
    """Refuse a place where nothing can be written. The check writes a nameless file there, of which nothing is left.

    Args:
        path: the file or folder to be written.
        inside: whether the result is written into an existing folder; if not, the folder is replaced.

    Raises:
        UsageError: `path` leads through a file or a dangling link, it or a name in it is too long, or nothing can be written
            there.
    """
    path = path.absolute()
    missing = [part for part in (path, *path.parents) if not is_there(part)]
    for part in missing:
        with suppress(OSError):  # a name may be too long
            raise UsageError(
                f"{part} is a link to {part.readlink()}, which does not exist; remove the link or name another place"
            )
    folder = missing[-1].parent if missing else path
    if not missing and not (inside and path.is_dir()):
        folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, so {path} cannot be made in it; name another place")
    most, most_of_all = os.pathconf(folder, "PC_NAME_MAX"), os.pathconf(folder, "PC_PATH_MAX") - _LONGEST_INSIDE
    for part in missing:
        if (length := len(os.fsencode(part.name))) > most:
            raise UsageError(
                f"the name {part.name[:24]}… has {length} bytes, and {folder} allows at most {most}; name a shorter one"
            )
    if (length := len(os.fsencode(path))) > most_of_all:
        raise UsageError(
            f"the path {str(path)[:24]}… has {length:,} bytes, and at most {most_of_all:,} are possible; name a shorter one"
        )
    tidy(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UsageError(f"{folder} is not writable ({why(error)}); name another folder") from error


def is_there(path: Path) -> bool:
    """Whether a path leads to something. A path that cannot be followed does not: a name is too long, or links form a circle."""
    with suppress(OSError):
        path.stat()
        return True
    return False


def check_disk_space(path: Path, num_bytes: int, *, largest: int | None = None, there: int = 0) -> None:
    """Refuse to begin work if there is no room for its result.

    Args:
        path: where the result goes.
        num_bytes: the least that will be written.
        largest: bytes of its largest file; all of it by default.
        there: bytes that already lie there and will make room for the result.

    Raises:
        UsageError: the disk has less room, or the system allows no file of this size.
    """
    if lacking := lacks_disk_space(path, num_bytes - there, largest=min(num_bytes, num_bytes if largest is None else largest)):
        raise UsageError(f"{path} has no room for the result: {lacking}; make room or name another folder")


def lacks_disk_space(path: Path, num_bytes: int, *, largest: int | None = None) -> str | None:
    """What prevents writing `num_bytes` to a place, in words; None if nothing does. A user's quota is not known."""
    path = path.absolute()
    folder = next(part for part in (path, *path.parents) if is_there(part) and part.is_dir())
    disk = shutil.disk_usage(folder)
    if disk.total and num_bytes > disk.free:
        return f"the disk is full: it has {_size(disk.free)} left, and the result needs {_size(num_bytes)}"
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = num_bytes if largest is None else largest
    if most != resource.RLIM_INFINITY and size > most:
        return f"a file may have {_size(most)} (ulimit -f), and the result needs one of {_size(size)}"
    return None


def _size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.1f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"
