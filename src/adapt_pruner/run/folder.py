"""A run's folder: who works in it, what it was asked to do, how far it has come.

recipe.yaml              the resolved recipe, with the versions of what ran it
log.jsonl                one JSON object an event
checkpoints/stage-K/     after stage K; stage-K-cut-N within its cuts, stage-K-pruned after them, stage-K-step-N within its training; the newest few
checkpoints/*.damaged/   what could not be gone on from; log.damaged.jsonl is the log where nothing could
calibration_self.json    the text that the model wrote, where it is calibrated on that; repair_self.json what a repair reads beside it
model/                   the result; a folder that has it is finished
trackers/                of trackers that write files
report.html              what it came to, as a page (see `report`)
.lock                    held by the process that works here
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.save import check_target
from adapt_pruner.checkpoint.state import read_state
from adapt_pruner.core import world
from adapt_pruner.core.events import is_logged
from adapt_pruner.core.files import remove, tidy, why, write_whole
from adapt_pruner.core.locks import locked
from adapt_pruner.core.strict_json import to_json
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, differing, read
from adapt_pruner.run.checkpoints import newest_first

__all__ = ["OWN_TEXT", "REPAIR_TEXT", "RunFolder", "check_folder", "figures_of", "opened"]

OWN_TEXT = "calibration_self.json"
REPAIR_TEXT = "repair_self.json"


class RunFolder:
    """A run's folder that this process has to itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.result = path / "model"
        self._begun = False
        self._early: list[str] = []  # lines of the log that wait for the run to begin

    @property
    def is_new(self) -> bool:
        """Whether no run has begun here."""
        return not (self.path / "recipe.yaml").exists() and not newest_first(self.checkpoints)

    @property
    def is_finished(self) -> bool:
        """Whether the run here has come to its end."""
        return self.result.is_dir()

    def begin(self, recipe: Recipe, provenance: str) -> None:
        """Write down what the run is asked to do; what is logged from now on is kept."""
        try:
            write_whole(self.path / "recipe.yaml", f"# {provenance}\n{recipe.to_yaml()}")
        except OSError as error:
            raise RunError(f"{self.path / 'recipe.yaml'} could not be written: {why(error)}") from error
        self._begun = True

    def check(self, recipe: Recipe, *, force: bool) -> list[str]:
        """The keys in which a recipe differs from the one the run began with, as far as they decide the result; none before it began.

        Raises:
            UsageError: there are any, or that recipe cannot be read, and `force` is not set.
        """
        if self.is_new:
            return []
        try:
            keys = differing(read(self.path / "recipe.yaml"), recipe)
        except UsageError as error:
            if force:
                return ["what cannot be read of the old one"]
            raise UsageError(
                f"what {self.path / 'recipe.yaml'} says the run was begun with cannot be read ({error}); "
                "name another folder, or pass --force-recipe to go on with the recipe given"
            ) from error
        if keys and not force:
            raise UsageError(
                f"{self.path} was begun with another recipe, which differs in {', '.join(keys)}; "
                "name another folder, or pass --force-recipe to go on with the new one"
            )
        return keys

    def log(self, event: dict[str, Any]) -> None:
        """Add an event to log.jsonl, if it is kept there. Until the run begins or goes on it may still be refused: events wait for that.

        Raises:
            RunError: it could not be written.
        """
        if not is_logged(event):
            return
        line = to_json({"time": time.time()} | event) + "\n"
        if not self._begun:
            self._early.append(line)
            return
        try:
            self._append("".join([*self._early, line]))
            self._early = []
        except OSError as error:
            raise RunError(f"{self.path / 'log.jsonl'} could not be written: {why(error)}") from error

    @property
    def log_size(self) -> int:
        """Bytes of log.jsonl so far."""
        log = self.path / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def newest(self, *, thorough: bool = True) -> tuple[Path | None, dict[str, Any], dict[Path, str]]:
        """The newest checkpoint that is whole, its state, and what is wrong with any newer ones (see `read_state`)."""
        damaged: dict[Path, str] = {}
        for path in newest_first(self.checkpoints):
            try:
                return path, read_state(path, thorough=thorough), damaged
            except RunError as error:
                damaged[path] = str(error)
        return None, {}, damaged

    def rewind(self, *, log_size: int, damaged: Mapping[Path, str]) -> None:
        """Take away, in place, what is newer than the checkpoint that the run goes on from.

        Log lines of work that is to be done again go. Damaged checkpoints are set aside, since they would count as the
        newest; and with them the log, where none was whole and all work is lost.

        Args:
            log_size: of the log when that checkpoint was written; 0 where there is none.
            damaged: what `newest` found.
        """
        log = self.path / "log.jsonl"
        if damaged and not log_size and log.exists():
            log.replace(self.path / "log.damaged.jsonl")
        elif self.log_size > log_size:
            os.truncate(log, log_size)
        for path in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            remove(aside)
            path.rename(aside)

    def tidy(self, *, keep: int | None = None) -> None:
        """Remove, in place, all checkpoints but the newest `keep`, and what was left half-written or half-removed."""
        for path in newest_first(self.checkpoints)[keep:] if keep is not None else ():
            remove(path)
        for folder in (self.path, self.checkpoints):
            tidy(folder)

    def _append(self, line: str) -> None:
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line)


@contextmanager
def opened(path: Path) -> Iterator[RunFolder]:
    """A run's folder, made where there is none, locked while the context lasts; an empty one is removed at the end.

    Raises:
        UsageError: another process works in it, or it is a folder of something else.
    """
    folder = RunFolder(path)
    with ExitStack() as stack:
        world.on_main(lambda: _take(folder, stack))
        yield folder


def check_folder(path: Path, recipe: Recipe, *, force: bool) -> None:
    """Raise what a run of `recipe` into a folder would be refused with, before it is started; nothing is written.

    Raises:
        UsageError: it is a folder of something else, or of a run of another recipe and `force` is not set.
    """
    _check_kind(path)
    RunFolder(path).check(recipe, force=force)


def _check_kind(path: Path) -> None:
    beginning = (path / ".lock").exists() and not (path / "cells").is_dir()  # a comparison has a lock, too
    if not (path / "recipe.yaml").exists() and not beginning:
        check_target(path)


def _take(folder: RunFolder, until: ExitStack) -> None:
    """Make and lock a run's folder, until `until` is closed; what is empty then goes."""
    path = folder.path
    _check_kind(path)
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    until.enter_context(locked(path / ".lock"))

    def leave() -> None:
        if folder.is_new:
            for name in (OWN_TEXT, REPAIR_TEXT, "report.html", ".lock"):  # a page may have been asked for meanwhile
                (path / name).unlink(missing_ok=True)
            if not existed and not any(path.iterdir()):
                path.rmdir()

    until.callback(leave)


def figures_of(run_dir: str | Path) -> dict[str, Any]:
    """The figures of a finished run."""
    figures: dict[str, Any] = json.loads((Path(run_dir) / "model" / "pruning.json").read_text(encoding="utf-8"))["figures"]
    return figures
