"""A lock file that says who holds it and ends with its process. Others can look at it without disturbing the holder.

Why not the package filelock: to ask whether a lock is held, it takes the lock and creates the file if there is none; but report
and watch may only read. It also does not say who holds the lock. The locks are those of flock, as in run folders since the first
version.
"""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from adapt_pruner.core.system.files import why
from adapt_pruner.errors import UsageError

_GLANCE = 0.1  # seconds to wait while another process checks whether the lock is held


def locked(path: Path) -> IO[str]:
    """A lock file that this process has locked, until it is closed or the process ends.

    Raises:
        UsageError: another process has locked it, it is a link, or it cannot be locked there.
    """
    while True:
        try:
            lock = _opened(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else why(error)
            raise UsageError(f"{path} cannot be locked ({reason}); remove it, or name another folder") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_GLANCE)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                return lock
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UsageError(f"{path.parent} is in use by process {owner}; wait for it, or name another folder") from error
        except OSError as error:
            raise UsageError(f"{path} cannot be locked ({why(error)}); name a folder on another file system") from error
        lock.close()  # the last holder has just removed this file; try again with a new one


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file. To ask, this shares the lock for a moment, which `locked` waits out."""
    try:
        with _opened(path, os.O_RDONLY) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _opened(path: Path, flags: int) -> IO[str]:
    """An open lock file. Links are refused, and opening a pipe does not wait for a writer."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return os.fdopen(handle, "r" if flags == os.O_RDONLY else "r+")
