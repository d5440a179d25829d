"""What made a result: the versions of what ran, and the commit."""

import functools
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["installed", "made_by"]


def installed(name: str) -> str:
    """The version of a package; `unknown` where it runs from a source tree that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def made_by() -> str:
    """Versions of what makes a result, and the commit when the package lies in its own git checkout."""
    versions = [f"{name} {installed(name)}" for name in ("adapt-pruner", "torch", "transformers")]
    text = ", ".join([*versions, f"Python {platform.python_version()}"])
    checkout = Path(__file__).parents[3]
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        text += f", commit {commit}" if commit else ""
    return text
