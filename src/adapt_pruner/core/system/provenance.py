"""What made a result: the versions of the software, and the commit; and how more of this software is installed."""

import functools
import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PACKAGE = Path(__file__).resolve().parents[2]


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
    of = [f"commit {revision}"] if (revision := commit()) else []
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


def to_install(extra: str) -> str:
    """The command that adds an extra of adapt-pruner, by the way in which adapt-pruner itself was installed.

    A clone is named by its folder; otherwise the command has the name of the package, with the address if there was one.
    """
    try:
        package = distribution("adapt-pruner")
    except PackageNotFoundError:  # a source tree that is not installed
        return f"pip install '.[{extra}]' in {_PACKAGE.parents[1]}"
    pip = "uv pip" if (package.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    origin = json.loads(package.read_text("direct_url.json") or "{}")  # as PEP 610 has it; an index leaves none
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"{pip} install {editable}'.[{extra}]' in {unquote(urlsplit(origin['url']).path)}"
    address = "+".join(filter(None, (origin.get("vcs_info", {}).get("vcs"), origin.get("url"))))
    return f"{pip} install 'adapt-pruner[{extra}]{address and ' @ ' + address}'"
