"""`adapt-pruner watch`: a run that was started elsewhere, shown live from its log."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapt_pruner.core.system import filenames

if TYPE_CHECKING:
    from adapt_pruner.core.events import Event
    from adapt_pruner.report.screen import Screen


_POLL = 1.0  # seconds
_SILENT = 600.0  # seconds without a new line before `watch` mentions it


def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, in progress or finished.")],
) -> None:
    """Show the progress of the run in RUN_DIR until it ends: the phase it is in, and the time left. Ctrl-C stops watching, not the run.

    `watch` reads the log of the run and its progress.json, and changes nothing.

    Examples:

        adapt-pruner watch runs/demo
    """
    from adapt_pruner.core.events.words import span, typed
    from adapt_pruner.errors import RunError
    from adapt_pruner.report.record import check_is_run, is_worked_in, read_progress
    from adapt_pruner.report.screen import screen

    check_is_run(run_dir)
    tail = _Tail(run_dir / filenames.LOG)
    with screen() as show:
        with show.hushed():
            last, ended = _told(show, tail.read())
        if figures := show.figures():
            show.say(figures)
        silence_said = wait_said = False
        while not ended:
            at_work = is_worked_in(run_dir)  # asked before the log is read, so that its last lines are not missed
            if at_work and (progress := read_progress(run_dir)) is not None:
                show.show_progress(*progress)
            fresh = list(tail.read())
            last, ended = _told(show, fresh, last=last, ended=ended)
            if fresh:
                silence_said = False
            elif not at_work and (run_dir / filenames.RESULT).is_dir():
                break  # the log may be gone or cut off
            elif not at_work and last is None and not (run_dir / filenames.RECIPE).exists():
                raise RunError(
                    f"no process works in {run_dir} any more: the run ended before its first step; see its message where you "
                    "started it"
                )
            elif not at_work:
                when = f", {span(time.time() - last.time)} ago" if last and last.time else ""
                raise RunError(
                    f"no process works in {run_dir}: the run was stopped{when}; "
                    f"`{typed('run', run_dir / 'recipe.yaml', '-o', run_dir)}` continues it, `{typed('report', run_dir)}` "
                    "writes a report of the results so far"
                )
            elif last is None and not wait_said:
                show.say(f"the run in {run_dir} is preparing, and has logged nothing yet")
                wait_said = True
            elif not silence_said and last and last.time and time.time() - last.time > _SILENT:
                show.say(f"the last line of the log is {span(time.time() - last.time)} old; the run may be in a long step")
                silence_said = True
            if not fresh:
                time.sleep(_POLL)
    print(f"the run is finished: {run_dir / 'model'}; `{typed('report', run_dir)}` writes its report")


class _Tail:
    """The events of a log as they are added. A continued run cuts its log back, and the log is then read from its start again."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""

    def read(self) -> "Iterator[Event]":
        """The new events. An unfinished last line waits for its end; a line that is not an event is skipped."""
        from adapt_pruner.core.events import parse_line

        try:
            with self._path.open("rb") as log:
                if log.seek(0, 2) < self._at:
                    self._at, self._rest = 0, b""
                log.seek(self._at)
                new = log.read()
                self._at = log.tell()
        except FileNotFoundError:
            return
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            if (event := parse_line(line)) is not None:
                yield event


def _told(
    show: "Screen", events: "Iterable[Event]", *, last: "Event | None" = None, ended: bool = False
) -> "tuple[Event | None, bool]":
    """Show events; return the last of them, and whether the run has ended.

    Args:
        show: the screen.
        events: what is new.
        last: the event before them; None where there was none.
        ended: whether the run had ended before them. A later warning, such as that of a failed report, does not undo that; new work does.
    """
    from adapt_pruner.core.events import Saved, Start
    from adapt_pruner.core.events.run import Resumed

    for last in events:
        show(last)
        ended = (isinstance(last, Saved) and last.is_result) or (ended and not isinstance(last, Resumed | Start))
    return last, ended
