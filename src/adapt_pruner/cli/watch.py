"""`adapt-pruner watch`: a run that was started elsewhere, live, from its log alone."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["watch"]

_POLL = 1.0  # seconds
_SILENT = 600.0  # seconds without a line after which that is said


def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run that works or has worked.")],
) -> None:
    """Show how far the run in RUN_DIR is, until it ends; reads its log and changes nothing. Ctrl-C stops watching, not the run.

    Examples:

        adapt-pruner watch runs/demo
    """
    from adapt_pruner.cli.screen import duration, screen
    from adapt_pruner.errors import RunError
    from adapt_pruner.report.record import check_is_run, is_worked_in

    check_is_run(run_dir)
    log = run_dir / "log.jsonl"
    tail = _Tail(log)
    with screen() as show:
        with show.hushed():
            last = _told(show, tail.read())
        if standing := show.standing():
            show.say(standing)
        silence_said = False
        while not _is_end(last):
            at_work = is_worked_in(run_dir)  # asked before the log is read, so that its last lines are not missed
            fresh = list(tail.read())
            last = _told(show, fresh) or last
            if fresh:
                silence_said = False
            elif not at_work:
                when = f", {duration(time.time() - last['time'])} ago" if last and last.get("time") else ""
                raise RunError(
                    f"nobody works in {run_dir}: the run was stopped{when}; "
                    f"`adapt-pruner run {run_dir / 'recipe.yaml'} -o {run_dir}` goes on, `adapt-pruner report {run_dir}` shows what there is"
                )
            elif not silence_said and last and time.time() - float(last.get("time") or 0) > _SILENT:
                show.say(f"the last line of the log is {duration(time.time() - last['time'])} old; the run may be in a long step")
                silence_said = True
            if not fresh:
                time.sleep(_POLL)
    print(f"the run is finished: {run_dir / 'model'}; `adapt-pruner report {run_dir}` shows it")


class _Tail:
    """The events of a log as they are added; one that is cut back, as a run that goes on does, is read from its start again."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""

    def read(self) -> Iterator[dict[str, Any]]:
        """What is new; a last line without its end waits for it, and a line that is no event is passed over."""
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
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


def _told(show: Any, events: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> dict[str, Any] | None:
    """Show events; the last of them. One that lacks what its kind has is passed over."""
    last = None
    for event in events:
        try:
            show(event)
        except (KeyError, TypeError):
            continue
        last = event
    return last


def _is_end(event: dict[str, Any] | None) -> bool:
    """Whether a run ends with this event; a warning may follow it, of a report that failed."""
    return event is not None and event["event"] == "saved" and "params_after" in event
