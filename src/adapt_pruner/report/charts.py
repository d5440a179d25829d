"""The pictures of a run or a comparison as data; `svg` draws them for the page and `paper` for papers."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise

from adapt_pruner.core.events.run import MasksLearnt, Searched
from adapt_pruner.core.events.words import Form, counted, score, shots, shown, tick, ticks
from adapt_pruner.core.model.kinds import LABELS
from adapt_pruner.report.figures import Cut, Figures, State, Trained

TONES = 6
"""Number of colours of lines; more lines use them again."""

_MOST_POINTS = 400  # of a line; if there are more, they are averaged
_MOST_ROWS = 48  # of a heat map


@dataclass(frozen=True)
class Chart:
    """A picture: its key, title and what it is about; `note` goes wherever it goes."""

    key: str
    title: str
    about: str
    note: str = field(default="", kw_only=True)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Its figures as header and rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class Series:
    """A line: its name and points (x, y), with x ascending.

    If y is one of several values, `low` and `high` give a band, or bars at `dots`. From a `star`, a thin line leads to every
    other line.
    """

    name: str
    points: list[tuple[float, float]]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    dots: bool = False
    faint: bool = False
    star: bool = False
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Lines(Chart):
    """Lines over one axis; forms as in `words.shown`; `marks` are vertical lines (x, name); with `falls`, x runs downwards.

    If a few points of faint lines lie far out, they are cut off, so that the rest can be seen. Labels
    stand above their points or, with `below`, under them. `x_ticks` replace the round numbers below the axis.
    """

    series: list[Series]
    x_label: str
    y_label: str
    x_form: Form = "plain"
    y_form: Form = "plain"
    log: bool = False
    marks: list[tuple[float, str]] = field(default_factory=list)
    short: bool = False
    falls: bool = False
    below: bool = False
    x_ticks: list[float] = field(default_factory=list)

    def x_names(self, left: float, right: float, *, most: int) -> list[tuple[float, str]]:
        """The numbers below the axis, and where they stand."""
        every = [(x, shown(x, self.x_form)) for x in self.x_ticks]
        return every or [(x, tick(x, self.x_form)) for x in ticks(left, right, most=most)]

    def looks(self) -> list[tuple[int, int]]:
        """For each line, how often all colours were used before it, and its colour; a faint line has its line's colour."""
        single = any(series.faint for series in self.series)
        numbers = count()
        return [(0, 0) if single or series.star else divmod(next(numbers), TONES) for series in self.series]

    def leads(self) -> list[list[tuple[float, float]]]:
        """For each line, the thin line from the star to its nearest point; empty for the star, and if there is no star."""
        star = next((series.points[0] for series in self.series if series.star), None)
        return [
            [] if star is None or series.star else [star, min(series.points, key=lambda point: abs(point[0] - star[0]))]
            for series in self.series
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows; of long lines only every n-th point."""
        rows = []
        for series in self.series:
            for point in series.points[:: -(-len(series.points) // 40)]:
                rows.append([series.name, shown(point[0], self.x_form), shown(point[1], self.y_form)])
        several = len(self.series) > 1
        return (["line"] if several else []) + [self.x_label, self.y_label], rows if several else [row[1:] for row in rows]

    def named(self) -> list[tuple[float, float, str]]:
        """Points and their labels, the lowest first. A label is left out near a lower one: within a tenth of both sides."""
        xs, ys = zip(*(point for series in self.series for point in series.points), strict=True)
        turn = math.log if self.log and min(ys) > 0 else float
        wide, high = max(xs) - min(xs) or 1.0, turn(max(ys)) - turn(min(ys)) or 1.0
        labelled: list[tuple[float, float, str]] = []
        for x, y, text in sorted(
            ((*point, text) for series in self.series for point, text in zip(series.points, series.labels, strict=False) if text),
            key=lambda labelled_point: labelled_point[1],
        ):
            if not any(abs(x - a) < 0.1 * wide and abs(turn(y) - turn(b)) < 0.1 * high for a, b, _ in labelled):
                labelled.append((x, y, text))
        return labelled


@dataclass(frozen=True)
class HeatMap(Chart):
    """Values by row and column, None for missing ones; the higher, or with `by_rank` the higher in rank, the darker."""

    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    form: Form
    low: str
    high: str
    by_rank: bool = False
    row_is: str = "cut"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, with one column per layer."""
        rows = [[name, *(shown(value, self.form) for value in line)] for name, line in zip(self.rows, self.values, strict=True)]
        return [self.row_is, *self.columns], rows

    def shades(self) -> list[list[float | None]]:
        """The values as shades from 0 to 1: as shares of the highest value or, with `by_rank`, as the share of lower values."""
        values = sorted(value for line in self.values for value in line if value is not None)

        def shade(value: float | None) -> float | None:
            if value is None:
                return None
            return (
                bisect_left(values, value) / max(1, len(values) - 1) if self.by_rank else max(0.0, value) / max(values[-1], 1e-9)
            )

        return [[shade(value) for value in line] for line in self.values]


@dataclass(frozen=True)
class Panel:
    """One kind of unit: for each layer how many it had, how many are left, and how many each group of cuts removed."""

    name: str
    total: list[int]
    left: list[int]
    gone: list[list[int]]


@dataclass(frozen=True)
class Anatomy(Chart):
    """A column per layer, a panel per kind of unit; `groups` name stages with parameters after each, `began` the first model."""

    layers: list[int]
    panels: list[Panel]
    groups: list[tuple[str, int]]
    began: tuple[str, int]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, with one row per layer."""
        header = ["layer", *(f"{panel.name} {word}" for panel in self.panels for word in ("before", "left"))]
        rows = [
            [str(layer), *(f"{count:,}" for panel in self.panels for count in (panel.total[i], panel.left[i]))]
            for i, layer in enumerate(self.layers)
        ]
        return header, rows


@dataclass(frozen=True)
class Histogram(Chart):
    """Counts of units by their score relative to the cut line, in quarter octaves; the middle bin begins at the line."""

    kept: list[int]
    removed: list[int]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, with one row per bin that is not empty."""
        half = len(self.kept) // 2
        rows = [
            [f"{2 ** ((i - half) / 4):.3g}–{2 ** ((i + 1 - half) / 4):.3g}", f"{self.removed[i]:,}", f"{self.kept[i]:,}"]
            for i in range(len(self.kept))
            if self.kept[i] or self.removed[i]
        ]
        return ["score / cut line", "removed", "kept"], rows


@dataclass(frozen=True)
class Score:
    """A task's accuracy with its standard error, before and now, None if not known; `chance` is the accuracy of guessing."""

    task: str
    metric: str
    items: int
    before: tuple[float, float | None] | None
    now: tuple[float, float | None] | None
    chance: float | None


@dataclass(frozen=True)
class Scores(Chart):
    """Accuracies by task; `begun` is the name for the model before."""

    scores: list[Score]
    begun: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, with one row per task."""
        rows = []
        for row in self.scores:
            both = [score(*figure, share=True) if figure else "–" for figure in (row.before, row.now)]
            kept = shown(row.now[0] / row.before[0], "share") if row.before and row.now and row.before[0] else "–"
            rows.append(
                [row.task, row.metric, f"{row.items:,}", *both, kept, "–" if row.chance is None else f"{100 * row.chance:.1f}"]
            )
        return ["task", "metric", "items", f"{self.begun}, %", "now, %", "kept", "guessing, %"], rows


@dataclass(frozen=True)
class Beside:
    """Pictures of lines side by side, under one title."""

    key: str
    title: str
    panels: list[Lines]
    note: str


def anatomy(figures: Figures) -> Anatomy | None:
    """What was removed, where and when; None if the log has no sizes of layers."""
    began, states = figures.began, figures.states
    if began is None or not began.layers or not states:
        return None
    layers = sorted(began.layers)
    panels = []
    for kind in figures.kinds:
        total = [began.layers[layer].get(kind, 0) for layer in layers]
        course = [
            total,
            *(
                [min(most, state.layers.get(layer, {}).get(kind, 0)) for layer, most in zip(layers, total, strict=True)]
                for state in states
            ),
        ]
        gone = [[max(0, a - b) for a, b in zip(before, later, strict=True)] for before, later in pairwise(course)]
        if any(total):
            panels.append(Panel(LABELS.get(kind, kind), total, course[-1], gone))
    sentences = []
    for panel in panels:
        share = 1 - sum(panel.left) / sum(panel.total)
        sentences.append(f"{share:.0%} of the {panel.name} went" if share else f"no {panel.name} went")
    missing = [layer for layer in layers if layer not in states[-1].layers]
    if missing:
        sentences.append(f"{counted(len(missing), 'whole layer')} went ({', '.join(map(str, missing))})")
    depths = {name.removesuffix(".layers"): size for name, size in sorted(began.wide.items()) if name.endswith(".layers")}
    ends = accumulate(depths.values())
    if depths:
        towers = (
            f"{end - size} to {end - 1} are the {name} tower" for (name, size), end in zip(depths.items(), ends, strict=True)
        )
        sentences.append(f"layers {', '.join(towers)}")
    sentences += [
        f"the stream is {size:,} channels wide" for kind, size in states[-1].wide.items() if kind in ("residual", "width")
    ]
    return Anatomy(
        "anatomy", "What was taken out, layer by layer", "; ".join(sentences)[:1].upper() + "; ".join(sentences)[1:] + ".", layers, panels,
        [(state.label, state.params) for state in states], (began.label, began.params),
    )  # fmt: skip


def importance(figures: Figures) -> HeatMap | None:
    """How much each layer changes its input, cut by cut; None if the method does not measure it."""
    cuts = _thinned([cut for cut in figures.cuts if cut.distances])
    if not cuts:
        return None
    left = _layers_at(figures, cuts)
    columns = sorted({layer for layers in left for layer in layers})
    values: list[list[float | None]] = []
    for cut, layers in zip(cuts, left, strict=True):
        distances = dict(zip(layers, cut.distances or [], strict=False))
        values.append([distances.get(layer) for layer in columns])
    return HeatMap(
        "importance", "How much each layer matters",
        "How far a layer moves its input, measured before each cut. Layers that move it less give up more.",
        list(map(str, columns)), [_name(cut) for cut in cuts], values, "plain", "least", "most", by_rank=True,
    )  # fmt: skip


def sparsity(figures: Figures) -> HeatMap | None:
    """The share of each layer's units gone after each stage, for the kind that lost most; None without sizes."""
    picture = anatomy(figures)
    if picture is None or not picture.panels:
        return None
    panel = max(picture.panels, key=lambda panel: 1 - sum(panel.left) / sum(panel.total))
    so_far = accumulate(panel.gone, lambda before, gone: [a + b for a, b in zip(before, gone, strict=True)])
    values = [[a / b if b else None for a, b in zip(gone, panel.total, strict=True)] for gone in so_far]
    last = [value for value in values[-1] if value is not None]
    return HeatMap(
        "sparsity", "What that led to", f"Share of a layer’s {panel.name} gone so far: at the end from {min(last):.0%} to {max(last):.0%}.",
        list(map(str, picture.layers)), [name.replace("iteration ", "1.") for name, _ in picture.groups], values, "share", "none gone", f"{max(last):.0%} gone",
    )  # fmt: skip


def cut_lines(figures: Figures) -> list[Histogram]:
    """Scores around the cut line, at the first cut and the last, for every kind that lost more than a few."""
    histograms = []
    with_scores = [cut for cut in figures.cuts if cut.scores]
    for cut in with_scores[:1] + with_scores[1:][-1:]:
        for kind, counts in cut.scores.items():
            kept, removed = counts.get("kept") or [], counts.get("removed") or []
            if sum(removed) >= 8 and len(kept) == len(removed):
                half = len(kept) // 2
                near = sum(kept[half : half + 4]) / max(1, sum(kept))
                histograms.append(
                    Histogram(
                        f"line-{cut.iteration}-{kind}", f"Scores of {LABELS.get(kind, kind)} at cut {_name(cut)}",
                        f"{sum(removed):,} of {sum(removed) + sum(kept):,} went: in each layer those that score below its cut line. {near:.0%} of those that stay score less than twice the line.",
                        kept, removed,
                    )
                )  # fmt: skip
    return histograms


def usage(figures: Figures) -> HeatMap | None:
    """How often each expert of each layer was used, the busiest first, before the first cut or else at the end; None without experts."""
    used = next((cut.used for cut in figures.cuts if cut.used), None)
    text, when = "calibration", "before the first cut"
    if used is None:
        measured = next((event.used for event in reversed(figures.evaluations) if event.used), {})
        used = {int(layer): shares for layer, shares in measured.items()}
        text, when = "held-out", "at the end"
    if not used:
        return None
    ordered = {layer: sorted(shares, reverse=True) for layer, shares in sorted(used.items())}
    number = max(map(len, ordered.values()))
    ranks = (
        list(range(number)) if number <= _MOST_ROWS else [round(i * (number - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)]
    )
    values = [[shares[rank] if rank < len(shares) else None for shares in ordered.values()] for rank in ranks]
    most, least = max(shares[0] for shares in ordered.values()), min(shares[-1] for shares in ordered.values())
    return HeatMap(
        "usage", "How often each expert was used",
        f"Share of the {text} tokens that the router of a layer sent to an expert, busiest first, {when}: from {least:.1%} to {most:.1%}.",
        list(map(str, ordered)), [f"expert {rank + 1} by use" for rank in ranks], values, "share", "never", f"{most:.0%} of tokens", row_is="expert",
    )  # fmt: skip


def costs(figures: Figures) -> Lines | None:
    """The calibration loss before each cut, over the parameters at that time; None below three cuts."""
    before = [figures.began.params if figures.began else 0, *(cut.params for cut in figures.cuts)]
    points = [
        (float(params), cut.loss) for params, cut in zip(before, figures.cuts, strict=False) if params and cut.loss is not None
    ]
    if len(points) < 3:
        return None
    return Lines(
        "costs", "What the cuts cost", "Loss on the calibration text, drawn anew, before each cut; later stages start from a trained model.",
        [Series("loss", points[::-1], dots=True)], "parameters", "loss (nats)", "params", "loss", falls=True,
    )  # fmt: skip


def search(figures: Figures) -> Lines | None:
    """The losses of the candidates of each round, over the number of measured losses; None below two rounds."""
    stages = sorted({tried.stage or 1 for tried in figures.searched})
    lines = []
    for stage in stages:
        rounds = [tried for tried in figures.searched if (tried.stage or 1) == stage]
        name = f", stage {stage}" if len(stages) > 1 else ""
        best = [(float(tried.evaluations), tried.best) for tried in rounds if tried.best is not None]
        mean = [(float(tried.evaluations), tried.mean) for tried in rounds if tried.mean is not None]
        if len(best) > 1:
            lines += [Series(f"best{name}", best), Series(f"mean{name}", mean)]
    if not lines:
        return None
    return Lines(
        "search", "The search", "With units shut and nothing cut: the loss of the best candidate, and the mean of a round.",
        lines, "losses measured", "loss (nats)", "count", "loss",
    )  # fmt: skip


def widths(figures: Figures) -> HeatMap | None:
    """The neurons that a search or learnt masks would keep in each layer, over time; with several stages, those of the last."""
    reports: list[Searched] | list[MasksLearnt] = figures.searched or figures.masks_learnt
    last = max((report.stage or 1 for report in reports), default=1)
    rounds = [report for report in reports if (report.stage or 1) == last and report.sizes]
    rounds = rounds[:: max(1, -(-len(rounds) // _MOST_ROWS))]
    names = [name for name in (rounds[0].sizes or {}) if name.endswith(".neurons")] if rounds else []
    if len(rounds) < 2 or not names:
        return None
    values: list[list[float | None]] = [[(report.sizes or {}).get(name) for name in names] for report in rounds]
    widths_left = [value for line in values for value in line if value is not None]
    by, unit = ("search", "round") if figures.searched else ("masks", "step")
    return HeatMap(
        "widths", "What it settled on", f"MLP neurons that the {by} would keep in each layer, {unit} by {unit}: from {min(widths_left):,.0f} to {max(widths_left):,.0f}.",
        [name.split(".")[1] for name in names], [f"{unit} {report.done}" for report in rounds], values, "count", "fewest", "most", by_rank=True,
    )  # fmt: skip


def mixing(figures: Figures) -> Lines | None:
    """The share of each text in the rows to come, over the tokens read; None unless a feed changed the shares twice."""
    if len(figures.mixed) < 2:
        return None
    lines = [
        Series(called, [(float(change.tokens), change.shares[name]) for change in figures.mixed if name in change.shares])
        for name, called in _texts(name for change in figures.mixed for name in change.shares).items()
    ]
    return Lines(
        "mixing", "What was read", "Share of each text in the rows that come next: texts far above their reference loss gain.",
        lines, "training tokens", "share", "count", "share", short=True,
    )  # fmt: skip


def by_text(figures: Figures) -> Lines | None:
    """The loss on each of several held-out texts, over the stages; None if it was measured fewer than twice."""
    measured = [evaluation for evaluation in figures.evaluations if evaluation.by_text]
    if len(measured) < 2:
        return None
    lines = [
        Series(
            called,
            [(float(evaluation.stage), evaluation.by_text[name]) for evaluation in measured if name in evaluation.by_text],
            dots=True,
        )
        for name, called in _texts(name for evaluation in measured for name in evaluation.by_text).items()
    ]
    return Lines(
        "by-text", "Loss on each held-out text", "After each stage; stage 0 is the model at the start. Lower is better.",
        lines, "stage", "loss (nats)", "count", "loss", short=True,
    )  # fmt: skip


def _texts(specs: Iterable[str]) -> dict[str, str]:
    """SPEC -> the shortest part that tells it from the others: the end where they differ, or the whole."""
    names = sorted(set(specs))
    parts = {name: name.rstrip("/").split("/") for name in names}
    for place in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {name: words[-place] if place <= len(words) else name for name, words in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return dict(zip(names, names, strict=True))


def training(figures: Figures) -> list[Lines]:
    """Loss, learning rate, speed and memory over the tokens of all stages, each with marks at the cuts."""
    steps = figures.steps
    if len(steps) < 2:
        return []
    marks: dict[int, str] = {}
    for cut in figures.cuts:
        marks.setdefault(cut.tokens, f"{cut.stage}")
    places = [(float(tokens), stage) for tokens, stage in marks.items()]
    about = "Each vertical line is where a stage’s cuts were made, with the stage’s number."
    loss = [(float(step.tokens), step.loss) for step in steps]
    lines = [_averaged("each step", loss)]
    if not lines[0].low:
        lines = [
            replace(lines[0], faint=True),
            Series("mean of a stage’s last steps", _running_mean(steps, window=max(5, len(steps) // 25))),
        ]
    loss_is = f"It is {steps[-1].loss_is}. " if steps[-1].loss_is else ""
    charts = [
        Lines("loss", "Training loss", loss_is + about, lines, "training tokens", "loss (nats)", "count", "loss", marks=places)
    ]
    further: tuple[tuple[str, str, str, Form, list[tuple[float, float]]], ...] = (
        ("lr", "Learning rate", "learning rate", "lr", [(float(step.tokens), step.lr) for step in steps if step.lr is not None]),
        ("speed", "Training speed", "tokens/s", "count", _speeds(figures)),
        (
            "memory",
            "Peak memory",
            "GiB",
            "GiB",
            [(float(step.tokens), step.peak_bytes / 2**30) for step in steps if step.peak_bytes is not None],
        ),
    )
    for key, title, y_label, form, points in further:
        if len(points) > 1:
            line = [_averaged(title, points)]
            charts.append(Lines(key, title, "", line, "training tokens", y_label, "count", form, marks=places, short=True))
    return charts


def perplexities(figures: Figures) -> Lines | None:
    """Perplexity on held-out text after each stage, over the parameters, with the model at the start first; None below two.

    If stages train, a second line shows the perplexity right after the cuts.
    """
    lines: list[Series] = []
    for called, measured in (
        ("after training" if figures.steps else "perplexity", figures.evaluations),
        ("after the cuts", figures.after_cuts),
    ):
        points = sorted(
            (float(evaluation.params), evaluation.perplexity, f"stage {evaluation.stage}" if evaluation.stage else figures.begun)
            for evaluation in measured
            if evaluation.perplexity is not None and evaluation.params
        )
        if points:
            labels = [name for *_, name in points] if not lines else []
            lines.append(Series(called, [(x, y) for x, y, _ in points], dots=True, labels=labels))
    if not lines or len(lines[0].points) < 2:
        return None
    after = f"after the stage’s {'training' if figures.steps else 'cuts'}"
    if figures.after_cuts:
        after = "after the stage’s cuts and after its training"
    return Lines(
        "perplexity", "Perplexity after each stage", f"On held-out text, {after}; lower is better.", lines,
        "parameters", "perplexity", "params", "perplexity", falls=True, log=bool(figures.after_cuts),
    )  # fmt: skip


def tasks(figures: Figures) -> Scores | None:
    """Accuracies at the start and at the end; None if no task with an accuracy was scored."""
    before, now = (
        {row["task"]: row for event in figures.tasks if bool(event.stage) is later for row in event.scores if row["accuracy"]}
        for later in (False, True)
    )
    scores = []
    for name, row in (before | now).items():
        both = [(of[name]["value"], of[name].get("stderr")) if name in of else None for of in (before, now)]
        scores.append(Score(name, row["metric"], row["items"], both[0], both[1], row.get("chance")))
    if not scores:
        return None
    examples = shots(row["shots"] for row in (before | now).values())
    return Scores(
        "tasks", "Tasks", f"Share of right answers, {examples}; a mark shows what guessing gives.", scores, figures.begun
    )


def _running_mean(steps: Sequence[Trained], *, window: int) -> list[tuple[float, float]]:
    """(tokens, mean loss of the last `window` steps of the same stage)."""
    points: list[tuple[float, float]] = []
    recent: list[float] = []
    for before, step in zip([None, *steps], steps, strict=False):
        if before is not None and before.stage != step.stage:
            recent = []
        recent = [*recent, step.loss][-window:]
        points.append((float(step.tokens), sum(recent) / len(recent)))
    return points


def _speeds(figures: Figures) -> list[tuple[float, float]]:
    """(tokens, tokens/s since the step before), by the log's clock; pauses between stages and for checkpoints are left out."""
    points = []
    for before, step in pairwise(figures.steps):
        seconds = (step.time or 0) - (before.time or 0)
        if step.follows and seconds > 0:
            points.append((float(step.tokens), (step.tokens - before.tokens) / seconds))
    return points


def _averaged(name: str, points: Sequence[tuple[float, float]]) -> Series:
    width = -(-len(points) // _MOST_POINTS)
    if width == 1:
        return Series(name, list(points))
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    ys = [[y for _, y in chunk] for chunk in chunks]
    middle = [(sum(x for x, _ in chunk) / len(chunk), sum(y) / len(y)) for chunk, y in zip(chunks, ys, strict=True)]
    return Series(name, middle, [min(y) for y in ys], [max(y) for y in ys])


def _thinned(cuts: Sequence[Cut]) -> list[Cut]:
    """A limited number of the cuts, evenly spread, including the first and the last."""
    if len(cuts) <= _MOST_ROWS:
        return list(cuts)
    return [cuts[round(i * (len(cuts) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]


def _name(cut: Cut) -> str:
    return f"{cut.stage}.{cut.iteration}"


def _layers_at(figures: Figures, cuts: Sequence[Cut]) -> list[list[int]]:
    """The layers before each cut, by their numbers at the start; if the log lacks them, as many as it has distances for."""
    every: list[State] = [*([figures.began] if figures.began else []), *figures.states]
    by_count = {len(state.layers): sorted(state.layers) for state in every}
    counts = [len(cut.distances or ()) for cut in cuts]
    return [
        cut.layers if cut.layers is not None and len(cut.layers) == count else by_count.get(count, list(range(count)))
        for cut, count in zip(cuts, counts, strict=True)
    ]
