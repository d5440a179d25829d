"""The figures of a run that are worth showing, as plain data; every part may be missing."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

from adapt_pruner.core import events
from adapt_pruner.core.events import BILL, Evaluation, Event, Split, Start, Step, Tasks, Warned
from adapt_pruner.core.events.run import Answered, Chatted, MasksLearnt, Mixed, Resumed, Searched
from adapt_pruner.core.events.words import Form, measured_text, shots
from adapt_pruner.core.model.kinds import BLOCKS, USUAL, first_layers, kind_of, layer_of, tower_of
from adapt_pruner.core.system.strict_json import number_of
from adapt_pruner.report.record import Record

_MOST_STATES = 8  # iterations of one stage that are shown


@dataclass(frozen=True)
class Row:
    """A line of the headline: a measure of the model at the start and of the model now; None if not known.

    `begun` is the name for the model at the start (see `events.Start`); `after_cuts` is the measure before the last stage's
    training.
    """

    name: str
    before: float | None
    now: float | None
    form: Form
    note: str = ""
    begun: str = "dense"
    after_cuts: float | None = None

    @property
    def change(self) -> float | None:
        """The change as a share of the measure at the start."""
        return self.now / self.before - 1 if self.before and self.now else None

    @property
    def tone(self) -> str:
        """Whether the change is good or bad; nobody knows of a plain score whether more is better."""
        change = self.change or 0.0
        if self.form == "plain":
            return ""
        if change > 0 if self.form == "right" else change < 0:
            return "good"
        return "bad" if abs(change) > 0.0005 else ""


@dataclass(frozen=True)
class Cut:
    """An iteration of pruning: `tokens` trained, calibration `loss` and `layers` left (None for all), each before its cut.

    `used` has for each layer with experts the share of the tokens that went to each of them.
    """

    stage: int
    iteration: int
    params: int
    target: int
    tokens: int
    loss: float | None
    layers: list[int] | None
    distances: list[float | None] | None
    scores: dict[str, Split]
    used: dict[int, list[float]]


class Trained(NamedTuple):
    """A training step with a loss; `follows` says whether only training was done since the step before.

    `loss_is` is as in `core.events.Step`.
    """

    stage: int | None
    tokens: int
    loss: float
    lr: float | None = None
    peak_bytes: int | None = None
    time: float | None = None
    follows: bool = False
    loss_is: str | None = None


@dataclass(frozen=True)
class State:
    """The model after the cuts of a stage, or of some of its iterations: layer (numbered as at the start) -> kind -> units.

    Removed layers are not in `layers`; `wide` has the axes of the whole model.
    """

    label: str
    params: int
    layers: dict[int, dict[str, int]]
    wide: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """Everything that the page shows."""

    name: str
    model: str
    method: str
    status: str
    target: int | None
    begun: str
    rows: list[Row]
    began: State | None
    states: list[State]
    cuts: list[Cut]
    steps: list[Trained]
    evaluations: list[Evaluation]
    after_cuts: list[Evaluation]
    tasks: list[Tasks]
    answers: list[Answered]
    chats: list[Chatted]
    searched: list[Searched]
    masks_learnt: list[MasksLearnt]
    mixed: list[Mixed]
    seconds: dict[str, float]
    tokens: dict[str, int]
    wall: float | None
    peak_bytes: int | None
    asked: set[str]
    warnings: list[str]
    notes: list[str]

    @property
    def kinds(self) -> list[str]:
        """Kinds of axes inside layers, the most numerous first; without those not asked to shrink, except the usual two."""
        layers = self.began.layers.values() if self.began else ()
        most = {
            kind: max(sizes.get(kind, 0) for sizes in layers)
            for kind in dict.fromkeys(kind for sizes in layers for kind in sizes)
        }
        return sorted((kind for kind in most if kind in self.asked or kind in USUAL), key=lambda kind: -most[kind])


def figures_of(record: Record) -> Figures:
    """The figures of a run, as far as its folder holds them."""
    notes = list(record.trouble)
    cuts = _cuts(record)
    starts = record.of(Start)
    called = starts[0].begun if starts else "dense"
    began, states = _anatomy(record, notes, called)
    measured, tasks = record.of(Evaluation), _by_stage(record.of(Tasks))
    evaluations = _by_stage([event for event in measured if not event.after_cuts])
    after_cuts = _by_stage([event for event in measured if event.after_cuts])
    figures = record.figures
    target = figures.get("budget") or (starts[-1].target if starts else None)
    return Figures(
        name=record.path.resolve().name,
        model=str(record.recipe.get("model") or "the model"),
        method=str(record.recipe.get("method") or (starts[0].method if starts else "")),
        status=record.status,
        target=target,
        begun=called,
        rows=_headline(record, cuts, evaluations, after_cuts, tasks, called),
        began=began,
        states=states,
        cuts=cuts,
        steps=_steps(record.events),
        evaluations=evaluations,
        after_cuts=after_cuts,
        tasks=tasks,
        answers=_by_stage(record.of(Answered)),
        chats=_by_stage(record.of(Chatted)),
        searched=record.of(Searched),
        masks_learnt=record.of(MasksLearnt),
        mixed=record.of(Mixed),
        seconds=_seconds(record, notes),
        tokens=_tokens(record, [*evaluations, *after_cuts]),
        wall=_wall(record.events),
        peak_bytes=max(filter(None, [*(step.peak_bytes for step in record.of(Step)), figures.get("peak_bytes")]), default=None),
        asked={kind_of(name) for cut in record.of(events.Cut) for name in cut.sizes or ()},
        warnings=list(dict.fromkeys(event.message for event in record.of(Warned))),
        notes=notes,
    )


def sizes_of(
    sizes: Mapping[str, int] | None, left: Sequence[int] | None, first: Mapping[str, int]
) -> tuple[dict[int, dict[str, int]], dict[str, int]]:
    """An event's `sizes` by layer, numbered as in the model at the start, and the sizes of axes of the whole model.

    Args:
        sizes: axis name -> units; layers have the numbers of that time.
        left: the layers left at that time, by their numbers at the start; None for all.
        first: what `first_layers` gives of the model at the start.
    """
    layers: dict[int, dict[str, int]] = {}
    wide = {}
    ends = dict(zip(first, [*list(first.values())[1:], math.inf], strict=False))
    stayed = {tower: [number for number in left or () if begin <= number < ends[tower]] for tower, begin in first.items()}
    for name, size in (sizes or {}).items():
        layer, tower = layer_of(name), tower_of(name)
        if layer is None:
            wide[name] = size
        elif left is None:
            layers.setdefault(first.get(tower, 0) + layer, {})[kind_of(name)] = size
        elif layer < len(numbers := stayed.get(tower, left)):
            layers.setdefault(numbers[layer], {})[kind_of(name)] = size
    return layers, wide


def after(
    cut: events.Cut, layers: Mapping[int, Mapping[str, int]], left: Sequence[int] | None, first: Mapping[str, int]
) -> tuple[dict[int, dict[str, int]], Sequence[int] | None]:
    """The sizes by layer, and the layers left, after a cut.

    Args:
        cut: its sizes name layers as before the cut.
        layers: the sizes before, by the layers' numbers at the start.
        left: the layers left before, by their numbers at the start; None for all.
        first: as for `sizes_of`.
    """
    changed = sizes_of(cut.sizes, left, first)[0]
    left = cut.layers_left if cut.layers_left is not None else left
    now = {layer: {**sizes, **changed.get(layer, {})} for layer, sizes in layers.items() if left is None or layer in left}
    for sizes in now.values():
        gone = [kind for block, kinds in BLOCKS.items() if sizes.get(block) == 0 for kind in kinds]  # removed with a whole block
        sizes.update({kind: 0 for kind in gone if kind in sizes})
    return now, left


def fit_slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of the least-squares line through points (x, y), and its standard error; (0, inf) below 3 points or for equal x."""
    if len(points) < 3:
        return 0.0, math.inf
    xs, ys = zip(*points, strict=True)
    middle = statistics.fmean(xs)
    spread = sum((x - middle) ** 2 for x in xs)
    if min(xs) == max(xs) or not spread:
        return 0.0, math.inf
    slope, base = statistics.linear_regression(xs, ys)
    rest = sum((y - base - slope * x) ** 2 for x, y in points)
    return slope, math.sqrt(rest / (len(points) - 2) / spread)


