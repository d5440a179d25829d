"""What made a result: the versions of the software, and the commit."""

import functools
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["commit", "installed", "made_by"]

_PACKAGE = Path(__file__).resolve().parents[1]


def installed(name: str) -> str:
    """The version of a package; `unknown` if it runs from a source tree that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def made_by() -> str:
    """The versions of the software that makes a result, and the commit."""
    versions = [f"{name} {installed(name)}" for name in ("adapt-pruner", "torch", "transformers")]
    of = [f"commit {known}"] if (known := commit()) else []
    return ", ".join([*versions, f"Python {platform.python_version()}", *of])


def commit() -> str:
    """The commit of this code, with `-dirty` if it was changed since; empty if unknown.

    A distribution has it in commit.txt, which its build wrote. In a checkout git is asked.
    """
    written, checkout = _PACKAGE / "commit.txt", _PACKAGE.parents[1]
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    if not ((checkout / ".git").exists() and shutil.which("git")):
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=9", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
