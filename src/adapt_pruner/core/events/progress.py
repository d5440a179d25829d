"""Where a run stands, judged by its events alone: its phase, how much of it is done, seconds so far and seconds left.

Everything that shows a run (the bar, plain lines, `watch`) or records its progress (`progress.json`) asks a `ProgressTracker`, which
follows it.

The estimate counts the seconds until the result is written, with its card and page. It adds up what is still to come:

    left = Σ over the phases ahead of  times · seconds of one time
    seconds of one time = operations (`core.events.run`) · seconds per operation of this phase in this run
    times of an iteration's phases = parameters still to go / parameters that an iteration of this run removes

A phase is judged by the seconds that it took, not by its tokens. So from the first iteration on, a repeated iteration costs what
the one before it did, in proportion to the model that is left. A phase that the last iteration left out is not expected in the
next. A phase that has not run yet is estimated from the measured ones, by their operations and by their relative speed on a CPU
(`EASE`). Until a phase is measured, there is no estimate. While most of an estimate is such a guess, it is a range, from half to
twice the guessed part.

The promise: on a machine whose speed stays the same, the total time (seconds so far and left) is within 30 % of the truth after a
tenth of a run, and within 15 % after a third. `tests/test_progress.py` checks this on recorded runs. The promise does not hold if
the work depends on what is found on the way: a search without a fixed end, tasks that have not been scored yet (there is no
estimate until then), or a user's own metric.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapt_pruner.core.events import Cut, Evaluation, Event, Find, Load, Progress, Saved, Start, Step, Tasks
from adapt_pruner.core.events.comparison import CellBegun, CellDone, InCell
from adapt_pruner.core.events.run import Item, Masked, MasksLearnt, Planned, Probe, Within
from adapt_pruner.core.events.words import span

__all__ = ["EASE", "ProgressTracker", "RunProgress"]

EASE = {"write": 0.27, "repair": 0.9}
"""Operations per second of a phase on a CPU, relative to reading text."""
_DOUBT = 0.1  # weight of the first guess for a phase, as a share of the phase, beside what is measured of it
_LATEST = 0.5  # weight of earlier measurements beside the latest one
_GUESSED = 0.5  # share of guesses in an estimate above which it is a range
_ANYWHERE = ("save", "read", "time")  # phases that may come anywhere, so earlier phases need not be over
_TOLD = ("evaluate", "task", "save", "train")  # phases whose end is an event


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands at one moment.

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

    doing: str = ""
    where: str = ""
    seconds: float = 0.0
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

    def to_dict(self) -> dict[str, Any]:
        """This progress as plain data, as in progress.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunProgress":
        """The progress from data that `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is no progress.
        """

        def known(key: str) -> float | None:
            return None if data[key] is None else float(data[key])

        seconds, low, high = float(data["seconds"]), float(data["low"]), float(data["high"])
        return cls(str(data["doing"]), str(data["where"]), seconds, known("left"), low, high, bool(data["ends"]), known("share"))

    def later(self, seconds: float) -> "RunProgress":
        """The progress `seconds` later, if no event came since."""
        left = None if self.left is None else max(0.0, self.left - seconds)
        low, high = max(0.0, self.low - seconds), max(0.0, self.high - seconds)
        return replace(self, seconds=self.seconds + seconds, left=left, low=low, high=high)


@dataclass
class _Ahead:
    """A planned phase: how often it has come, and how far it is now."""

    phase: str
    stage: int
    times: float
    flops: float | None
    repeats: bool
    done: int = 0
    spent: float = 0.0  # seconds of the time that has begun and is not over
    share: float | None = None  # how much of that time is done
    ran: bool = True  # whether the phase was part of the last iteration
    over: bool = False

    def coming(self, *, begun: bool) -> float:
        """How often the phase still comes, not counting a time that has begun."""
        begun = begun or self.spent > 0 or self.share is not None
        return 0.0 if self.over else max(0.0, self.times - self.done - begun)


