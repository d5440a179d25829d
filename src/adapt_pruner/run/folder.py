"""A run's folder and what lies in it: recipe, log, checkpoints, result, lock.

recipe.yaml              the resolved recipe, with the versions of what ran it
log.jsonl                one JSON object per event
checkpoints/             the newest few, with names as in `run.checkpoints`
checkpoints/*.damaged/   checkpoints that could not be read
log.damaged.jsonl        the log of work that was lost because no checkpoint could be read
calibration_self.json    the calibration text, if it is self-written
repair_self.json         the repair text
model/                   the result; it is there once the run is finished
trackers/                files of trackers
report.html              the results as a page (see `report`)
progress.json            where the run stands (see `core.events.progress`), rewritten about once a second while a process works here
.lock                    held by the process that works here
.adapt-pruner            says that this is the folder of a run; a folder that is not empty and has no such file is refused
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.save import check_empty
from adapt_pruner.checkpoint.state import read_state
from adapt_pruner.core.events import Event
from adapt_pruner.core.events.progress import ProgressTracker
from adapt_pruner.core.events.words import typed
from adapt_pruner.core.system import filenames, world
from adapt_pruner.core.system.files import check_place, is_marked, is_page, mark, remove, tidy, why, write_whole
from adapt_pruner.core.system.locks import locked
from adapt_pruner.core.system.strict_json import is_number, read_json, to_json
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.recipe import Recipe, differing, read
from adapt_pruner.run.checkpoints import newest_first, of_stage

_KIND = "run"
_OURS = r"recipe\.yaml|model|calibration_self\.json|repair_self\.json|stage-.*"
_EVERY = 1.0  # seconds between two writes of progress.json
_NUMBERS = ("params_before", "params_after", "decoder_params_before", "decoder_params_after", "trained_tokens", "seconds")
_OF_ZEROS = ("nonzero_before", "nonzero_after")
_LISTS = ("perplexities", "perplexities_after_cuts", "calibration_losses")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context that writes a file of a run.

    Raises:
        RunError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} could not be written: {why(error)}; correct that and give the same command again") from error


class RunFolder:
    """A run's folder, in which only this process works."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / filenames.CHECKPOINTS
        self.result = path / filenames.RESULT
        self._begun = False
        self._place: os.stat_result | None = None  # of the folder as this process locked it
        self._early: list[str] = []  # lines of the log that wait for the run to begin
        self._tracker, self._written = ProgressTracker(), -math.inf

    @property
    def is_new(self) -> bool:
        """Whether no run has begun here."""
        return not (self.path / filenames.RECIPE).exists() and not newest_first(self.checkpoints)

    @property
    def is_finished(self) -> bool:
        """Whether the run here is finished."""
        return self.result.is_dir()

    def take(self) -> None:
        """Note that this process has locked the folder where it lies now."""
        self._place = self.path.stat()

    @property
    def is_here(self) -> bool:
        """Whether the folder still lies where this process locked it."""
        with suppress(OSError):
            return self._place is None or os.path.samestat(self.path.stat(), self._place)
        return False

    def check_here(self) -> None:
        """Refuse to write into a folder that was moved; another run may begin at its old place.

        Raises:
            RunError: it was moved or removed.
        """
        if not self.is_here:
            raise RunError(
                f"{self.path} was moved or removed while its run worked in it, so nothing more was written; give the same command "
                "with -o and its new place, and the run continues from its newest checkpoint"
            )

    def begin(self, recipe: Recipe, provenance: str) -> None:
        """Write recipe.yaml; from now on events go to the log."""
        self.check_here()
        path = self.path / filenames.RECIPE
        with writing(path):
            write_whole(path, f"# {provenance}\n{recipe.to_yaml()}")
        self._begun = True

    def as_begun(self, recipe: Recipe) -> Recipe:
        """The recipe. If its `multiple_of` is `auto` and the run here began with 1, it keeps 1."""
        if self.is_new or recipe.multiple_of != "auto":
            return recipe
        try:
            began = read(self.path / filenames.RECIPE).multiple_of
        except UsageError:  # `check` says so
            return recipe
        return recipe.model_copy(update={"multiple_of": began}) if began == 1 else recipe

    def check(self, recipe: Recipe, *, force: bool) -> list[str]:
        """The keys in which a recipe differs from the run's, as far as they matter to the result; none for a new run.

        Raises:
            UsageError: `force` is not set, and a key differs or the old recipe cannot be read.
        """
        if self.is_new:
            return []
        try:
            keys = differing(read(self.path / filenames.RECIPE), self.as_begun(recipe))
        except UsageError as error:
            if force:
                return ["keys that are unknown, since the old recipe cannot be read"]
            raise UsageError(
                f"{self.path / 'recipe.yaml'}, the recipe that the run started with, cannot be read ({error}); "
                f"name another folder, or continue with the new one by {self._forced}"
            ) from error
        if keys and not force:
            raise UsageError(
                f"{self.path} was started with another recipe, which differs in {', '.join(keys)}; "
                f"name another folder, or continue with the new one by {self._forced}"
            )
        return keys

    @property
    def _forced(self) -> str:
        return f"`{typed('run', 'RECIPE', '-o', self.path, '--force-recipe')}`"

    def log(self, event: Event) -> None:
        """Add an event to log.jsonl, unless events of its kind are not kept.

        A run may still be refused before it begins or goes on, so its first events wait until then.

        Raises:
            RunError: the log could not be written.
        """
        if not event.logged:
            return
        line = to_json({"time": time.time()} | event.to_dict()) + "\n"
        if not self._begun:
            self._early.append(line)
            return
        self.check_here()
        with writing(self.path / filenames.LOG):
            self._append("".join([*self._early, line]))
        self._early = []

    def write_progress(self, event: Event) -> None:
        """Write where the run stands after an event, for people who watch it; if that cannot be written, the run goes on."""
        self._tracker.hear(event)
        if time.monotonic() - self._written < _EVERY or not self.is_here:
            return
        self._written = time.monotonic()
        with suppress(OSError):
            text = to_json({"time": time.time(), **asdict(self._tracker.at())})
            (self.path / filenames.PROGRESS).write_text(text, encoding="utf-8")

    @property
    def log_size(self) -> int:
        """Size of log.jsonl in bytes."""
        log = self.path / filenames.LOG
        return log.stat().st_size if log.exists() else 0

    def newest(self, *, thorough: bool = True) -> tuple[Path | None, dict[str, Any], dict[Path, str]]:
        """The newest whole checkpoint, its state, and what is wrong with each newer checkpoint (see `read_state`)."""
        damaged: dict[Path, str] = {}
        for path in newest_first(self.checkpoints):
            try:
                return path, read_state(path, thorough=thorough), damaged
            except RunError as error:
                damaged[path] = str(error)
        return None, {}, damaged

    def rewind(self, *, log_size: int, damaged: Mapping[Path, str]) -> None:
        """Remove, in place, what is newer than the checkpoint from which the run continues.

        Log lines of work that has to be done again are removed. Damaged checkpoints are renamed, since they would count as the
        newest. If no checkpoint is whole, all work is lost and the log is renamed too.

        Args:
            log_size: size of the log, in bytes, when that checkpoint was written; 0 without a checkpoint.
            damaged: the damaged checkpoints that `newest` found.
        """
        log = self.path / filenames.LOG
        if damaged and not log_size and log.exists():
            log.replace(self.path / "log.damaged.jsonl")
        elif self.log_size > log_size:
            os.truncate(log, log_size)
        for path in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            remove(aside)
            path.rename(aside)

    def reopen(self, name: str, *, step: int) -> None:
        """Let the checkpoint after a stage be one within the stage, in place, if training has gone on since, up to `step`.

        That happens to a run that was stopped after its last step and then given more minutes or tokens.

        Args:
            name: the checkpoint that is to be written.
            step: number of the run's last step.
        """
        after = self.checkpoints / of_stage(name)
        with suppress(RunError):  # it is not there, or damaged
            before = read_state(after, thorough=False)["progress"]["steps"]
            if before < step:
                within = after.with_name(f"{after.name}-step-{before}")
                remove(within)
                after.rename(within)

    def tidy(self, *, keep: int | None = None) -> None:
        """Remove, in place, all checkpoints but the newest `keep`, and what was left half-written or half-removed."""
        for path in newest_first(self.checkpoints)[keep:] if keep is not None else ():
            remove(path)
        for folder in (self.path, self.checkpoints):
            tidy(folder, ours=_OURS)

    def _append(self, lines: str) -> None:
        with (self.path / filenames.LOG).open("a", encoding="utf-8") as log:
            log.write(lines)

    def tidy_at_end(self, recipe: Recipe) -> None:
        """Remove, in place, the checkpoints of a run that has ended, if the recipe keeps none."""
        if recipe.keep_checkpoints == 0:
            self.tidy(keep=0)


