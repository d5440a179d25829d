"""Charts as HTML that needs nothing else: marks in SVG, which stretches, and words in HTML, which keep their size on a phone.

Colours are classes; the page's style gives them values in light and dark. Each mark has its meaning in its <title>. The same
figures are in a table below every picture, for people who cannot see it or point at it.
"""

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from adapt_pruner.core.strict_json import to_json
from adapt_pruner.core.words import score, shown, tick, ticks
from adapt_pruner.report.charts import Anatomy, Chart, HeatMap, Histogram, Lines, Panel, Scores, Series

__all__ = ["drawn", "escaped", "table"]

_FULL = 1000.0  # width and height of a picture in its own coordinates
_TURNS = ("", "second", "third")  # forms of dots and dashes for the first use of each colour, the second and the third


def escaped(text: object) -> str:
    """Text with HTML's special characters escaped."""
    return html.escape(str(text))


def drawn(chart: Chart) -> str:
    """The chart as a <figure>."""
    body = _DRAWERS[type(chart)](chart)
    said = " ".join(filter(None, (chart.about, getattr(chart, "note", ""))))
    about = f"<p>{escaped(said)}</p>" if said else ""
    header, rows = chart.table()
    words = (
        f'<details><summary>Figures<span class="sr"> of {escaped(chart.title)}</span></summary>{table(header, rows)}</details>'
    )
    kind = type(chart).__name__.lower()
    return (
        f'<figure class="{kind}" id="{escaped(chart.key)}"><figcaption><h3>{escaped(chart.title)}</h3>{about}</figcaption>'
        f"{body}{words}</figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """A table whose first column names its rows; a wide table scrolls by itself."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    above, named = (f'<p class="caption">{escaped(caption)}</p>', f' aria-label="{escaped(caption)}"') if caption else ("", "")
    return (
        f'{above}<div class="scroll" tabindex="0"><table{named}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _svg(label: str, inner: str) -> str:
    box = f"0 0 {_FULL:.0f} {_FULL:.0f}"
    return f'<svg role="img" aria-label="{escaped(label)}" viewBox="{box}" preserveAspectRatio="none">{inner}</svg>'


def _rect(
    x: float, y: float, width: float, height: float, tag: str, title: str = "", opacity: float | None = None, extra: str = ""
) -> str:
    shade = "" if opacity is None else f' fill-opacity="{opacity:.2f}"'
    inner = f"<title>{escaped(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{tag}"{shade}{extra}>{inner}</rect>'


def _labels(tag: str, side: str, placed: Sequence[tuple[float, str]]) -> str:
    spans = "".join(
        f'<span{" class=last" if side == "left" and at > 0.97 else ""} style="{side}:{100 * at:.2f}%">{escaped(text)}</span>'
        for at, text in placed
    )
    return f'<div class="{tag}" aria-hidden="true">{spans}</div>'


def _scale(values: Sequence[float], *, log: bool, room: float) -> tuple[float, float, Callable[[float], float]]:
    """Lowest and highest value shown, and a function from a value to its share of the height, with `room` above and below."""
    low, high = min(values), max(values)
    log = log and low > 0
    if high <= low:
        low, high = (low / 2, low * 2) if log else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
    turn: Callable[[float], float] = math.log if log else float
    bottom, top = turn(low), turn(high)
    room *= top - bottom
    return low, high, lambda value: (turn(value) - bottom + room) / (top - bottom + 2 * room)


def _lines(chart: Lines) -> str:
    every = [point for series in chart.series for point in series.points]
    xs, ys = [x for x, _ in every], [y for series in chart.series for y in _heights(series)]
    log = chart.log and min(ys) > 0
    low, high, up = _scale(ys, log=log, room=0.14 if any(series.labels for series in chart.series) else 0.04)
    left, right = min([*xs, *(x for x, _ in chart.marks)]), max(xs)
    edge = 0.05 if any(series.dots for series in chart.series) else 0.0
    span = (right - left) or 1.0

    def over(x: float) -> float:
        at = edge + (1 - 2 * edge) * (x - left) / span
        return 1 - at if chart.falls else at

    def places(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(_FULL * over(x), _FULL * (1 - up(y))) for x, y in points]

    y_ticks = [(1 - up(y), tick(y, chart.y_form)) for y in ticks(low, high, log=log, most=3 if chart.short else 5)]
    x_ticks = [(over(x), text) for x, text in chart.x_names(left, right, most=5)]
    paths = [f'<path class="grid" d="{"".join(f"M0 {_FULL * y:.1f}H{_FULL:.0f}" for y, _ in y_ticks)}"/>']
    if chart.marks:
        paths.append(f'<path class="mark" d="{"".join(f"M{_FULL * over(x):.1f} 0V{_FULL:.0f}" for x, _ in chart.marks)}"/>')
    looks = [f"tone{tone} {_TURNS[turn % len(_TURNS)]}".strip() for turn, tone in chart.looks()]
    for series, look, lead in zip(chart.series, looks, chart.leads(), strict=True):
        paths += [f'<path class="thin {look}" d="M{_points(places(lead))}"/>'] if lead else []
        if not series.star:
            paths += _marks(series, look, places)
    notes = "".join(
        f'<span class="at{" first" * (over(x) < 0.1)}{" last" * (over(x) > 0.9)}{" below" * chart.below}" style="left:{100 * over(x):.2f}%;top:{100 * (1 - up(y)):.2f}%">{escaped(text)}</span>'
        for x, y, text in chart.named()
    ) + "".join(
        f'<i class="star" style="left:{x / 10:.2f}%;top:{y / 10:.2f}%"></i>'
        for series in chart.series if series.star for x, y in places(series.points)
    )  # fmt: skip
    tips = [
        [round(over(x), 4), round(1 - up(y), 4), f"{name or series.name}: {shown(y, chart.y_form)} at {shown(x, chart.x_form)} {chart.x_label}"]
        for series in chart.series for (x, y), name in zip_longest(series.points, series.labels)
    ]  # fmt: skip
    named = [(over(x), text) for x, text in chart.marks] if len(chart.marks) <= 12 and not chart.short else []
    first, last = chart.series[0].points[0][1], chart.series[0].points[-1][1]
    course = (last, first) if chart.falls else (first, last)
    label = f"{chart.title}: {chart.y_label} from {shown(course[0], chart.y_form)} to {shown(course[1], chart.y_form)} over {chart.x_label}"
    keys = "".join(
        f'<span><i class="{_key(series, look)}"></i>{escaped(series.name)}</span>' for series, look in zip(chart.series, looks, strict=True)
    )  # fmt: skip
    legend = f'<p class="legend">{keys}</p>' if len(chart.series) > 1 else ""
    return (
        f'{legend}<div class="plot{" short" if chart.short else ""}">{_labels("ys", "top", y_ticks)}'
        f'<div class="canvas" data-tips="{escaped(to_json(tips))}">{_svg(label, "".join(paths))}{_labels("marks", "left", named)}{notes}</div>'
        f'{_labels("xs", "left", x_ticks)}<p class="x">{escaped(chart.x_label)}</p></div>'
    )


def _marks(
    series: Series, look: str, places: Callable[[Iterable[tuple[float, float]]], list[tuple[float, float]]]
) -> Iterator[str]:
    """A line with its band or, if it has dots, with bars at them."""
    xs, line = [x for x, _ in series.points], places(series.points)
    lows, highs = places(zip(xs, series.low, strict=False)), places(zip(xs, series.high, strict=False))
    if series.low and not series.dots:
        yield f'<path class="band {look}" d="M{_points([*highs, *reversed(lows)])}Z"/>'
    yield f'<path class="line{" faint" * series.faint} {look}" d="M{_points(line)}"/>'
    if series.low and series.dots:
        bars = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for (x, low), (_, high) in zip(lows, highs, strict=True))
        yield f'<path class="whisker {look}" d="{bars}"/>'
    if series.dots:
        yield f'<path class="dot {look}" d="{"".join(f"M{x:.1f} {y:.1f}h.01" for x, y in line)}"/>'


def _heights(series: Series) -> list[float]:
    """The values that must fit into the height; for a faint line, the middle 98 %."""
    ys = sorted(y for _, y in series.points)
    return ys[len(ys) // 100 : len(ys) - len(ys) // 100] if series.faint else [*ys, *series.low, *series.high]


def _key(series: Series, look: str) -> str:
    """The classes of a line's key, which looks like its dots."""
    return "star" if series.star else " ".join(filter(None, ("key", "faint" * series.faint, "round" * series.dots, look)))


def _points(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _heatmap(chart: HeatMap) -> str:
    wide, high = _FULL / len(chart.columns), _FULL / len(chart.rows)
    cells = []
    for row, (shades, values) in enumerate(zip(chart.shades(), chart.values, strict=True)):
        for column, (shade, value) in enumerate(zip(shades, values, strict=True)):
            if value is None or shade is None:
                continue
            text = f"layer {chart.columns[column]}, {chart.rows[row]}: {shown(value, chart.form)}"
            cells.append(_rect(column * wide, row * high, wide, high, "heat", text, 0.05 + 0.95 * shade))
    every = -(-len(chart.rows) // 8)
    ys = [((row + 0.5) / len(chart.rows), name) for row, name in enumerate(chart.rows) if row % every == 0]
    label = f"{chart.title}: a heat map of {len(chart.rows)} cuts by {len(chart.columns)} layers; {chart.about}"
    return (
        f'<div class="plot heatmap">{_labels("ys", "top", ys)}<div class="canvas cells">{_svg(label, "".join(cells))}</div>'
        f'{_labels("xs", "left", _layer_ticks(chart.columns))}<p class="x">layer</p></div>'
        f'<p class="legend"><span>{escaped(chart.low)}</span><i class="ramp" aria-hidden="true"></i><span>{escaped(chart.high)}</span></p>'
    )


def _layer_ticks(names: Sequence[str]) -> list[tuple[float, str]]:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(names) / step <= 10)
    return [((i + 0.5) / len(names), name) for i, name in enumerate(names) if i % every == 0]


def _anatomy(chart: Anatomy) -> str:
    parts = []
    for panel in chart.panels:
        label = f"{panel.name} of each layer: {sum(panel.left):,} of {sum(panel.total):,} are left"
        height = "tall" if max(panel.total) > 64 else "low"
        peak = max(panel.total)
        ys = [(0.0, f"{peak:,}"), (1.0, "0")]
        parts.append(
            f'<div class="plot {height}"><p class="y">{escaped(panel.name)}: {sum(panel.left):,} of {sum(panel.total):,} left</p>'
            f'{_labels("ys", "top", ys)}<div class="canvas cells">{_svg(label, _columns(panel, chart))}</div></div>'
        )
    ends = [chart.began, *chart.groups]
    steps = escaped(to_json([f"{name} · {shown(params, 'params')}" for name, params in ends]))
    groups = len(chart.groups)
    tints = "".join(f'<i class="key gone" style="opacity:{_tint(i, groups):.2f}"></i>' for i in range(groups))
    return (
        f'<div class="slider" hidden><label for="stage">Show the model after</label> <output for="stage"></output>'
        f'<input id="stage" type="range" min="0" max="{groups}" value="{groups}" data-steps="{steps}"></div>'
        f'<div class="columns">{"".join(parts)}<div class="plot">'
        f'{_labels("xs", "left", _layer_ticks(list(map(str, chart.layers))))}<p class="x">layer</p></div></div>'
        f'<p class="legend"><span><i class="key kept"></i>left</span><span>{tints} gone, {escaped(chart.groups[0][0])}'
        f"{f' to {escaped(chart.groups[-1][0])}' if groups > 1 else ''}</span></p>"
    )


def _columns(panel: Panel, chart: Anatomy) -> str:
    """Each layer from the bottom: what is left, then what was removed, the last removal lowest; a few units get gaps."""
    wide, peak = _FULL / len(chart.layers), max(panel.total)
    gap = wide * (0.14 if len(chart.layers) <= 64 else 0.0)
    rects = []
    for i, layer in enumerate(chart.layers):
        went = [counts[i] for counts in panel.gone]
        course = f"layer {layer}: {panel.left[i]:,} of {panel.total[i]:,} {panel.name} left"
        steps = "; ".join(f"{name} −{count:,}" for (name, _), count in zip(chart.groups, went, strict=True) if count)
        title = f"{course} ({steps})" if steps else course
        at = 0
        for number, count in [(None, panel.left[i]), *reversed(list(enumerate(went)))]:
            if not count:
                continue
            pieces = [(at + j, 1) for j in range(count)] if peak <= 64 else [(at, count)]
            for start, units in pieces:
                slit = 0.06 * _FULL / peak if peak <= 64 else 0.0
                y, height = _FULL * (1 - (start + units) / peak) + slit / 2, _FULL * units / peak - slit
                tag = "kept" if number is None else "gone"
                extra = "" if number is None else f' data-group="{number + 1}"'
                tint = None if number is None else _tint(number, len(chart.groups))
                rects.append(_rect(i * wide + gap / 2, y, wide - gap, height, tag, title, tint, extra))
            at += count
    return "".join(rects)


def _tint(group: int, groups: int) -> float:
    """Opacity of what a group of cuts removed: the first is faintest."""
    return 0.25 + 0.6 * ((group + 1) / groups)


def _histogram(chart: Histogram) -> str:
    half = len(chart.kept) // 2
    known = [i for i in range(len(chart.kept)) if chart.kept[i] or chart.removed[i]]
    low, high = min(known[0], half - 4), max(known[-1] + 1, half + 4)
    wide, peak = _FULL / (high - low), max(a + b for a, b in zip(chart.kept, chart.removed, strict=True))
    cells = []
    for i in range(low, high):
        at = 0.0
        span = f"{2 ** ((i - half) / 4):.2g} to {2 ** ((i + 1 - half) / 4):.2g} of the line"
        for tag, count in (("gone", chart.removed[i]), ("kept", chart.kept[i])):
            height = _FULL * count / peak
            if count:
                cells.append(
                    _rect(
                        (i - low) * wide + wide * 0.06,
                        _FULL - at - height,
                        wide * 0.88,
                        height,
                        tag,
                        f"{count:,} {'removed' if tag == 'gone' else 'kept'}, {span}",
                    )
                )
            at += height
    line = (half - low) * wide
    cells.append(f'<path class="mark strong" d="M{line:.1f} 0V{_FULL:.0f}"/>')
    xs = [((i - low) / (high - low), f"{2.0 ** ((i - half) // 4):g}×") for i in range(low, high + 1) if (i - half) % 4 == 0]
    label = f"{chart.title}: {sum(chart.removed):,} below the cut line went, {sum(chart.kept):,} above it stay"
    return (
        f'<div class="plot short">{_labels("ys", "top", [(0.0, f"{peak:,}"), (1.0, "0")])}'
        f'<div class="canvas cells">{_svg(label, "".join(cells))}</div>{_labels("xs", "left", xs)}<p class="x">score / cut line</p></div>'
        '<p class="legend"><span><i class="key gone"></i>removed</span><span><i class="key kept"></i>kept</span></p>'
    )


def _scores(chart: Scores) -> str:
    """One row per task: the bar of the model before, above the bar of the model now."""
    rows = []
    for one in chart.scores:
        bars, said, values = [], [], []
        for number, (name, tag, figure) in enumerate(((chart.begun, "before", one.before), ("now", "kept", one.now))):
            values.append(score(*figure, share=True) if figure else "–")
            if figure:
                said.append(f"{one.task}, {name}: {values[-1]} %")
                bars.append(_rect(0, 100 + 420 * number, _FULL * figure[0], 380, tag, said[-1]))
        if one.chance is not None:
            bars.append(f'<path class="mark strong" d="M{_FULL * one.chance:.1f} 0V{_FULL:.0f}"/>')
        rows.append(
            f'<div class="task"><span class="name">{escaped(one.task)}</span><div class="canvas cells">{_svg("; ".join(said), "".join(bars))}</div>'
            f'<span class="values" aria-hidden="true">{"".join(f"<span>{value}</span>" for value in values)}</span></div>'
        )
    return (
        f'<div class="rows">{"".join(rows)}</div>'
        f'<p class="legend"><span><i class="key before"></i>{chart.begun}</span><span><i class="key kept"></i>now</span></p>'
    )


_DRAWERS: dict[type, Callable[..., str]] = {
    Lines: _lines,
    HeatMap: _heatmap,
    Anatomy: _anatomy,
    Histogram: _histogram,
    Scores: _scores,
}
