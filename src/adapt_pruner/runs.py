"""A run's folder: who works in it, what it was asked to do, how far it has come.

recipe.yaml              the resolved recipe, with the versions of what ran it
log.jsonl                one JSON object an event
checkpoints/stage-K/     after stage K; stage-K-pruned after its cuts, stage-K-step-N within its training; the newest few
model/                   the result; a folder that has it is finished
.lock                    held by the process that works here
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.save import check_target
from adapt_pruner.checkpoint.state import read_state
from adapt_pruner.core import world
from adapt_pruner.core.plain import to_json
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, differing, read

__all__ = ["RunFolder", "opened"]

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


class RunFolder:
    """A run's folder that this process has to itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.result = path / "model"

    @property
    def is_new(self) -> bool:
        """Whether no run has begun here."""
        return not (self.path / "recipe.yaml").exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run here has come to its end."""
        return self.result.is_dir()

    def begin(self, recipe: Recipe, provenance: str) -> None:
        """Write down what the run is asked to do."""
        whole = self.path / ".recipe.yaml"
        whole.write_text(f"# {provenance}\n{recipe.to_yaml()}", encoding="utf-8")
        whole.rename(self.path / "recipe.yaml")

    def check(self, recipe: Recipe, *, force: bool) -> None:
        """Refuse to go on with another recipe than the one the run began with.

        Raises:
            UsageError: it differs in what decides the result, and `force` is not set.
        """
        keys = differing(read(self.path / "recipe.yaml"), recipe)
        if keys and not force:
            raise UsageError(
                f"{self.path} was begun with another recipe, which differs in {', '.join(keys)}; "
                "name another folder, or pass --force-recipe to go on with the new one"
            )

    def log(self, event: dict[str, Any]) -> None:
        """Add an event to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(to_json({"time": time.time()} | event) + "\n")

    @property
    def log_size(self) -> int:
        """Bytes of log.jsonl so far."""
        log = self.path / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def newest(self) -> tuple[Path | None, dict[str, Any], list[str]]:
        """The newest checkpoint that is whole, its state, and what was wrong with any newer ones."""
        troubles: list[str] = []
        for path in self._found():
            try:
                return path, read_state(path), troubles
            except RunError as error:
                troubles.append(str(error))
        return None, {}, troubles

    def tidy(self, *, keep: int, log_size: int | None = None) -> None:
        """Remove, in place, all checkpoints but the newest `keep`, what a killed process left half-written, and log lines of lost work."""
        for path in self._found()[keep:]:
            shutil.rmtree(path, ignore_errors=True)
        for folder in (self.path, self.checkpoints):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _PARTIAL.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        if log_size is not None and self.log_size > log_size:
            os.truncate(self.path / "log.jsonl", log_size)

    def set_aside(self, path: Path) -> None:
        """Remove a checkpoint that is in the way of a new one of its name."""
        if path.exists():
            shutil.rmtree(path)

    def abandon(self) -> None:
        """Undo `begin` where no work was done, so that the folder is free for the next try."""
        for name in ("recipe.yaml", "log.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def _found(self) -> list[Path]:
        """Checkpoints by their names, the newest first."""
        order = []
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            match = re.fullmatch(r"stage-(\d+)(?:-(pruned)|-step-(\d+))?", path.name)
            if match:
                within = 0 if match[2] else int(match[3]) if match[3] else 10**18
                order.append((int(match[1]), within, path))
        return [path for _, _, path in sorted(order, reverse=True)]


@contextmanager
def opened(path: Path) -> Iterator[RunFolder]:
    """A run's folder, made where there is none, locked while the context lasts; an empty one is removed at the end.

    Raises:
        UsageError: another process works in it, or it is a folder of something else.
    """
    if not (path / "recipe.yaml").exists() and not (path / ".lock").exists():
        check_target(path)
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    if not world.is_main():
        yield folder
        return
    with (path / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UsageError(f"{path} is in use by process {owner}; wait for it, or name another folder") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield folder
        finally:
            if folder.is_new:
                (path / ".lock").unlink(missing_ok=True)
                if not existed and not any(path.iterdir()):
                    path.rmdir()
