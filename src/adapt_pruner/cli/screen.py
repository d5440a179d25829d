"""What a user sees while work goes on: on a terminal bars and figures that move, plain lines elsewhere, all on stderr."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from adapt_pruner.cli.bars import Bars
from adapt_pruner.cli.streams import console as console_on
from adapt_pruner.cli.streams import filtered
from adapt_pruner.core import events, searched  # noqa: F401 (its events are known once it is imported)
from adapt_pruner.core.compared import Cell
from adapt_pruner.core.events import Cut, Evaluation, Event, Start, Step, Tasks, parse
from adapt_pruner.core.visible import visible
from adapt_pruner.core.words import millions, span

__all__ = ["Screen", "quiet_libraries", "screen"]

_EVERY = 10.0  # seconds between plain lines of the same kind


def quiet_libraries() -> None:
    """Keep the bars and notices of transformers off the screen; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def screen(*, quiet: bool = False) -> Iterator["Screen"]:
    """A listener for the events of a run; a quiet one shows nothing."""
    console = console_on(stderr=True, quiet=quiet)
    if quiet or not console.is_terminal:
        yield Screen(console, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )  # fmt: skip
    shown = Screen(console, Progress(*columns, console=console))
    with Live(console=console, transient=True, refresh_per_second=4, get_renderable=shown.render), filtered():
        yield shown


class Screen:
    """Turns events into a few lines that move, or into lines below each other; call it with each event."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console = console
        self._bar = bar
        self._task = None if bar is None else bar.add_task("starting", total=1.0, left="")
        self._last_line = 0.0
        self._work: Start | None = None
        self._spent = 0.0  # seconds on the work since it started, asides left out
        self._pruned = 0.0  # share that is done of the pruning that was left at the start
        self._trained = 0  # tokens
        self._share = 0.0  # of the work, when it last got on
        self._got_on = self._due = 0.0  # seconds spent until then, and until the end as foreseen then
        self._bars = Bars()
        self._figures: dict[str, str] = {}  # what is said beside the stage
        self._now = 0.0  # Unix seconds of the newest event
        self._deadline = math.inf  # the same, of when the run is to be over

    def __call__(self, data: dict[str, Any]) -> None:
        """Show what a listener is told, as it happens."""
        if (event := parse(data)) is not None:
            self.hear(event)

    def hear(self, event: Event) -> None:
        """Show one event, as it happens or, with its `time`, from a log."""
        before, self._now = self._now, event.time or time.time()
        if not _is_aside(event):
            self._spent += self._now - before
        self._bars.hear(event)
        left = self._follow(event)
        if line := event.line(self._work.begun if self._work is not None else "dense"):
            self.say(line + left, often=event.often)

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Take events in without a line for each: what happened before somebody looked."""
        quiet, self._console.quiet = self._console.quiet, True
        try:
            yield
        finally:
            self._console.quiet = quiet

    def standing(self) -> str:
        """How far the run has come, in a line."""
        return visible(" · ".join(value for value in self._figures.values() if value))

    def render(self) -> RenderableType:
        """The lines that move: the model, figures, and how far the work is."""
        assert self._bar is not None
        anatomy = [Text(line, style="cyan", no_wrap=True) for line in self._bars.lines(self._console.width)]
        figures = [Text(self.standing(), no_wrap=True, overflow="ellipsis")] if self._figures else []
        return Group(*anatomy, *figures, self._bar.get_renderable())

    def say(self, text: str, *, often: bool = False) -> None:
        """A line; `often` marks one of many, shown now and then, and not at all under a bar."""
        if often and (self._bar is not None or time.monotonic() - self._last_line < _EVERY):
            return
        if often:
            self._last_line = time.monotonic()
        self._console.print(visible(text), highlight=False, markup=False, soft_wrap=True)

    def _advance(self, description: str, *, at_least: float = 0.0) -> str:
        """Move the bar; returns the estimate as text, of `at_least` so many seconds where work got on, from where it counts down."""
        if self._work is None:
            return ""
        weight, before = self._work.calibration_tokens, self._work.trained_tokens
        total = weight + self._work.training_tokens - before
        share = (weight * self._pruned + self._trained - before) / total if total else 1.0
        if share != self._share and share > 0:
            self._due = max(self._spent / share, self._spent + at_least)
            self._share, self._got_on = share, self._spent
        seconds = min(self._due - self._spent, self._deadline - self._now)
        left = f"{span(seconds)} left" if 0.02 < share < 1 and seconds > 0.5 else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, description=visible(description), left=left)
        return f", {left}" if left else ""

    def _follow(self, event: Event) -> str:
        """Move bar and figures along; what is left of the time, to be put behind the event's line."""
        match event:
            case Start():
                self._begin(event)
            case events.Progress():
                return self._follow_progress(event)
            case Cut():
                return self._follow_cut(event)
            case Step():
                self._trained = event.tokens
                self._figures |= {"tokens": f"{event.tokens:,} tokens", "loss": f"loss {event.said_loss}", "speed": event.speed}
                return self._advance(f"stage {event.stage}: training")
            case Evaluation():
                self._figures["perplexity"] = f"perplexity {event.perplexity:.2f}" if event.perplexity is not None else ""
            case Cell() if self._bar is not None and self._task is not None:
                self._bar.update(
                    self._task, completed=(event.cell - 1) / max(1, event.of), description=visible(event.name), left=event.left
                )
        return ""

    def _begin(self, start: Start) -> None:
        self._work, self._trained, self._pruned = start, start.trained_tokens, 0.0
        self._spent = self._share = self._got_on = 0.0
        self._deadline = math.inf if start.seconds_left is None else self._now + start.seconds_left
        self._figures = {
            "stage": f"{start.stages} stages" if start.stages > 1 else "",
            "params": f"to {millions(start.target)}" if start.target is not None else "",
        }

    def _follow_progress(self, event: events.Progress) -> str:
        if event.phase != "task":
            return self._advance(event.doing)
        if self._work is not None:
            self._advance(event.doing)
        elif self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=event.done / max(1, event.of), description=visible(event.task or ""), left="")
        return ""

    def _follow_cut(self, cut: Cut) -> str:
        work = self._work
        if work is not None and work.params is not None and work.target is not None:
            began = work.params if work.now is None else work.now
            self._pruned = min(1.0, (began - cut.params) / max(1, began - work.target))
            self._figures |= {
                "stage": f"stage {cut.stage} of {work.stages}",
                "params": f"{millions(cut.params)} of {millions(work.params)} parameters, to {millions(work.target)}",
            }
        another = self._spent - self._got_on if cut.target is not None and cut.params > cut.target else 0.0
        return self._advance(f"stage {cut.stage}: pruning", at_least=another)


def _is_aside(event: Event) -> bool:
    """Whether the time before it went into what no estimate is made of: the model measured before anything else, and tasks."""
    match event:
        case Tasks() | events.Progress(phase="task") | events.Progress(phase="evaluate", stage=0) | Evaluation(stage=0):
            return True
    return False
