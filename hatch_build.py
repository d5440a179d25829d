"""Writes into a distribution which commit it was built from, so that `adapt-pruner --version` can say it."""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "src/adapt_pruner/commit.txt"  # a source distribution has it, and the wheel built from that takes it from there


class CommitHook(BuildHookInterface[Any]):
    """Runs while a distribution is built, not for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add commit.txt, if this is a checkout and git is there."""
        if version == "editable" or (Path(self.root) / FILE).exists():
            return
        commit = runpy.run_path(str(Path(self.root) / "src/adapt_pruner/core/system/provenance.py"))["commit"]()
        if not commit:
            return
        path = Path(tempfile.mkdtemp()) / "commit.txt"
        path.write_text(commit)
        build_data["force_include"][str(path)] = FILE if self.target_name == "sdist" else FILE.removeprefix("src/")
