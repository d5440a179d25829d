"""Where a run stands, judged by its events alone: its phase, how much of it is done, seconds so far and seconds left.

Everything that shows a run (the bar, plain lines, `watch`) or records its progress (`progress.json`) asks a `ProgressTracker`, which
follows it.

The estimate counts the seconds until the result is written, with its card and page. It adds up what the plan still has:

    left = Σ over the planned phases of  operations still to do · seconds per operation
    times of an iteration's phases = parameters still to go / parameters that an iteration of this run removes

The plan says the operations of one time of each phase (`core.events.run.Item`). Seconds per operation are those that this phase
took in this run. A phase that has not run yet is guessed from the others, by their relative speed on a CPU (`Phase.ease`). Until a
phase is measured, there is no estimate. While most of an estimate is a guess, it is a range, from half to twice the guessed part.
Of a phase whose operations nobody knows, the times are counted. A phase that the last iteration left out is not expected in the
next.

The promise: on a machine whose speed stays the same, the total time (seconds so far and left) is within 30 % of the truth after a
tenth of a run, and within 15 % after a third. `tests/test_progress.py` checks this on recorded runs. The promise does not hold if
the work depends on what is found on the way: a search without a fixed end, tasks that have not been scored yet (there is no
estimate until then), or a user's own metric.
"""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pydantic.dataclasses

from adapt_pruner.core.events import Cut, Evaluation, Event, Find, Load, Progress, Saved, Start, Step, Tasks, phase_of
from adapt_pruner.core.events.comparison import CellBegun, CellDone, InCell
from adapt_pruner.core.events.run import Masked, MasksLearnt, Planned, Probe, Within
from adapt_pruner.core.events.words import span

_DOUBT = 0.1  # weight of the first guess for a phase, as a share of the phase, beside what is measured of it
_GUESSED = 0.5  # share of guesses in an estimate above which it is a range


@pydantic.dataclasses.dataclass(frozen=True)
class RunProgress:
    """Where a run stands at one moment; `progress.json` has these fields.

    Attributes:
        doing: the phase and its progress: repairing 12/60; empty before the first phase.
        where: stage and iteration; empty if the work has neither.
        seconds: since the first event.
        left: seconds until the end; None if unknown.
        low: the least of these seconds.
        high: the most of these seconds; differs from `low` if most of the estimate is a guess.
        ends: whether the end can be estimated at all, because the work has a plan.
        share: share of the time that is over, or, without a plan, of the phase; None if unknown.
    """

    doing: str
    where: str
    seconds: float
    left: float | None = None
    low: float = 0.0
    high: float = 0.0
    ends: bool = False
    share: float | None = None

    @property
    def said_left(self) -> str:
        """The seconds left, for people."""
        if self.left is None:
            return "estimating" if self.ends else ""
        if self.high > 1.5 * self.low + 1:
            return f"{span(self.low)} to {span(self.high)} left"
        return f"{span(self.left)} left" if self.left >= 0.5 else ""

    def later(self, seconds: float) -> "RunProgress":
        """The progress `seconds` later, if no event came since."""
        left = None if self.left is None else max(0.0, self.left - seconds)
        low, high = max(0.0, self.low - seconds), max(0.0, self.high - seconds)
        return replace(self, seconds=self.seconds + seconds, left=left, low=low, high=high)

    def within(self, sure: float, guessed: float = 0.0, *, until: float = math.inf) -> "RunProgress":
        """This with `sure` seconds left that are measured and `guessed` ones that are not; at most `until` in all."""
        low = high = whole = sure + guessed
        if guessed > _GUESSED * whole:
            low, high = sure + guessed / 2, sure + 2 * guessed
        left = min(whole, until)
        share = self.seconds / max(1e-9, self.seconds + left)
        return replace(self, left=left, low=min(low, until), high=min(high, until), ends=True, share=share)


@dataclass
class _Pace:
    """Seconds of some work, and its operations."""

    seconds: float = 0.0
    operations: float = 0.0

    def add(self, seconds: float, operations: float) -> None:
        self.seconds, self.operations = self.seconds + seconds, self.operations + operations


@dataclass
class _Item:
    """A planned phase, and how far it is; `done` times are over and took `seconds`."""

    phase: str
    stage: int
    times: float
    flops: float | None
    repeats: bool
    done: int = 0
    seconds: float = 0.0
    spent: float = 0.0  # seconds of the time that has begun
    share: float = 0.0  # how much of that time is done; 0 if it cannot be counted

    @property
    def unit(self) -> float:
        """Operations of one time, as far as known: otherwise the time itself is counted."""
        return self.flops or 1.0

    @property
    def begun(self) -> bool:
        """Whether a time has begun that is not counted yet."""
        return self.spent > 0 or self.share > 0

    def count(self) -> None:
        """Count the time that has begun, if one has, as over."""
        self.done, self.seconds = self.done + self.begun, self.seconds + self.spent
        self.spent = self.share = 0.0


