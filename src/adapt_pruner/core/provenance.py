"""What made a result: the versions of what ran, and the commit."""

import functools
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["made_by"]


@functools.cache
def made_by() -> str:
    """Versions of what makes a result, and the commit when the package lies in its own git checkout."""
    versions = []
    for name in ("adapt-pruner", "torch", "transformers"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from a source tree that is not installed
            versions.append(f"{name} unknown")
    text = ", ".join([*versions, f"Python {platform.python_version()}"])
    checkout = Path(__file__).parents[3]
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        text += f", commit {commit}" if commit else ""
    return text