def _steps(events_in_order: Sequence[Event]) -> list[Trained]:
    """The steps with a loss."""
    return [
        Trained(step.stage, step.tokens, step.loss, step.lr, step.peak_bytes, step.time, isinstance(before, Step), step.loss_is)
        for before, step in zip([None, *events_in_order], events_in_order, strict=False)
        if isinstance(step, Step) and step.loss is not None and step.tokens
    ]


_Staged = TypeVar("_Staged", Evaluation, Tasks, Answered, Chatted)


def _by_stage(staged: Sequence[_Staged]) -> list[_Staged]:
    """The last event of each stage, in their order."""
    last = {event.stage: event for event in staged}
    return [last[stage] for stage in sorted(last)]


def _cuts(record: Record) -> list[Cut]:
    cuts: list[Cut] = []
    tokens = 0
    left: list[int] | None = None
    for event in record.events:
        if isinstance(event, Step):
            tokens = event.tokens or tokens
        elif isinstance(event, Start):
            left = event.layers_left
        elif isinstance(event, events.Cut) and event.params:
            cuts.append(
                Cut(
                    stage=event.stage or 1, iteration=event.iteration or len(cuts) + 1, params=event.params,
                    target=event.target or event.params, tokens=tokens, loss=event.loss,
                    layers=left, distances=event.distances, scores=event.scores or {},
                    used={int(name.split(".")[1]): shares for name, shares in (event.used or {}).items()},
                )
            )  # fmt: skip
            left = event.layers_left if event.layers_left is not None else left
    return cuts


