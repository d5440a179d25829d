"""Charts as drawings: the marks of each picture and its words, and where they lie. `templates/` make HTML of them.

Marks are SVG, which stretches; words are HTML, which keeps its size on a phone. Colours are classes; the page's style gives them
values in light and dark. Each rectangle says its meaning under the pointer, each line the figures of its points.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import pairwise, zip_longest
from typing import NamedTuple

from adapt_pruner.core.events.words import score, shown, tick, ticks
from adapt_pruner.report.charts import Anatomy, Chart, HeatMap, Histogram, Lines, Panel, Scores, Series

_FULL = 1000.0  # width and height of a picture in its own coordinates
_TURNS = ("", " second", " third")  # forms of dots and dashes for the first use of each colour, the second and the third

Place = tuple[float, float]
"""Shares of the width from the left and of the height from the top, or in a path the coordinates of the picture."""


class Rect(NamedTuple):
    """A rectangle in the picture's coordinates; `group` is the number of the cuts that removed what it stands for, from 1."""

    x: float
    y: float
    width: float
    height: float
    tag: str
    title: str
    opacity: float | None = None
    group: int | None = None


class Path(NamedTuple):
    """Lines in the picture's coordinates; a line of one point is a dot."""

    tag: str
    lines: Sequence[Sequence[Place]]
    closed: bool = False

    @property
    def d(self) -> str:
        """The path as SVG writes it."""
        end = "Z" if self.closed else ""
        return "".join(
            "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + ("h.01" if len(line) == 1 else end) for line in self.lines
        )


@dataclass(frozen=True)
class Plot:
    """One frame: marks, the numbers at its sides, and words in it.

    `look` is its height as a class, `tips` are words of points under the pointer, `names` those of vertical lines, `notes` those
    above points or, with `below`, under them, `values` those to its right.
    """

    label: str
    rects: Sequence[Rect] = ()
    paths: Sequence[Path] = ()
    ys: Sequence[tuple[float, str]] = ()
    xs: Sequence[tuple[float, str]] = ()
    x_label: str = ""
    y_label: str = ""
    look: str = ""
    size: Place = (_FULL, _FULL)
    heading: str = ""
    tips: Sequence[tuple[float, float, str]] = ()
    names: Sequence[tuple[float, str]] = ()
    notes: Sequence[tuple[float, float, str]] = ()
    below: bool = False
    stars: Sequence[Place] = ()
    values: Sequence[str] = ()


class Key(NamedTuple):
    """A line of a legend: the classes and opacities of its signs, and what they stand for."""

    signs: Sequence[tuple[str, float | None]]
    text: str


@dataclass(frozen=True)
class Drawing:
    """A picture: its frames, one above the other, and its legend; with `steps`, a slider shows the model after each of them."""

    plots: Sequence[Plot]
    legend: Sequence[Key] = ()
    steps: Sequence[str] = ()


@singledispatch
def drawing(chart: Chart) -> Drawing:
    """What a chart looks like."""
    raise TypeError(chart)


def _scale(values: Sequence[float], *, log: bool, room: float) -> tuple[float, float, Callable[[float], float]]:
    """Lowest and highest value shown, and a function from a value to its share of the height, with `room` above and below."""
    low, high = min(values), max(values)
    log = log and low > 0
    if high <= low:
        low, high = (low / 2, low * 2) if log else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
    turn: Callable[[float], float] = math.log if log else float
    bottom, top = turn(low), turn(high)
    room *= top - bottom
    return low, high, lambda value: 1 - (turn(value) - bottom + room) / (top - bottom + 2 * room)


