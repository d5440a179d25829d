"""What a user sees while work goes on: a bar with an estimate on a terminal, plain lines elsewhere, all on stderr."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

__all__ = ["Screen", "duration", "millions", "quiet_libraries", "screen"]

_EVERY = 10.0  # seconds between plain lines of the same kind


def millions(count: int) -> str:
    """A parameter count for people: 113.3 M."""
    return f"{count / 1e6:.1f} M" if count < 10**9 else f"{count / 1e9:.2f} B"


def duration(seconds: float) -> str:
    """A span of time for people: 45 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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
    with Progress(*columns, console=console, transient=True) as bar:
        yield Screen(console, bar)


class Screen:
    """Turns events into a bar or lines; call it with each event."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console = console
        self._bar = bar
        self._task = None if bar is None else bar.add_task("starting", total=1.0, left="")
        self._last_line = 0.0
        self._work: dict[str, Any] | None = None
        self._began = 0.0
        self._pruned = 0.0  # share of the pruning that is done
        self._trained = 0  # tokens

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of the pipeline."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _say(self, text: str, *, often: bool = False) -> None:
        """A line; `often` marks one of many, shown now and then, and not at all under a bar."""
        if often and (self._bar is not None or time.monotonic() - self._last_line < _EVERY):
            return
        if often:
            self._last_line = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _advance(self, description: str) -> str:
        """Move the bar; returns the estimate as text."""
        if self._work is None:
            return ""
        weight, before = self._work["calibration_tokens"], self._work["trained_tokens"]
        total = weight + self._work["training_tokens"] - before
        share = (weight * self._pruned + self._trained - before) / total if total else 1.0
        spent = time.monotonic() - self._began
        left = f"{duration(spent / share - spent)} left" if 0.02 < share <= 1 else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, description=description, left=left)
        return f", {left}" if left else ""

    def _on_load(self, event: dict[str, Any]) -> None:
        self._say(f"loading {event['model']}")

    def _on_loaded(self, event: dict[str, Any]) -> None:
        self._say(f"loaded {event['model']}: {millions(event['params'])} parameters")

    def _on_vocabulary(self, event: dict[str, Any]) -> None:
        self._say(
            f"{event['tokens']:,} of {event['tokens_before']:,} tokens stay, which leaves {millions(event['params'])} parameters"
        )

    def _on_start(self, event: dict[str, Any]) -> None:
        self._work, self._began, self._trained = event, time.monotonic(), event["trained_tokens"]
        text = f"pruning to {millions(event['target'])} parameters by {event['method']}"
        if event["stages"] > 1:
            text += f" in {event['stages']} stages"
        if event["training_tokens"]:
            text += f", training on {event['training_tokens']:,} tokens between them"
        if event["processes"] > 1:
            text += f", on {event['processes']} processes ({event['parallel']})"
        self._say(text)

    def _on_progress(self, event: dict[str, Any]) -> None:
        where = f"stage {event['stage']}: " if event.get("stage") else ""
        what = {"score": f"scoring, iteration {event.get('iteration')}", "evaluate": "evaluating"}[event["phase"]]
        left = self._advance(where + what)
        self._say(f"{where}{what}, batch {event['done']} of {event['of']}{left}", often=True)

    def _on_cut(self, event: dict[str, Any]) -> None:
        if self._work is not None:
            start, target = self._work["params"], self._work["target"]
            self._pruned = min(1.0, (start - event["params"]) / max(1, start - target))
        left = self._advance(f"stage {event['stage']}: pruning")
        text = (
            f"stage {event['stage']}, iteration {event['iteration']}: {event['params']:,} parameters (target {event['target']:,})"
        )
        loss = f", calibration loss {event['loss']:.3f}" if math.isfinite(event["loss"]) else ""  # none when no text was read
        self._say(f"{text}{loss}{left}")

    def _on_step(self, event: dict[str, Any]) -> None:
        self._trained = event["tokens"]
        text = f"stage {event['stage']}: training, {event['tokens']:,} tokens, loss {event['loss']:.3f}"
        left = self._advance(text)
        speed = f"{event['tokens_per_second']:,.0f} tokens/s"
        self._say(f"{text}, lr {event['lr']:.2e}, {speed}{left}", often=True)

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        name = f"stage {event['stage']}" if event["stage"] else "dense model"
        self._say(f"{name}: perplexity {event['perplexity']:.2f} on held-out text, {millions(event['params'])} parameters")

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._say(f"warning: {event['message']}")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        where = f"stage {event['stage']}, " + (f"step {event['step']}" if event["pruned"] else "before its cuts")
        self._say(f"going on from {event['path']} ({where})")

    def _on_finished(self, event: dict[str, Any]) -> None:
        self._say(f"this run is finished: {event['path']}")

    def _on_interrupted(self, event: dict[str, Any]) -> None:
        self._say(event["message"])

    def _on_saved(self, event: dict[str, Any]) -> None:
        if "params_after" not in event:
            self._say(f"saved {event['path']}", often="-step-" in event["path"])

    def _on_reused(self, event: dict[str, Any]) -> None:
        self._say(f"{event['done']} of {event['of']} cells are finished and used again")

    def _on_cell(self, event: dict[str, Any]) -> None:
        left = "" if event["seconds_left"] is None else f"about {duration(event['seconds_left'])} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=(event["cell"] - 1) / event["of"], description=_cell(event), left=left)
        self._say(_cell(event) + (f", {left}" if left else ""))

    def _on_cell_done(self, event: dict[str, Any]) -> None:
        came = f"perplexity {math.exp(event['nll']):,.2f}" if event["error"] is None else f"failed: {event['error']}"
        self._say(f"{_cell(event)}: {came}")

    def _on_said(self, event: dict[str, Any]) -> None:
        self._say(f"  {event['text']}", often=True)


def _cell(event: dict[str, Any]) -> str:
    draw = f", draw {event['draw']} of {event['draws']}" if event["draws"] > 1 else ""
    return f"cell {event['cell']} of {event['of']}: {event['method']} to {millions(event['size'])}{draw}"
