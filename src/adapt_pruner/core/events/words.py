"""Numbers and commands as people read them."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Form = Literal[
    "params", "bytes", "perplexity", "bits", "speed", "count", "share", "right", "loss", "lr", "GiB", "ratio", "times", "plain"
]
"""Kinds of figures that `shown` knows."""
NARROW = "\u00a0"
"""The character between a number and its unit; it keeps both on one line."""


def measured_text(figures: Mapping[str, Any]) -> str:
    """What the text is that a run was measured on: held out, or not all of it."""
    return "text that is not all held out" if figures.get("not_held_out") else "held-out text"


def compact(value: float) -> str:
    """A count in a few characters: 113.3 M, 2.5 k, 96."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{1 if abs(value) < 1000 * size and size < 1e9 else 2}f}{NARROW}{unit}"
    return f"{value:,.0f}"


def counted(count: int, noun: str) -> str:
    """A count and its noun: 1 window, 2,000 windows."""
    return f"{count:,d} {noun}{'s' * (count != 1)}"


def answered(*, right: Sequence[int], asked: int, ended: int, looping: int, dense: Sequence[int] | None) -> str:
    """How a model answers: `answers 61 of the 74 prompts that the dense model answers; 80 of 100 answers end, 3 loop`.

    Args:
        right: the numbers of the prompts that it answers rightly.
        asked: number of prompts.
        ended: answers that it ended by itself.
        looping: answers that repeat something again and again.
        dense: the numbers of the prompts that the dense model answers rightly; None if this is the dense model.
    """
    ends = f"{ended} of {counted(asked, 'answer')} end, {looping} {'loops' if looping == 1 else 'loop'}"
    if dense is None:
        return f"answers {len(right)} of {counted(asked, 'prompt')} rightly; {ends}"
    return f"answers {len(set(right) & set(dense))} of the {counted(len(dense), 'prompt')} that the dense model answers; {ends}"


def by_model(spec: str) -> str | None:
    """What the model of a run wrote, in words, by its SPEC (see `data.sources`); None for any other text."""
    base, _, part = spec.partition("#")
    named = {"self": "self-written text", "self-chat": "conversations that the dense model wrote"}.get(base.partition(":")[0])
    return f"{named}, the part held out" if named and part == "heldout" else named


def duration(seconds: float) -> str:
    """A span of time: 45 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW}min{NARROW}{whole % 60:02d}{NARROW}s"
    return f"{whole // 3600}{NARROW}h{NARROW}{whole % 3600 // 60:02d}{NARROW}min"


def shown(value: float | None, form: Form) -> str:
    """A figure as people read it; `right` is a share of right answers, `plain` has four digits."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    if form == "params":
        return compact(value) if value >= 1e6 else f"{value:,.0f}"
    if form == "bytes":
        if value >= 1e9:
            return f"{value / 1e9:,.2f}{NARROW}GB"
        return f"{value / 1e6:,.0f}{NARROW}MB" if value >= 1e7 else f"{value / 1e3:,.0f}{NARROW}kB"
    if form == "perplexity":
        if value < 100:
            return f"{value:.2f}"
        return f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"
    if form == "speed":
        return f"{value:,.0f}"
    if form == "count":
        return compact(value)
    if form == "lr":
        return f"{value:.1e}".replace("e-0", "e-")
    return {
        "bits": "{:.3f}",
        "share": "{:.1%}",
        "right": "{:.1%}",
        "loss": "{:.3f}",
        "GiB": "{:.2f}" + NARROW + "GiB",
        "ratio": "{:.3g}×",
        "times": "{:,.2f}×" if value < 100 else "{:,.0f}×",
        "plain": "{:,.4g}",
    }[form].format(value)


def millions(count: int) -> str:
    """A parameter count within a line of text: 113.3 M."""
    return shown(count, "params").replace(NARROW, " ")


def span(seconds: float) -> str:
    """A time span within a line of text, formatted like `duration`."""
    return duration(seconds).replace(NARROW, " ")


def progress(done: int, of: int) -> str:
    """How much of a count is done: 12/60, 1,024/16,256; empty if the total is not known."""
    return f"{done:,}/{of:,}" if of else ""


def score(value: float, error: float | None, *, share: bool) -> str:
    """A task's figure with its standard error; in per cent if it is a share of right answers."""
    if not share:
        return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def shots(counts: Iterable[int]) -> str:
    """How many examples precede the items of tasks, each number once: 0-shot, 5-shot."""
    return ", ".join(f"{count}-shot" for count in sorted(set(counts)))


def tick(value: float, form: Form) -> str:
    """A figure at a tick of an axis: like `shown`, without trailing zeros."""
    return re.sub(r"\.(?=\D|$)", "", re.sub(r"(\.\d*?)0+(?=\D|$)", r"\1", shown(value, form)))


def ticks(low: float, high: float, *, log: bool = False, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart.

    On a log scale: 1, 1 and 3, or 1, 2 and 5 times each power of ten.
    """
    if not high > low:
        return [low]
    if log and high / low > 8:
        numbers: list[float] = []
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            numbers = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
            if len(numbers) >= 3:
                break
        return numbers[:: -(-len(numbers) // most)] or [low, high]
    rough = (high - low) / most
    step = next(s for e in (0, 1) for m in (1, 2, 5) if (s := m * 10.0 ** (math.floor(math.log10(rough)) + e)) >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def typed(*words: object) -> str:
    """A command of ours, quoted as a shell needs it."""
    return shlex.join(["adapt-pruner", *map(str, words)])