@drawing.register
def lines(chart: Lines, *, size: Place = (_FULL, _FULL), room: float | None = None) -> Drawing:
    """What lines look like.

    Args:
        chart: the lines.
        size: coordinates of the right lower corner of their frame.
        room: share of the width that is left free on the right; by default as much as on the left.
    """
    every = [point for series in chart.series for point in series.points]
    xs, ys = [x for x, _ in every], [y for series in chart.series for y in _heights(series)]
    log = chart.log and min(ys) > 0
    low, high, down = _scale(ys, log=log, room=0.14 if any(series.labels for series in chart.series) else 0.04)
    left, right = min([*xs, *(x for x, _ in chart.marks)]), max(xs)
    edge = 0.05 if any(series.dots for series in chart.series) else 0.0
    begin, span = (right, left - right) if chart.falls else (left, right - left)
    wide, tall = size

    def over(x: float) -> float:
        return edge + (1 - edge - (edge if room is None else room)) * (x - begin) / (span or 1.0)

    def places(points: Iterable[Place]) -> list[Place]:
        return [(wide * over(x), tall * down(y)) for x, y in points]

    y_ticks = [(down(y), tick(y, chart.y_form)) for y in ticks(low, high, log=log, most=3 if chart.short else 5)]
    marks = [(over(x), text) for x, text in chart.marks]
    paths = [
        Path("grid", [[(0, tall * y), (wide, tall * y)] for y, _ in y_ticks]),
        Path("mark", [[(wide * x, 0), (wide * x, tall)] for x, _ in marks]),
    ]
    looks = [f"tone{tone}{_TURNS[turn % len(_TURNS)]}" for turn, tone in chart.looks()]
    for series, look, lead in zip(chart.series, looks, chart.leads(), strict=True):
        paths.append(Path(f"thin {look}", [places(lead)] if lead else []))
        if not series.star:
            paths += _marks(series, look, places)

    first, last = (shown(chart.series[0].points[at][1], chart.y_form) for at in ((-1, 0) if chart.falls else (0, -1)))
    plot = Plot(
        f"{chart.title}: {chart.y_label} from {first} to {last} over {chart.x_label}",
        paths=paths,
        ys=y_ticks,
        xs=[(over(x), text) for x, text in chart.x_names(left, right, most=5)],
        x_label=chart.x_label,
        y_label=chart.y_label + " (log scale)" * log,
        size=size,
        look="short" if chart.short else "",
        tips=[
            (round(over(x), 4), round(down(y), 4), f"{name or series.name}: {shown(y, chart.y_form)} at {shown(x, chart.x_form)} {chart.x_label}")
            for series in chart.series for (x, y), name in zip_longest(series.points, series.labels)
        ],
        names=marks if len(marks) <= 12 and not chart.short else [],
        notes=[(over(x), down(y), text) for x, y, text in chart.named()],
        below=chart.below,
        stars=[(over(x), down(y)) for series in chart.series if series.star for x, y in series.points],
    )  # fmt: skip
    keys = [Key([(_sign(series, look), None)], series.name) for series, look in zip(chart.series, looks, strict=True)]
    return Drawing([plot], keys if len(keys) > 1 else [])


def _marks(series: Series, look: str, places: Callable[[Iterable[Place]], list[Place]]) -> Iterator[Path]:
    """A line with its band or, if it has dots, with bars at them."""
    xs, line = [x for x, _ in series.points], places(series.points)
    lows, highs = places(zip(xs, series.low, strict=False)), places(zip(xs, series.high, strict=False))
    if lows and not series.dots:
        yield Path(f"band {look}", [[*highs, *reversed(lows)]], closed=True)
    yield Path(f"line{' faint' * series.faint} {look}", [line])
    if series.dots:
        yield Path(f"whisker {look}", list(zip(lows, highs, strict=True)))
        yield Path(f"dot {look}", [[place] for place in line])


