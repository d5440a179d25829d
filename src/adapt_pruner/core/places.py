"""Check that something can be written to a place before hours of work go into it: names, links, permissions, room."""

import os
import resource
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from adapt_pruner.core.files import tidy, why
from adapt_pruner.errors import UsageError

__all__ = ["check_disk_space", "check_place", "is_there", "lacks_disk_space"]

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