def _anatomy(record: Record, notes: list[str], called: str) -> tuple[State | None, list[State]]:
    """The model at the start, and after each stage; for a single stage, after each of up to eight groups of its iterations."""
    starts, cuts = record.of(Start), [cut for cut in record.of(events.Cut) if cut.sizes]
    params = starts[0].now or starts[0].params or 0 if starts else 0
    names = (starts[0].began if starts else None) or {name: size for name, (size, _) in (record.mask or {}).items()}
    first = first_layers(names)
    began = State(called, params, *sizes_of(names, None, first)) if names else None
    if (began is None or not began.layers) and cuts:
        first = first_layers(cuts[0].sizes or {})
        sizes, wide = sizes_of(cuts[0].sizes, None, first)
        kinds = {kind for layer in sizes.values() for kind in layer}
        most = {kind: max(layer.get(kind, 0) for layer in sizes.values()) for kind in kinds}
        began = State(called, params, {layer: dict(most) for layer in sizes}, wide)
        if sizes:
            notes.append(
                "the sizes of the dense model are not in the log; shown in their place are the largest after the first cut"
            )
    states: list[State] = []
    left: Sequence[int] | None = starts[0].layers_left if starts else None
    whole = dict(began.layers) if began else {}
    for cut in cuts:
        wide = sizes_of(cut.sizes, left, first)[1]
        whole, left = after(cut, whole, left, first)
        label = f"stage {cut.stage or 1}, iteration {cut.iteration or len(states) + 1}"
        states.append(State(label, cut.params, whole, wide))
    return began, _grouped(cuts, states)


def _grouped(cuts: Sequence[events.Cut], states: Sequence[State]) -> list[State]:
    stages = [cut.stage or 1 for cut, _ in zip(cuts, states, strict=False)]
    if len(set(stages)) > 1:
        last = dict(zip(stages, states, strict=True))
        return [State(f"stage {stage}", state.params, state.layers, state.wide) for stage, state in last.items()]
    ends = sorted({round((number + 1) * len(states) / _MOST_STATES) - 1 for number in range(_MOST_STATES)} - {-1})
    return [State(f"iteration {end + 1}", states[end].params, states[end].layers, states[end].wide) for end in ends]


def _headline(
    record: Record,
    cuts: Sequence[Cut],
    evaluations: Sequence[Evaluation],
    after_cuts: Sequence[Evaluation],
    tasks: Sequence[Tasks],
    called: str,
) -> list[Row]:
    """Counts of the model given to the run, and measures of it after the removal of tokens."""
    starts = record.of(Start)
    called_first = starts[0].given if starts else "dense"
    measures = [*_measures(record, cuts, evaluations, after_cuts), *_task_rows(tasks)]
    rows = [
        *(replace(row, begun=called_first) for row in _counts(record, cuts, starts)),
        *(replace(row, begun=called) for row in measures),
    ]
    return [row for row in rows if row.before is not None or row.now is not None]


def _counts(record: Record, cuts: Sequence[Cut], starts: Sequence[Start]) -> Iterator[Row]:
    figures = record.figures
    before = number_of(figures.get("params_before")) or (number_of(starts[0].params) if starts else None)
    now = number_of(figures.get("params_after")) or (float(cuts[-1].params) if cuts else None)
    yield Row("parameters", before, now, "params")
    if figures.get("decoder_params_before"):
        decoder, left = float(figures["decoder_params_before"]), figures.get("decoder_params_after")
        narrows = "residual" in record.recipe.get("axes", ()) or str(record.recipe.get("reduce")).startswith("slice")
        whole = figures.get("params_after_vocabulary", before)  # tokens lie outside the layers
        if left is None and whole and now and not narrows:
            left = decoder - (whole - now)
        yield Row("in decoder layers", decoder, left, "params")
    if figures.get("active_params_before"):
        yield Row(
            "active in a token",
            number_of(figures["active_params_before"]),
            number_of(figures.get("active_params_after")),
            "params",
        )
    if figures.get("nonzero_before"):
        yield Row("not zero", number_of(figures["nonzero_before"]), number_of(figures.get("nonzero_after")), "params")
    begun = number_of((record.state.get("start") or {}).get("weight_bytes"))
    if record.weight_bytes and now and before:
        size = record.weight_bytes
        yield Row("weights on disk", size * before / now, size, "bytes", "before: at the same precision")
    elif begun and before and now:
        yield Row("weights on disk", begun, begun * now / before, "bytes", "at the same precision")