def _heights(series: Series) -> list[float]:
    """The values that must fit into the height; for a faint line, the middle 98 %."""
    ys = sorted(y for _, y in series.points)
    return ys[len(ys) // 100 : len(ys) - len(ys) // 100] if series.faint else [*ys, *series.low, *series.high]


def _sign(series: Series, look: str) -> str:
    """The classes of a line's sign in the legend, which looks like its dots."""
    return "star" if series.star else f"key{' faint' * series.faint}{' round' * series.dots} {look}"


@drawing.register
def _heatmap(chart: HeatMap) -> Drawing:
    lefts, tops = ([round(_FULL * i / len(names), 1) for i in range(len(names) + 1)] for names in (chart.columns, chart.rows))
    rects = [
        Rect(left, top, right - left, bottom - top, "heat", f"layer {layer}, {name}: {shown(value, chart.form)}", 0.05 + 0.95 * shade)
        for (top, bottom), name, shades, values in zip(pairwise(tops), chart.rows, chart.shades(), chart.values, strict=True)
        for (left, right), layer, shade, value in zip(pairwise(lefts), chart.columns, shades, values, strict=True)
        if shade is not None
    ]  # fmt: skip
    every = -(-len(chart.rows) // 8)
    plot = Plot(
        f"{chart.title}: a heat map of {len(chart.rows)} {chart.row_is}s by {len(chart.columns)} layers; {chart.about}", rects,
        ys=[((row + 0.5) / len(chart.rows), name) for row, name in enumerate(chart.rows) if row % every == 0],
        xs=_layer_ticks(chart.columns), x_label="layer", look="heatmap",
    )  # fmt: skip
    return Drawing([plot], [Key([], chart.low), Key([("ramp", None)], ""), Key([], chart.high)])


def _layer_ticks(names: Sequence[str]) -> list[tuple[float, str]]:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(names) / step <= 10)
    return [((i + 0.5) / len(names), name) for i, name in enumerate(names) if i % every == 0]


@drawing.register
def _anatomy(chart: Anatomy) -> Drawing:
    plots = [
        Plot(
            f"{panel.name} of each layer: {sum(panel.left):,} of {sum(panel.total):,} are left", list(_columns(panel, chart)),
            ys=[(0.0, f"{max(panel.total):,}"), (1.0, "0")], look="tall" if max(panel.total) > 64 else "low",
            heading=f"{panel.name}: {sum(panel.left):,} of {sum(panel.total):,} left",
        )
        for panel in chart.panels
    ]  # fmt: skip
    plots[-1] = replace(plots[-1], xs=_layer_ticks(list(map(str, chart.layers))), x_label="layer")
    (first, _), (last, _) = chart.groups[0], chart.groups[-1]
    tints = [("key gone", _tint(group, len(chart.groups))) for group in range(len(chart.groups))]
    legend = [Key([("key kept", None)], "left"), Key(tints, f" gone, {first}" + (f" to {last}" if len(tints) > 1 else ""))]
    return Drawing(plots, legend, [f"{name} · {shown(params, 'params')}" for name, params in (chart.began, *chart.groups)])


def _columns(panel: Panel, chart: Anatomy) -> Iterator[Rect]:
    """Each layer from the bottom: what is left, then what was removed, the last removal lowest; a few units get gaps."""
    wide, peak = _FULL / len(chart.layers), max(panel.total)
    gap = wide * (0.14 if len(chart.layers) <= 64 else 0.0)
    unit, slit = (1, 0.06 * _FULL / peak) if peak <= 64 else (peak, 0.0)
    for i, layer in enumerate(chart.layers):
        went = [counts[i] for counts in panel.gone]
        steps = "; ".join(f"{name} −{count:,}" for (name, _), count in zip(chart.groups, went, strict=True) if count)
        title = f"layer {layer}: {panel.left[i]:,} of {panel.total[i]:,} {panel.name} left" + (f" ({steps})" if steps else "")
        at = 0
        for group, count in [(None, panel.left[i]), *reversed(list(enumerate(went)))]:
            for start in range(at, at + count, unit):
                units = min(unit, at + count - start)
                y, height = _FULL * (1 - (start + units) / peak) + slit / 2, _FULL * units / peak - slit
                place = (i * wide + gap / 2, y, wide - gap, height)
                if group is None:
                    yield Rect(*place, "kept", title)
                else:
                    yield Rect(*place, "gone", title, _tint(group, len(chart.groups)), group + 1)
            at += count


def _tint(group: int, groups: int) -> float:
    """Opacity of what a group of cuts removed: the first is faintest."""
    return 0.25 + 0.6 * ((group + 1) / groups)


@drawing.register
def _histogram(chart: Histogram) -> Drawing:
    half = len(chart.kept) // 2
    filled = [i for i in range(len(chart.kept)) if chart.kept[i] or chart.removed[i]]
    low, high = min(filled[0], half - 4), max(filled[-1] + 1, half + 4)
    wide, peak = _FULL / (high - low), max(a + b for a, b in zip(chart.kept, chart.removed, strict=True))
    rects = []
    for i in range(low, high):
        bottom = _FULL
        span = f"{2 ** ((i - half) / 4):.2g} to {2 ** ((i + 1 - half) / 4):.2g} of the line"
        for tag, word, count in (("gone", "removed", chart.removed[i]), ("kept", "kept", chart.kept[i])):
            height = _FULL * count / peak
            bottom -= height
            if count:
                rects.append(Rect((i - low) * wide + wide * 0.06, bottom, wide * 0.88, height, tag, f"{count:,} {word}, {span}"))
    line = (half - low) * wide
    plot = Plot(
        f"{chart.title}: {sum(chart.removed):,} below the cut line went, {sum(chart.kept):,} above it stay", rects,
        [Path("mark strong", [[(line, 0), (line, _FULL)]])], ys=[(0.0, f"{peak:,}"), (1.0, "0")],
        xs=[((i - low) / (high - low), f"{2.0 ** ((i - half) // 4):g}×") for i in range(low, high + 1) if (i - half) % 4 == 0],
        x_label="score / cut line", y_label="units", look="short",
    )  # fmt: skip
    return Drawing([plot], [Key([("key gone", None)], "removed"), Key([("key kept", None)], "kept")])


@drawing.register
def _scores(chart: Scores) -> Drawing:
    """A frame per task: the bar of the model before, above the bar of the model now."""
    plots = []
    for task in chart.scores:
        bars = [(chart.begun, "before", task.before), ("now", "kept", task.now)]
        values = [score(*figure, share=True) if figure else "–" for *_, figure in bars]
        rects = [
            Rect(0, 100 + 420 * number, _FULL * figure[0], 380, tag, f"{task.task}, {name}: {value} %")
            for number, ((name, tag, figure), value) in enumerate(zip(bars, values, strict=True)) if figure
        ]  # fmt: skip
        chance = None if task.chance is None else _FULL * task.chance
        paths = [] if chance is None else [Path("mark strong", [[(chance, 0), (chance, _FULL)]])]
        label = "; ".join(rect.title for rect in rects)
        plots.append(Plot(label, rects, paths, ys=[(0.5, task.task)], look="task", values=values))
    return Drawing(plots, [Key([("key before", None)], chart.begun), Key([("key kept", None)], "now")])
