"""What a bug report names: the version, its commit, and the libraries that results depend on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["commit", "described"]

_HERE = Path(__file__).resolve().parents[1]
_BESIDE = ("torch", "transformers", "safetensors")


def commit() -> str:
    """The commit that this code is of, with `-dirty` where it was changed since; empty where nothing says it.

    A distribution says it in commit.txt, which its build wrote. In a checkout git is asked.
    """
    written = _HERE / "commit.txt"
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    root = _HERE.parents[1]
    if not (root / ".git").exists() or _HERE.parent.name != "src":
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9", "--exclude", "*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def described() -> str:
    """Such as `adapt-pruner 0.1.0 (commit f2e574012; Python 3.11.2, torch 2.13.0, …; Linux x86_64)`."""
    beside = [f"Python {platform.python_version()}"]
    for name in _BESIDE:
        try:
            beside.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            beside.append(f"no {name}")
    of = f"commit {known}; " if (known := commit()) else ""
    return f"adapt-pruner {version('adapt-pruner')} ({of}{', '.join(beside)}; {platform.system()} {platform.machine()})"
