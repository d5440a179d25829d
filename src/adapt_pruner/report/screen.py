"""What a user sees while work goes on, on stderr: moving bars and figures in a terminal or notebook, plain lines elsewhere.

`core.events.progress` knows what is being done and how long it has taken and will take; this file lays it out. No line is wider than the
terminal, and lines break between figures, never within one.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adapt_pruner.core.events import TOLD_AS, Cut, Evaluation, Event, Progress, Start, Step
from adapt_pruner.core.events.comparison import InCell
from adapt_pruner.core.events.progress import ProgressTracker, RunProgress
from adapt_pruner.core.events.run import Within
from adapt_pruner.core.events.words import compact, millions, span
from adapt_pruner.core.model.kinds import HEADS, first_layers
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.core.system.terminal import console as console_on
from adapt_pruner.core.system.terminal import filtered, fitted, visible, wrapped
from adapt_pruner.report.figures import after, sizes_of

_EVERY = 10.0  # seconds between plain lines of the same kind
_TOLD_EVERY = 0.25  # the same, for lines of JSON
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BAR = 12  # fewest columns of a bar; with less room there is no bar
_WIDEST = 40  # most columns of a bar
_HEIGHTS = " ▁▂▃▄▅▆▇█"
_NOTEBOOK = 100  # columns of the output of a notebook's cell
_NOTEBOOK_EVERY = 0.5  # seconds between two updates of it
_NOTEBOOK_FORM = '<pre style="white-space:pre-wrap;line-height:1.3;margin:0">{code}</pre>'
_WIDE = 110  # columns of a terminal from which phase and bar share a line


@contextmanager
def screen(*, quiet: bool = False) -> Iterator["Screen"]:
    """A listener for the events of a run; a quiet one shows nothing."""
    console = console_on(stderr=True, quiet=quiet)
    if os.environ.get(TOLD_AS) == "json":
        yield _Teller(console)
        return
    if console.is_jupyter and not quiet:
        lines = io.StringIO()
        shown = Screen(
            Console(file=lines, width=_NOTEBOOK, force_jupyter=False, force_terminal=False, color_system=None), moves=True
        )
        with _displayed(lines, shown.render):
            yield shown
        return
    if quiet or not console.is_terminal:
        yield Screen(console)
        return
    shown = Screen(console, moves=True)
    beside = sys.stdout.isatty()  # what is printed there has to keep clear of the moving lines; a file gets it as it is
    with (
        Live(console=console, transient=True, refresh_per_second=8, get_renderable=shown.render, redirect_stdout=beside),
        filtered(),
    ):
        yield shown


@contextmanager
def _displayed(lines: io.StringIO, moving: Callable[[], RenderableType]) -> Iterator[None]:
    """Within this context a notebook's cell shows the `lines` so far, and the result of `moving` below them, without widgets."""
    from IPython.display import display  # every notebook has it

    def drawn(*, last: bool) -> dict[str, str]:
        page = Console(
            file=io.StringIO(),
            record=True,
            width=_NOTEBOOK,
            force_jupyter=False,
            force_terminal=True,
            color_system="standard",
            legacy_windows=False,
        )
        page.print(lines.getvalue(), end="", markup=False, highlight=False, soft_wrap=True)
        if not last:
            page.print(moving())
        html = page.export_html(inline_styles=True, code_format=_NOTEBOOK_FORM, clear=False)
        return {"text/plain": page.export_text(), "text/html": html}

    shown = drawn(last=False)
    handle = display(shown, raw=True, display_id=True)
    over = threading.Event()

    def follow() -> None:
        before = shown
        while not over.wait(_NOTEBOOK_EVERY):
            now = drawn(last=False)
            if now != before:
                handle.update(now, raw=True)
            before = now

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        handle.update(drawn(last=True), raw=True)


class Bars:
    """The anatomy of a model in one line, through the events of its run: a bar for each layer, as high as the share of it that is left."""

    def __init__(self) -> None:
        self._began: dict[int, dict[str, int]] = {}
        self._now: dict[int, dict[str, int]] = {}
        self._left: Sequence[int] | None = None
        self._first: dict[str, int] = {}

    def hear(self, event: Event) -> None:
        """Take in a start or a cut. A log without the original sizes gives no bars."""
        if isinstance(event, Start) and event.began:
            self._first = first_layers(event.began)
            self._began, self._left = sizes_of(event.began, None, self._first)[0], event.layers_left
            sizes = sizes_of(event.sizes, self._left, self._first)[0]
            self._now = {layer: sizes[layer] for layer in self._began if layer in sizes}
        elif isinstance(event, Cut) and self._began:
            self._now, self._left = after(event, self._now, self._left, self._first)

    def lines(self, width: int) -> list[str]:
        """Bars of neurons, and of heads if one is gone; side by side if `width` characters are enough."""
        lines = []
        for kind in ("neurons", *HEADS):
            before = [sizes.get(kind, 0) for sizes in self._began.values()]
            now = [self._now.get(layer, {}).get(kind, 0) for layer in self._began]
            if any(before) and (kind == "neurons" or now != before):
                name = kind.replace("kv_", "KV ").replace("_", " ")
                lines.append(f"{name} {''.join(map(_height, now, before))} {sum(now) / sum(before):.0%}")
        if len(together := "  ".join(lines)) <= width:
            return [together]
        return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _height(now: int, before: int) -> str:
    """A character of eight heights. It is empty only if nothing is left, and full only if nothing is gone."""
    if not now or not before:
        return _HEIGHTS[0]
    return _HEIGHTS[8] if now >= before else _HEIGHTS[max(1, min(7, round(8 * now / before)))]