@dataclass
class ProgressTracker:
    """Follows a run, or anything else that tells events, and says where it stands."""

    _began: float | None = None
    _now: float = 0.0
    _passed: float = 0.0  # seconds between the last two events
    _deadline: float = math.inf
    _ended: bool = False
    _items: list[_Item] = field(default_factory=list)
    _current: _Item | None = None
    _stage_tokens: Mapping[int, int] = field(default_factory=dict)
    _skipped: set[str] = field(default_factory=set)  # phases that the last iteration left out
    _params: int | None = None
    _removed: list[int] = field(default_factory=list)  # parameters removed by each cut that did not end its stage
    _tokens: int = 0
    _all_tokens: int = 0
    _shown: Progress | None = None
    _doing: str = ""  # what is done before the first phase
    _cell: CellBegun | None = None
    _inner: "ProgressTracker | None" = None  # follows the process of a cell
    _cell_began: float = 0.0

    def hear(self, event: Event) -> None:
        """Take in an event, which happens at its `time`, or now if it has none."""
        if isinstance(event, InCell):
            if self._inner is not None and event.inner is not None:
                self._inner.hear(event.inner)
            return
        now = event.time if event.time is not None else time.time()
        if self._began is None:
            self._began = self._now = now
        self._passed, self._now = max(0.0, now - self._now), max(now, self._now)
        if self._current is not None and self._current.phase != "train" and not isinstance(event, Step):
            self._current.spent += self._passed  # that of training is counted at its steps
        if self._inner is not None and isinstance(event, Progress):
            self._inner.hear(event)
        else:
            self._follow(event)

    def at(self, now: float | None = None) -> RunProgress:
        """Where the run stands at a moment, by default now."""
        now = time.time() if now is None else now
        if self._began is None:
            return RunProgress("", "", 0.0)
        shown, seconds = self._shown, max(0.0, now - self._began)
        if self._cell is not None and self._inner is not None:
            return self._in_cell(self._cell, self._inner.at(now), seconds, max(0.0, now - self._cell_began))
        plain = RunProgress(self._doing, "", seconds, ends=bool(self._items))
        if shown is not None:
            plain = replace(plain, doing=shown.doing, where=shown.where)
        if self._ended:
            return replace(plain, left=0.0, share=1.0)
        if not self._items:
            return replace(plain, share=shown.done / shown.of if shown is not None and shown.of else None)
        rests = list(self._rests(max(0.0, now - self._now)))
        sure, guessed = (sum(rest for known, rest in rests if known == is_sure) for is_sure in (True, False))
        until = max(0.0, self._deadline - now)
        return plain if math.isinf(min(until, sure + guessed)) else plain.within(sure, guessed, until=until)

    def _in_cell(self, cell: CellBegun, inner: RunProgress, seconds: float, spent: float) -> RunProgress:
        """The progress of a comparison: what its present cell is doing, and the seconds until all cells are done."""
        plain = RunProgress(inner.doing, cell.name, seconds, ends=True)
        if cell.seconds_left is not None and cell.seconds_here is not None:
            here = max(0.0, cell.seconds_here - spent)
            if inner.left is not None and inner.low == inner.high:  # this cell's method may take longer than others
                here = max(here, inner.left)
            return plain.within(cell.seconds_left - cell.seconds_here + here)
        if inner.left is None:
            return replace(plain, ends=inner.ends)
        return plain.within(inner.left, (cell.of - cell.cell) * (spent + inner.left))

    # What events say.

    def _follow(self, event: Event) -> None:
        if isinstance(event, Planned | Start) and event.seconds_left is not None:
            self._deadline = self._now + event.seconds_left
        match event:
            case Planned():
                self._items, self._stage_tokens = [_Item(**item) for item in event.items], dict(enumerate(event.tokens, start=1))
                self._current, self._removed, self._skipped = None, [], set()
            case CellBegun():
                self._cell, self._inner, self._cell_began = event, ProgressTracker(), self._now
            case CellDone():
                self._cell = self._inner = None
            case Load() | Find() | Probe():
                self._shown, self._doing = None, event.line()
            case Start():
                self._params, self._tokens = event.params if event.now is None else event.now, event.trained_tokens
                self._all_tokens = event.training_tokens
            case Progress():
                self._turn_to(event.phase, event.stage or 0)
                self._shown = event
                if self._current is not None and event.of and event.phase != "task":  # every task counts from 0 again
                    self._current.share = event.done / event.of
            case MasksLearnt():
                pass  # `Step` events follow the training in which masks are learnt
            case Within():
                self._follow_within(event)
            case Cut():
                self._follow_cut(event)
            case Step():
                self._follow_step(event)
            case Evaluation() | Tasks() | Saved():
                phase = {Evaluation: "evaluate", Tasks: "task", Saved: "save"}[type(event)]
                if (ended := self._find(phase, event.stage or 0)) is not None:
                    ended.count()
                self._current, self._ended = None, isinstance(event, Saved) and event.is_result

    def _turn_to(self, phase: str, stage: int) -> None:
        """A phase continues or begins; phases before it in the plan are over."""
        before = self._current
        if before is not None and (before.phase, before.stage) == (phase, stage):
            return
        if before is not None and not before.repeats and not phase_of(before.phase).told:
            before.count()
        self._current = current = self._find(phase, stage)
        if current is None or phase_of(phase).anywhere:
            return
        for item in itertools.takewhile(lambda item: item is not current, self._items):
            if not (item.repeats and current.repeats and item.stage == stage):
                item.count()
                item.times = item.done

    def _find(self, phase: str, stage: int) -> _Item | None:
        items = [item for item in self._items if (item.phase, item.stage) == (phase, stage)]
        return next((item for item in items if item.done < item.times or item.repeats), items[-1] if items else None)

    def _follow_within(self, event: Within) -> None:
        """A round or a layer is done."""
        phase = "layers" if isinstance(event, Masked) else "search"
        self._shown = Progress(phase=phase, stage=event.stage, done=event.done, of=event.of)
        if (item := self._find(phase, event.stage or 0)) is None:
            return
        item.spent += self._passed if self._current is None else 0.0
        item.count()
        item.times, item.done = event.of, event.done
        self._current = item

    def _follow_cut(self, cut: Cut) -> None:
        """An iteration is over; the parameters still to go say how often its phases come again."""
        stage, before, self._params = cut.stage or 0, self._params, cut.params
        to_go = 0 if cut.target is None else max(0, cut.params - cut.target)
        if before is not None and to_go and before > cut.params:
            self._removed.append(before - cut.params)
        more = 0
        if to_go:
            more = max(1, math.ceil(to_go * len(self._removed) / sum(self._removed) - 0.1)) if self._removed else 1
        for item in (item for item in self._items if item.repeats and item.stage == stage):
            (self._skipped.discard if item.begun or item.phase in ("search", "layers") else self._skipped.add)(item.phase)
            item.count()
            if not (to_go and item.phase in ("search", "layers")):  # which are counted by their own events
                item.times = item.done + more
        self._current = None

    def _follow_step(self, step: Step) -> None:
        """Tokens were trained on. A reduction that cuts as it trains reports no other phase."""
        stage = step.stage or 0
        item, of = self._find("train", stage), self._stage_tokens.get(stage, 0)
        tokens, self._tokens = max(0, step.tokens - self._tokens), step.tokens
        if item is not None and of:
            item.spent, item.share = item.spent + self._passed, min(1.0, item.share + tokens / of)
        self._current = item
        self._shown = Progress(phase="train", stage=step.stage, done=step.tokens, of=max(step.tokens, self._all_tokens))

    # What is left.

    def _rests(self, since: float) -> Iterator[tuple[bool, float]]:
        """For each phase of the plan: whether it has been measured, and the seconds left of it, infinite if unknown."""
        measured, sure, usual = defaultdict[str, _Pace](_Pace), set[str](), _Pace()
        for item in self._items:
            counts = item is self._current or phase_of(item.phase).told  # else, the time that has begun is over
            share = item.share if counts else float(item.begun)
            measured[item.phase].add(item.seconds + (item.spent if share else 0.0), (item.done + share) * item.unit)
            sure |= {item.phase} if item.done or share > _DOUBT else set()
        for phase in {item.phase for item in self._items if item.flops}:
            usual.add(measured[phase].seconds, measured[phase].operations / phase_of(phase).ease)
        for item in self._items:
            running, pace, known = item is self._current, replace(measured[item.phase]), item.phase in sure or item.flops == 0
            if item.phase not in sure and item.flops and usual.operations:
                guess = usual.seconds / usual.operations / phase_of(item.phase).ease
                pace.add(_DOUBT * item.unit * guess, _DOUBT * item.unit)
            coming = 0.0 if item.phase in self._skipped and not running else max(0.0, item.times - item.done - item.begun)
            goes_on = item.begun and item.done < item.times and (running or phase_of(item.phase).told)
            seconds = 0.0 if item.flops == 0 else math.inf
            if pace.operations:
                seconds = item.unit * pace.seconds / pace.operations
            rest = (1 - item.share) * seconds if item.share else seconds - item.spent
            left = coming * seconds if coming else 0.0
            yield known, left + (max(0.0, rest - since * running) if goes_on else 0.0)