def _measures(
    record: Record, cuts: Sequence[Cut], evaluations: Sequence[Evaluation], after_cuts: Sequence[Evaluation]
) -> Iterator[Row]:
    if not evaluations:
        return
    first = evaluations[0] if evaluations[0].stage == 0 else None
    last = evaluations[-1] if evaluations[-1].stage else None
    when = f" (after stage {last.stage})" if last and cuts and last.stage < cuts[-1].stage else ""
    cut = next((measured for measured in after_cuts if last and measured.stage == last.stage), None)
    shown: tuple[tuple[str, str, Form, str], ...] = (
        ("perplexity", "perplexity", "perplexity", f"on {measured_text(record.figures)}{when}"),
        ("bits per byte", "bits_per_byte", "bits", ""),
    )
    for name, key, form, note in shown:
        before, now, between = (getattr(measured, key, None) for measured in (first, last, cut))
        yield Row(name, before, now, form, note, after_cuts=between)
    for name in (last or evaluations[0]).judged:
        before, now, between = (None if measured is None else measured.judged.get(name) for measured in (first, last, cut))
        yield Row(name, before, now, "right", after_cuts=between)


def _task_rows(tasks: Sequence[Tasks]) -> Iterator[Row]:
    """The average over the tasks, or a single task's own figure, at the start and at the end."""
    if not tasks:
        return
    first = tasks[0] if tasks[0].stage == 0 else None
    last = tasks[-1] if tasks[-1].stage else None
    scores = tasks[-1].scores
    if first is not None and [score["task"] for score in first.scores] != [score["task"] for score in scores]:
        first = None  # the recipe has changed since
    examples = shots(score["shots"] for score in scores)
    if len(scores) == 1:
        score = scores[0]
        form: Form = "right" if score["accuracy"] else "plain"
        before, now = (scored.scores[0]["value"] if scored else None for scored in (first, last))
        yield Row(score["task"], before, now, form, f"{score['metric']}, {examples}")
    else:
        counted = sum(bool(score["accuracy"]) for score in scores)
        before, now = (scored.average if scored else None for scored in (first, last))
        yield Row(f"average of {counted} tasks", before, now, "right", f"accuracy, {examples}")


def _seconds(record: Record, notes: list[str]) -> dict[str, float]:
    """The seconds of each phase that took any."""
    figures, spent = record.figures, record.state.get("spent")
    by_phase = {phase: number_of(figures.get(f"seconds_{phase}")) for phase in BILL}
    if not any(by_phase.values()) and record.checkpoint is not None and isinstance(spent, dict) and BILL.keys() & spent.keys():
        by_phase = {phase: number_of(spent.get(phase)) for phase in BILL}
        notes.append(f"the bill has the seconds of {record.checkpoint.name}, the newest checkpoint, and the tokens of the log")
    return {phase: seconds for phase, seconds in by_phase.items() if seconds is not None and seconds > 0}


def _tokens(record: Record, evaluations: Sequence[Evaluation]) -> dict[str, int]:
    read = max((cut.read for cut in record.of(events.Cut) if cut.read is not None), default=0)
    trained = max((step.tokens for step in record.of(Step)), default=0)
    measured = sum(evaluation.tokens or 0 for evaluation in evaluations)
    return {name: count for name, count in (("score", read), ("train", trained), ("evaluate", measured)) if count}


def _wall(events_in_order: Sequence[Event]) -> float | None:
    """Seconds from the first event to the last, without pauses of more than ten minutes before a stopped run continued."""
    timed = [event for event in events_in_order if event.time]
    times = [event.time or 0.0 for event in timed]
    pauses = sum(
        later - earlier
        for (earlier, later), event in zip(pairwise(times), timed[1:], strict=True)
        if later - earlier > 600 and isinstance(event, Start | Resumed | Warned)
    )
    return times[-1] - times[0] - pauses if len(times) > 1 else None