class Screen:
    """Turns events into a few moving lines, or into lines one below the other. Call it with each event."""

    def __init__(self, console: Console, *, moves: bool = False) -> None:
        self._console = console
        self._moves = moves
        self._last_line = 0.0
        self._work: Start | None = None
        self._bars = Bars()
        self._tracker = ProgressTracker()
        self._figures: dict[str, str] = {}  # figures shown beside the phase
        self._kept: tuple[RunProgress, float] | None = None  # where a watched run stands, and the time of that

    def __call__(self, event: Event) -> None:
        """Show one event: as it happens or, if it has a `time`, from a log."""
        self._tracker.hear(event)
        self._bars.hear(event)
        self._follow(event)
        if line := event.line(self._work.begun if self._work is not None else "dense"):
            timed = isinstance(event, Progress | Step | Cut | InCell | Within) and not self._moves and self._kept is None
            times = _times(self._tracker.at(event.time)) if timed else ""
            self.say(f"{line} ({times})" if times else line, often=event.often)

    def show_progress(self, progress: RunProgress, when: float) -> None:
        """Show where a run elsewhere said that it stood, at a time in Unix seconds; its events are not used for that."""
        self._kept = (progress, when)
        self.say(", ".join(part for part in (_doing(progress), _times(progress)) if part), often=True)

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Within this context take events in without a line for each, as for events before somebody looked."""
        quiet, self._console.quiet = self._console.quiet, True
        try:
            yield
        finally:
            self._console.quiet = quiet

    def figures(self) -> str:
        """The progress of the run, in a line."""
        return visible(" · ".join(value for value in self._figures.values() if value))

    def render(self) -> RenderableType:
        """The moving lines: the model, figures, and the progress of the work."""
        now, width = time.time(), self._console.width
        progress = self._tracker.at(now) if self._kept is None else self._kept[0].later(max(0.0, now - self._kept[1]))
        anatomy = [Text(line, style="cyan", no_wrap=True) for line in self._bars.lines(width)]
        figures = fitted([visible(value) for value in self._figures.values() if value], width)
        return Group(*anatomy, *(Text(line, no_wrap=True) for line in figures), *_bar(progress, width, now))

    def say(self, text: str, *, often: bool = False) -> None:
        """Show a line. `often` marks one of many, which is shown only now and then, and not at all under a bar."""
        if self._console.quiet or (often and (self._moves or time.monotonic() - self._last_line < _EVERY)):
            return
        if often:
            self._last_line = time.monotonic()
        shown = visible(text)
        if self._console.is_terminal:  # it would break a line anywhere
            shown = "\n".join(wrapped(shown, self._console.width, indent="  "))
        self._console.print(shown, highlight=False, markup=False, soft_wrap=True)

    def _follow(self, event: Event) -> None:
        """Update the figures."""
        match event:
            case Start():
                self._work = event
                self._figures = {
                    "stage": f"{event.stages} stages" if event.stages > 1 else "",
                    "params": f"to {millions(event.target)}" if event.target is not None else "",
                }
            case Cut() if (work := self._work) is not None and work.params is not None and work.target is not None:
                self._figures |= {
                    "stage": f"stage {event.stage} of {work.stages}",
                    "params": f"{millions(event.params)} of {millions(work.params)} parameters, to {millions(work.target)}",
                }
            case Step():
                tokens = f"{compact(event.tokens)} tokens"
                self._figures |= {"tokens": tokens, "loss": event.said_loss, "speed": event.speed}
            case Evaluation() if event.perplexity is not None:
                self._figures["perplexity"] = f"perplexity {event.perplexity:.2f}"
            case InCell() if event.inner is not None:
                self._follow(event.inner)


class _Teller(Screen):
    """Prints each event as a line of JSON."""

    def __call__(self, event: Event) -> None:
        middle = isinstance(event, Progress) and 0 < event.done < event.of
        if middle and time.monotonic() - self._last_line < _TOLD_EVERY:
            return
        if middle:
            self._last_line = time.monotonic()
        print(to_json(event.to_dict()), file=sys.stderr, flush=True)

    def say(self, text: str, *, often: bool = False) -> None:
        print(visible(text), file=sys.stderr, flush=True)


def _doing(progress: RunProgress) -> str:
    """What is being done, and where: stage 1, iteration 2: repairing 12/60."""
    return visible(": ".join(part for part in (progress.where, progress.doing) if part))


def _times(progress: RunProgress) -> str:
    """The time so far, and the time left."""
    return ", ".join(
        part for part in (f"{span(progress.seconds)} so far" if progress.seconds >= 1 else "", progress.said_left) if part
    )


def _bar(progress: RunProgress, width: int, now: float) -> list[RenderableType]:
    """Spinner and phase, and bar, share and seconds, in one line if `width` is enough, else in two; no bar without room."""
    what = f"{_FRAMES[int(8 * now) % len(_FRAMES)]} {_doing(progress) or 'starting'}"
    share = "" if progress.share is None else f"{progress.share:.0%}"
    figures = [part for part in (share, _times(progress)) if part]
    after = " · ".join(figures)
    beside = width >= _WIDE
    room = width - len(after) - 2 - (len(what) + 2 if beside else 0)
    if room < _BAR:
        return [Text(line, no_wrap=True) for line in fitted([what, *figures], width)]
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=1.0, completed=progress.share or 0.0, width=min(_WIDEST, room), pulse=progress.share is None)
    cells: list[RenderableType] = [bar, Text(after, no_wrap=True)]
    line.add_row(*([Text(what, no_wrap=True)] if beside else []), *cells)
    return [line] if beside else [*(Text(words, no_wrap=True) for words in fitted([what], width)), line]