@contextmanager
def open_run_folder(path: Path) -> Iterator[RunFolder]:
    """A run's folder, locked while the context lasts; it is created if missing, and removed at the end if no run began in it.

    Raises:
        UsageError: another process works in the folder, or it holds something other than a run.
    """
    folder = RunFolder(path)
    with ExitStack() as stack:
        world.on_main(lambda: _take(folder, stack))
        yield folder


def check_folder(path: Path, recipe: Recipe, *, force: bool) -> None:
    """Check, without writing anything, that `recipe` may run in a folder.

    Raises:
        UsageError: the folder holds something other than a run, or a run of another recipe and `force` is not set.
    """
    _check_kind(path)
    RunFolder(path).check(recipe, force=force)


def _check_kind(path: Path) -> None:
    check_place(path, inside=True)
    if not is_marked(path, _KIND):
        check_empty(path)


def _take(folder: RunFolder, until: ExitStack) -> None:
    """Make, mark and lock a run's folder until `until` is closed; then remove what was made if no run began in it."""
    path = folder.path
    _check_kind(path)
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        marked_now = mark(path, _KIND)
    except OSError as error:
        raise RunError(f"{path} could not be made: {why(error)}; make room or name another folder") from error
    until.enter_context(locked(path / ".lock"))
    folder.take()

    def leave() -> None:
        if not folder.is_here:
            return
        (path / filenames.PROGRESS).unlink(missing_ok=True)
        if not folder.is_new:
            return
        for name in (filenames.CALIBRATION_TEXT, filenames.REPAIR_TEXT, ".lock"):
            (path / name).unlink(missing_ok=True)
        if is_page(path / filenames.PAGE):  # somebody may have asked for it meanwhile
            (path / filenames.PAGE).unlink()
        if marked_now or {place.name for place in path.iterdir()} == {filenames.MARK}:
            (path / filenames.MARK).unlink(missing_ok=True)
        if not existed and not any(path.iterdir()):
            path.rmdir()

    until.callback(leave)


def figures_of(run_dir: str | Path) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        RunError: its pruning.json is missing or damaged.
    """
    path = Path(run_dir) / filenames.RESULT / filenames.PRUNING
    try:
        figures: dict[str, Any] = read_json(path)["figures"]
        numbers = [figures[key] for key in (*_NUMBERS, *(_OF_ZEROS if "nonzero_after" in figures else ()))]
        numbers += [value for key in _LISTS for value in figures.get(key) or [] if value is not None]
        if not all(map(is_number, numbers)):
            raise ValueError("a figure is no number")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(
            f"the run in {run_dir} is finished, and its figures cannot be read: {path} is damaged ({type(error).__name__}: {first_line(error)}); get "
            f"the file again, or remove {path.parent} and give the same command, which makes it again from the newest checkpoint"
        ) from error
    return figures
