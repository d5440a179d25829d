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
from adapt_pruner.core import words
from adapt_pruner.core.strict_json import perplexity_of
from adapt_pruner.core.words import NARROW, shown

__all__ = ["Screen", "duration", "millions", "quiet_libraries", "screen"]

_EVERY = 10.0  # seconds between plain lines of the same kind
_PHASES = {  # of an event `progress` -> what is being done, in its own figures, and what is counted
    "write": ("writing text of its own", "batch"),
    "score": ("scoring, iteration {iteration}", "batch"),
    "heads": ("shutting heads one by one, iteration {iteration}", "layer"),
    "repair": ("repairing, iteration {iteration}", "step"),
    "evaluate": ("evaluating", "batch"),
    "time": ("timing, {what}", "round"),
}


def millions(count: int) -> str:
    """A parameter count for people: 113.3 M."""
    return shown(count, "params").replace(NARROW, " ")


def duration(seconds: float) -> str:
    """A span of time for people: 45 s, 3 min 05 s, 2 h 10 min."""
    return words.duration(seconds).replace(NARROW, " ")


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
    console = Console(stderr=True, quiet=quiet)
    if quiet or not console.is_terminal:
        yield Screen(console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    shown = Screen(console, Progress(*columns, console=console))
    with Live(console=console, transient=True, refresh_per_second=4, get_renderable=shown.render):
        yield shown


class Screen:
    """Turns events into a few lines that move, or into lines below each other; call it with each event."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console = console
        self._bar = bar
        self._task = None if bar is None else bar.add_task("starting", total=1.0, left="")
        self._last_line = 0.0
        self._work: dict[str, Any] | None = None
        self._spent = 0.0  # seconds on the work since it started, asides left out
        self._pruned = 0.0  # share that is done of the pruning that was left at the start
        self._trained = 0  # tokens
        self._share = 0.0  # of the work, when it last got on
        self._got_on = self._due = 0.0  # seconds spent until then, and until the end as foreseen then
        self._bars = Bars()
        self._figures: dict[str, str] = {}  # what is said beside the stage
        self._now = 0.0  # Unix seconds of the newest event

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of the pipeline, as it happens or, with its `time`, from a log."""
        before, self._now = self._now, float(event.get("time") or time.time())
        if not _is_aside(event):
            self._spent += self._now - before
        self._bars.hear(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

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
        return " · ".join(value for value in self._figures.values() if value)

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
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _advance(self, description: str, *, at_least: float = 0.0) -> str:
        """Move the bar; returns the estimate as text, of `at_least` so many seconds where work got on, from where it counts down."""
        if self._work is None:
            return ""
        weight, before = self._work["calibration_tokens"], self._work["trained_tokens"]
        total = weight + self._work["training_tokens"] - before
        share = (weight * self._pruned + self._trained - before) / total if total else 1.0
        if share != self._share and share > 0:
            self._due = max(self._spent / share, self._spent + at_least)
            self._share, self._got_on = share, self._spent
        left = f"{duration(self._due - self._spent)} left" if 0.02 < share < 1 and self._due - self._spent > 0.5 else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, description=description, left=left)
        return f", {left}" if left else ""

    def _on_load(self, event: dict[str, Any]) -> None:
        self.say(f"loading {event['model']}")

    def _on_loaded(self, event: dict[str, Any]) -> None:
        self.say(f"loaded {event['model']}: {millions(event['params'])} parameters")

    def _on_vocabulary(self, event: dict[str, Any]) -> None:
        self.say(
            f"{event['tokens']:,} of {event['tokens_before']:,} tokens stay, which leaves {millions(event['params'])} parameters"
        )

    def _on_start(self, event: dict[str, Any]) -> None:
        self._work, self._trained, self._pruned = event, event["trained_tokens"], 0.0
        self._spent = self._share = self._got_on = 0.0
        self._figures = {
            "stage": f"{event['stages']} stages" if event["stages"] > 1 else "",
            "params": f"to {millions(event['target'])}",
        }
        text = f"pruning to {millions(event['target'])} parameters by {event['method']}"
        if event["stages"] > 1:
            text += f" in {event['stages']} stages"
        if event["training_tokens"]:
            text += f", training on {event['training_tokens']:,} tokens between them"
        if event["processes"] > 1:
            text += f", on {event['processes']} processes ({event['parallel']})"
        self.say(text)

    def _on_find(self, event: dict[str, Any]) -> None:
        self.say(f"getting the tasks {event['tasks']}")

    def _on_progress(self, event: dict[str, Any]) -> None:
        if event["phase"] == "task":
            if self._work is not None:
                self._advance(f"scoring {event['task']}")
            elif self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=event["done"] / event["of"], description=event["task"], left="")
            self.say(f"{event['task']}, request {event['done']:,} of {event['of']:,}", often=True)
            return
        where = f"stage {event['stage']}: " if event.get("stage") else ""
        doing, unit = _PHASES[event["phase"]]
        what = doing.format_map(event)
        left = self._advance(where + what)
        self.say(f"{where}{what}, {unit} {event['done']} of {event['of']}{left}", often=True)

    def _on_cut(self, event: dict[str, Any]) -> None:
        if self._work is not None:
            start, target = self._work["params"], self._work["target"]
            began = self._work.get("now", start)
            self._pruned = min(1.0, (began - event["params"]) / max(1, began - target))
            self._figures |= {
                "stage": f"stage {event['stage']} of {self._work['stages']}",
                "params": f"{millions(event['params'])} of {millions(start)} parameters, to {millions(target)}",
            }
        another = self._spent - self._got_on if event["params"] > event["target"] else 0.0
        left = self._advance(f"stage {event['stage']}: pruning", at_least=another)
        text = (
            f"stage {event['stage']}, iteration {event['iteration']}: {event['params']:,} parameters (target {event['target']:,})"
        )
        read = event["loss"] is not None and math.isfinite(event["loss"])  # not when no text was
        loss = f", calibration loss {event['loss']:.3f}" if read else ""
        self.say(f"{text}{loss}{left}")

    def _on_step(self, event: dict[str, Any]) -> None:
        self._trained = event["tokens"]
        loss = "not a number" if event["loss"] is None else f"{event['loss']:.3f}"
        text = f"stage {event['stage']}: training, {event['tokens']:,} tokens, loss {loss}"
        left = self._advance(f"stage {event['stage']}: training")
        speed = f"{event['tokens_per_second']:,.0f} tokens/s"
        self._figures |= {"tokens": f"{event['tokens']:,} tokens", "loss": f"loss {loss}", "speed": speed}
        self.say(f"{text}, lr {event['lr']:.2e}, {speed}{left}", often=True)

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self._figures["perplexity"] = f"perplexity {event['perplexity']:.2f}" if event["perplexity"] is not None else ""
        value = math.inf if event["perplexity"] is None else event["perplexity"]
        self.say(f"{self._whose(event)}: perplexity {value:.2f} on held-out text, {millions(event['params'])} parameters")

    def _on_tasks(self, event: dict[str, Any]) -> None:
        told = ", ".join(f"{one['task']} {words.score(one['value'], None, share=one['accuracy'])}" for one in event["scores"])
        mean = "" if event["average"] is None else f", average {words.score(event['average'], event['stderr'], share=True)}"
        self.say(f"{self._whose(event)}: {told}{mean}")

    def _whose(self, event: dict[str, Any]) -> str:
        """Which model was measured."""
        if event["stage"]:
            return f"stage {event['stage']}"
        first = words.begun(self._work or {})
        return "dense model" if first == "dense" else first

    def _on_warning(self, event: dict[str, Any]) -> None:
        self.say(f"warning: {event['message']}")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        where = f"stage {event['stage']}, " + (f"step {event['step']}" if event["pruned"] else "before its cuts")
        self.say(f"going on from {event['path']} ({where})")

    def _on_finished(self, event: dict[str, Any]) -> None:
        self.say(f"this run is finished: {event['path']}")

    def _on_interrupted(self, event: dict[str, Any]) -> None:
        self.say(event["message"])

    def _on_saved(self, event: dict[str, Any]) -> None:
        if "params_after" not in event:
            self.say(f"saved {event['path']}", often="-step-" in event["path"])

    def _on_reused(self, event: dict[str, Any]) -> None:
        self.say(f"{event['done']} of {event['of']} cells are finished and used again")

    def _on_cell(self, event: dict[str, Any]) -> None:
        left = "" if event["seconds_left"] is None else f"about {duration(event['seconds_left'])} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=(event["cell"] - 1) / event["of"], description=_cell(event), left=left)
        self.say(_cell(event) + (f", {left}" if left else ""))

    def _on_cell_done(self, event: dict[str, Any]) -> None:
        failed = event["error"] is not None
        came = f"failed: {event['error']}" if failed else f"perplexity {shown(perplexity_of(event['nll']), 'perplexity')}"
        self.say(f"{_cell(event)}: {came}")

    def _on_said(self, event: dict[str, Any]) -> None:
        self.say(f"  {event['text']}", often=True)


def _is_aside(event: dict[str, Any]) -> bool:
    """Whether the time before it went into what no estimate is made of: the model measured before anything else, and tasks."""
    kind = event.get("phase") if event["event"] == "progress" else event["event"]
    return kind in ("task", "tasks") or (kind in ("evaluate", "evaluation") and event.get("stage") == 0)


def _cell(event: dict[str, Any]) -> str:
    draw = f", draw {event['draw']} of {event['draws']}" if event["draws"] > 1 else ""
    return f"cell {event['cell']} of {event['of']}: {event['method']} to {millions(event['size'])}{draw}"