@dataclass
class _Measured:
    """What a phase took: seconds and times, and the seconds and operations of those times whose operations are known."""

    seconds: float = 0.0
    times: float = 0.0
    of_flops: float = 0.0  # seconds
    flops: float = 0.0

    def add(self, seconds: float, flops: float | None, *, times: float = 1.0, keep: float = 1.0) -> None:
        """Add the seconds of `times` times with `flops` operations each; earlier measurements are weighted by `keep`."""
        self.seconds, self.times = keep * self.seconds + seconds, keep * self.times + times
        if flops:
            self.of_flops, self.flops = keep * self.of_flops + seconds, keep * self.flops + times * flops

    def one(self, flops: float | None) -> float | None:
        """Seconds of one time; None if nothing was measured."""
        if flops and self.flops:
            return self.of_flops / self.flops * flops
        return self.seconds / self.times if self.times else None


@dataclass
class ProgressTracker:
    """Follows a run, or anything else that tells events, and says where it stands."""

    _began: float | None = None
    _now: float = 0.0
    _deadline: float = math.inf
    _items: list[_Ahead] = field(default_factory=list)
    _targets: list[int] = field(default_factory=list)
    _measured: dict[str, _Measured] = field(default_factory=dict)
    _current: _Ahead | None = None
    _shown: Progress | None = None
    _passed: float = 0.0  # seconds between the last two events
    _params: int | None = None
    _removed: list[int] = field(default_factory=list)  # parameters removed by each cut that did not end its stage
    _tokens: int = 0
    _all_tokens: int = 0
    _stage_tokens: dict[int, int] = field(default_factory=dict)
    _ended: bool = False
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
        if self._current is not None:
            self._current.spent += self._passed
        if self._inner is not None and isinstance(event, Progress):
            self._inner.hear(event)
        else:
            self._follow(event)

    def at(self, now: float | None = None) -> RunProgress:
        """Where the run stands at a moment, by default now."""
        now = time.time() if now is None else now
        if self._began is None:
            return RunProgress()
        if self._cell is not None and self._inner is not None:
            return self._in_cell(self._cell, self._inner.at(now), now)
        doing, where = self._doing, ""
        if self._shown is not None:
            doing, where = self._shown.doing, self._shown.where
        plain = RunProgress(doing, where, max(0.0, now - self._began), ends=bool(self._items))
        if self._ended:
            return replace(plain, left=0.0, share=1.0)
        if not self._items:
            shown = self._shown
            return replace(plain, share=shown.done / shown.of if shown is not None and shown.of else None)
        sure = guessed = 0.0
        for known, rest in self._rests(max(0.0, now - self._now)):
            seconds = math.inf if rest is None else rest
            sure, guessed = (sure + seconds, guessed) if known else (sure, guessed + seconds)
        until = max(0.0, self._deadline - now)
        return plain if math.isinf(min(until, sure + guessed)) else _within(plain, sure, guessed, until)

    def _in_cell(self, cell: CellBegun, inner: RunProgress, now: float) -> RunProgress:
        """The progress of a comparison: what its present cell is doing, and the seconds until all cells are done."""
        plain = RunProgress(inner.doing, cell.name, max(0.0, now - (self._began or now)), ends=True)
        spent, others = max(0.0, now - self._cell_began), cell.of - cell.cell
        if cell.seconds_left is not None and cell.seconds_here is not None:
            here = max(0.0, cell.seconds_here - spent)
            if inner.left is not None and inner.low == inner.high:  # this cell's method may take longer than others
                here = max(here, inner.left)
            return _within(plain, cell.seconds_left - cell.seconds_here + here, 0.0, math.inf)
        if inner.left is None:
            return replace(plain, ends=inner.ends)
        return _within(plain, inner.left, others * (spent + inner.left), math.inf)

    # What events say.

    def _follow(self, event: Event) -> None:
        match event:
            case Planned():
                self._plan(event)
            case CellBegun():
                self._cell, self._inner, self._cell_began = event, ProgressTracker(), self._now
            case CellDone():
                self._cell = self._inner = None
            case Load() | Find() | Probe():
                self._shown, self._doing = None, event.line()
            case Start():
                self._params, self._tokens = event.params if event.now is None else event.now, event.trained_tokens
                self._all_tokens = event.training_tokens
                if event.seconds_left is not None:
                    self._deadline = self._now + event.seconds_left
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
            case Evaluation():
                self._complete("evaluate", event.stage)
            case Tasks():
                self._complete("task", event.stage)
            case Saved():
                self._complete("save", event.stage or 0)
                self._ended = event.is_result

    def _plan(self, planned: Planned) -> None:
        self._items = [_Ahead(**item) for item in _plain(planned.items)]
        self._targets = list(planned.targets)
        self._stage_tokens = dict(enumerate(planned.tokens, start=1))
        self._current, self._removed, self._measured = None, [], {}

    def _turn_to(self, phase: str, stage: int) -> None:
        """A phase continues or begins; phases before it in the plan are over."""
        if self._current is not None and (self._current.phase, self._current.stage) == (phase, stage):
            return
        self._leave()
        self._current = self._find(phase, stage)
        if self._current is None or phase in _ANYWHERE:
            return
        for item in self._items:
            if item is self._current:
                break
            if not (item.repeats and self._current.repeats and item.stage == stage):
                item.over = True

    def _leave(self) -> None:
        """End the present phase, unless an iteration or an event of its own ends it."""
        item = self._current
        if item is not None and not item.repeats and item.phase not in _TOLD:
            self._count(item)
        self._current = None

    def _find(self, phase: str, stage: int) -> _Ahead | None:
        those = [item for item in self._items if (item.phase, item.stage) == (phase, stage) and not item.over]
        return next((item for item in those if item.done < item.times or item.repeats), those[-1] if those else None)

    def _complete(self, phase: str, stage: int) -> None:
        if (item := self._find(phase, stage)) is not None and item.spent > 0:
            self._count(item)
        self._current = None

    def _count(self, item: _Ahead) -> None:
        """Record that a phase has been run once more."""
        self._measured.setdefault(item.phase, _Measured()).add(item.spent, item.flops, keep=_LATEST)
        item.done, item.spent, item.share = item.done + 1, 0.0, None

    def _follow_within(self, event: Within) -> None:
        """A round or a layer is done. If nobody planned it, the seconds before it count as its own."""
        phase, stage = "layers" if isinstance(event, Masked) else "search", event.stage or 0
        item = self._find(phase, stage)
        if item is None:
            if not self._items:
                return
            at = next((number for number, one in enumerate(self._items) if one.stage == stage), len(self._items))
            self._items.insert(at, item := _Ahead(phase, stage, event.of, 0.0, repeats=True))
        if self._current is None:
            item.spent += self._passed
        before = item.done
        item.times, item.done = event.of, event.done
        if item.spent > 0 and event.done > before:
            measured = self._measured.setdefault(phase, _Measured())
            measured.add(item.spent, item.flops, times=event.done - before, keep=_LATEST if phase == "search" else 1.0)
        item.spent, item.share = 0.0, None
        self._current = item
        self._shown = Progress(phase=phase, stage=event.stage, done=event.done, of=event.of)

    def _follow_cut(self, cut: Cut) -> None:
        """An iteration is over; the parameters still to go say how often its phases come again."""
        stage, before = cut.stage or 0, self._params
        reached = cut.target is None or cut.params <= cut.target
        if before is not None and not reached and before > cut.params:
            self._removed.append(before - cut.params)
        self._params = cut.params
        for item in self._items:
            if not item.repeats:
                continue
            if item.stage == stage:
                item.ran = item.spent > 0
                if item.ran:
                    self._count(item)
                if reached:
                    item.over = True
                elif item.phase not in ("search", "layers"):
                    item.times = item.done + self._cuts(cut.params, cut.target)
            elif item.stage > stage and self._removed and 0 < item.stage <= len(self._targets):
                item.ran = next((one.ran for one in self._items if (one.phase, one.stage) == (item.phase, stage)), True)
                if item.phase not in ("search", "layers", "levels"):
                    item.times = self._cuts(*self._targets[item.stage - 2 : item.stage]) if item.stage > 1 else item.times
        self._current = None

    def _cuts(self, params: int, target: int | None) -> int:
        """The number of cuts from `params` to `target`, if they are as large as the latest cuts of this run."""
        if target is None or params <= target:
            return 0
        latest = self._removed[-3:]
        return max(1, math.ceil((params - target) * len(latest) / sum(latest) - 0.1)) if latest else 1

    def _follow_step(self, step: Step) -> None:
        """Tokens were trained on. A reduction that cuts as it trains reports no other phase."""
        item = self._find("train", step.stage or 0)
        if self._current is not None:
            self._current.spent = max(0.0, self._current.spent - self._passed)
        tokens, self._tokens = max(0, step.tokens - self._tokens), step.tokens
        of = self._stage_tokens.get(step.stage or 0, 0)
        if item is not None and of:
            item.share = min(1.0, (item.share or 0.0) + tokens / of)
            self._measured.setdefault("train", _Measured()).add(item.spent + self._passed, item.flops, times=tokens / of)
            item.spent = 0.0
        self._current = item
        self._shown = Progress(phase="train", stage=step.stage, done=step.tokens, of=max(step.tokens, self._all_tokens))

    # What is left.

    def _rests(self, since: float) -> Iterator[tuple[bool, float | None]]:
        """For each phase ahead: whether it has been measured, and the seconds left of it, None if unknown."""
        inside = self._current if self._current is not None and self._current.repeats else None
        measured = self._so_far()
        passed = True  # whether `item` comes before the running phase in its iteration
        for item in self._items:
            if item is inside:
                passed = False
            if item.over:
                continue
            known, one = self._one(item, measured)
            running = item is self._current
            coming = item.coming(begun=running) if item.ran or running else 0.0
            if (
                inside is not None
                and item.repeats
                and item.stage == inside.stage
                and passed
                and not item.spent
                and item is not inside
            ):
                coming = max(0.0, coming - 1)  # this iteration has skipped the phase
            rest = None if one is None and coming else coming * (one or 0.0)
            if (running and item.done < item.times) or (
                item.phase == "train" and item.share
            ):  # training may be interrupted by a checkpoint
                known = known or (item.share or 0.0) > _DOUBT
                begun = self._begun(item, one, since, first=item.phase not in measured)
                rest = None if rest is None or begun is None else rest + begun
            yield known, rest

    def _so_far(self) -> dict[str, _Measured]:
        """The measurements, including the finished phases of this iteration."""
        measured = {phase: replace(one) for phase, one in self._measured.items()}
        for item in self._items:
            if item.repeats and item.spent > 0 and item is not self._current:
                measured.setdefault(item.phase, _Measured()).add(item.spent, item.flops)
        return measured

    def _one(self, item: _Ahead, measured: Mapping[str, _Measured]) -> tuple[bool, float | None]:
        """Whether a phase was measured, and the seconds that it takes once."""
        if item.phase in measured and (one := measured[item.phase].one(item.flops)) is not None:
            return True, one
        if item.flops == 0:
            return True, 0.0
        pace = self._pace(measured)
        return False, None if item.flops is None or pace is None else pace * item.flops / EASE.get(item.phase, 1.0)

    def _pace(self, measured: Mapping[str, _Measured]) -> float | None:
        """Seconds per operation of reading text, from everything measured in this run."""
        seconds = flops = 0.0
        for phase, its in measured.items():
            seconds, flops = seconds + its.of_flops, flops + its.flops / EASE.get(phase, 1.0)
        running = self._current
        if running is not None and running.flops and running.share and running.phase != "train":
            seconds, flops = seconds + running.spent, flops + running.share * running.flops / EASE.get(running.phase, 1.0)
        return seconds / flops if seconds and flops else None

    def _begun(self, item: _Ahead, one: float | None, since: float, *, first: bool) -> float | None:
        """Seconds left of a phase that has begun; `first` if the phase was not measured before."""
        since = since if item is self._current else 0.0
        share = item.share
        if share is None or (share == 0 and one is not None):
            return None if one is None else max(0.0, one - item.spent - since)
        if first:
            if one is None and not share:
                return None
            guess, doubt = (0.0, 0.0) if one is None else (one, _DOUBT)
            one = (doubt * guess + item.spent) / (doubt + share)
        return None if one is None else max(0.0, (1 - share) * one - since)


def _within(plain: RunProgress, sure: float, guessed: float, until: float) -> RunProgress:
    """The progress with `sure` seconds left that are measured and `guessed` ones that are not; at most `until` in all."""
    whole = sure + guessed
    vague = guessed > _GUESSED * whole
    low, high = (sure + guessed / 2, sure + 2 * guessed) if vague else (whole, whole)
    left = min(whole, until)
    share = plain.seconds / max(1e-9, plain.seconds + left)
    return replace(plain, left=left, low=min(low, until), high=min(high, until), ends=True, share=share)


def _plain(items: list[Item]) -> list[dict[str, Any]]:
    return [dict(item) for item in items]
