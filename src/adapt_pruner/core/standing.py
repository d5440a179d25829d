"""Where a run stands, told by its events alone: the phase it is in, how much of it is done, seconds so far and seconds left.

Whoever shows a run (the bar, plain lines, `watch`) or keeps how far it is (`progress.json`) asks a `Course`, which follows it.

The estimate is of the seconds until the result is written, with its card and page. It adds up what is still to come:

    left = Σ over the phases ahead of  times · seconds of one time
    seconds of one time = operations (`core.ahead`) · seconds per operation of this phase in this run
    times of an iteration's phases = parameters still to go / parameters that an iteration of this run removes

A phase counts by the seconds that it took, whatever its tokens are. So a repeated iteration costs what the one before it did, in
proportion to the model that is left, from the first iteration on; and a phase that the last iteration left out is not expected in the
next. A phase that this run has not come to yet is held against those that it has measured, by their operations and by how fast such a
phase ran on a CPU beside the others (`_EASE`). Until a phase is measured, nothing is said. While most of the estimate rests on such a
guess, it is a range, from half to twice the guessed part.

The promise: on a machine that stays as fast as it is, over a whole run, the time in all (seconds so far and left) is within 30 % of the
truth after a tenth of it, and within 15 % after a third. `tests/test_standing.py` holds it on runs that were recorded.
It does not hold where what is to come depends on what is found on the way: a search that goes on until it has found, tasks that have not
been scored yet (until then there is no estimate), a metric of one's own.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapt_pruner.core.ahead import Item, Planned
from adapt_pruner.core.compared import Cell, CellDone, InCell
from adapt_pruner.core.events import Cut, Evaluation, Event, Find, Load, Progress, Saved, Start, Step, Tasks
from adapt_pruner.core.searched import Masked, Within
from adapt_pruner.core.words import span

__all__ = ["Course", "Standing"]

_EASE = {"write": 0.27, "repair": 0.9}
"""Operations a second of a phase, beside those of reading text, on a CPU."""
_DOUBT = 0.1  # share of a phase that its first guess counts as, beside what is measured of it
_LATEST = 0.5  # what counts the seconds of a time before the latest
_GUESSED = 0.5  # share of an estimate from which on it is a range
_ANYWHERE = ("save", "read", "time")  # phases that say nothing about what lies before them
_TOLD = ("evaluate", "task", "save", "train")  # phases whose end is an event


@dataclass(frozen=True)
class Standing:
    """Where a run stands at one moment.

    Attributes:
        doing: the phase, with what is done of what: repairing 12/60; empty before the first.
        where: stage and iteration; empty where neither counts.
        seconds: since the first event.
        left: seconds until the end; None where nobody knows.
        low: the same, at least.
        high: the same, at most; apart from `low` where most of it is a guess.
        ends: whether an end can be foreseen at all: what is done has a plan.
        share: of the time that is over, or, without a plan, of the phase; None where nobody knows.
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

    def told(self) -> dict[str, Any]:
        """It as plain data, as progress.json has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Standing":
        """What `told` made plain.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """

        def known(key: str) -> float | None:
            return None if data[key] is None else float(data[key])

        seconds, low, high = float(data["seconds"]), float(data["low"]), float(data["high"])
        return cls(str(data["doing"]), str(data["where"]), seconds, known("left"), low, high, bool(data["ends"]), known("share"))

    def later(self, seconds: float) -> "Standing":
        """The same, so many seconds later, while nothing was heard."""
        left = None if self.left is None else max(0.0, self.left - seconds)
        low, high = max(0.0, self.low - seconds), max(0.0, self.high - seconds)
        return replace(self, seconds=self.seconds + seconds, left=left, low=low, high=high)


@dataclass
class _Ahead:
    """A phase that is planned: how often it has come, and how far it is now."""

    phase: str
    stage: int
    times: float
    flops: float | None
    repeats: bool
    done: int = 0
    spent: float = 0.0  # seconds of the time that is not over
    share: float | None = None  # of that time
    ran: bool = True  # whether the last iteration had it
    over: bool = False

    def coming(self, *, begun: bool) -> float:
        """Times after the one that has begun, if one has."""
        begun = begun or self.spent > 0 or self.share is not None
        return 0.0 if self.over else max(0.0, self.times - self.done - begun)


@dataclass
class _Measured:
    """What a phase took: seconds and times, and of those whose operations are known, seconds and operations."""

    seconds: float = 0.0
    times: float = 0.0
    of_flops: float = 0.0  # seconds
    flops: float = 0.0

    def add(self, seconds: float, flops: float | None, *, times: float = 1.0, keep: float = 1.0) -> None:
        """Add what a few times took, `flops` each; what was before counts `keep`."""
        self.seconds, self.times = keep * self.seconds + seconds, keep * self.times + times
        if flops:
            self.of_flops, self.flops = keep * self.of_flops + seconds, keep * self.flops + times * flops

    def one(self, flops: float | None) -> float | None:
        """Seconds of one time; None where nothing was measured."""
        if flops and self.flops:
            return self.of_flops / self.flops * flops
        return self.seconds / self.times if self.times else None


@dataclass
class Course:
    """Follows a run, or whatever else tells events, and says where it stands."""

    _began: float | None = None
    _now: float = 0.0
    _deadline: float = math.inf
    _items: list[_Ahead] = field(default_factory=list)
    _targets: list[int] = field(default_factory=list)
    _measured: dict[str, _Measured] = field(default_factory=dict)
    _current: _Ahead | None = None
    _shown: Progress | None = None
    _passed: float = 0.0  # seconds since the event before
    _params: int | None = None
    _removed: list[int] = field(default_factory=list)  # parameters, of each cut that did not end its stage
    _tokens: int = 0
    _all_tokens: int = 0
    _stage_tokens: dict[int, int] = field(default_factory=dict)
    _ended: bool = False
    _doing: str = ""  # what is done before there is a phase
    _cell: Cell | None = None
    _inner: "Course | None" = None  # follows the process of a cell
    _cell_began: float = 0.0

    def hear(self, event: Event) -> None:
        """Take in an event, which happens now or when its `time` says."""
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

    def at(self, now: float | None = None) -> Standing:
        """Where it stands at a moment, by default now."""
        now = time.time() if now is None else now
        if self._began is None:
            return Standing()
        if self._cell is not None and self._inner is not None:
            return self._in_cell(self._cell, self._inner.at(now), now)
        doing, where = self._doing, ""
        if self._shown is not None:
            doing, where = self._shown.doing, self._shown.where
        plain = Standing(doing, where, max(0.0, now - self._began), ends=bool(self._items))
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

    def _in_cell(self, cell: Cell, inner: Standing, now: float) -> Standing:
        """Of a comparison: what its cell is at, and the seconds until all cells are done."""
        plain = Standing(inner.doing, cell.name, max(0.0, now - (self._began or now)), ends=True)
        spent, others = max(0.0, now - self._cell_began), cell.of - cell.cell
        if cell.seconds_left is not None and cell.seconds_here is not None:
            here = max(0.0, cell.seconds_here - spent)
            if inner.left is not None and inner.low == inner.high:  # another method takes another time
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
            case Cell():
                self._cell, self._inner, self._cell_began = event, Course(), self._now
            case CellDone():
                self._cell = self._inner = None
            case Load() | Find():
                self._shown, self._doing = None, event.line()
            case Start():
                self._params, self._tokens = event.params if event.now is None else event.now, event.trained_tokens
                self._all_tokens = event.training_tokens
                if event.seconds_left is not None:
                    self._deadline = self._now + event.seconds_left
            case Progress():
                self._turn_to(event.phase, event.stage or 0)
                self._shown = event
                if self._current is not None and event.of and event.phase != "task":  # of tasks, each counts anew
                    self._current.share = event.done / event.of
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
        """A phase goes on, or begins; what the plan has before it is over."""
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
        """The phase is over, if nothing else says so: it is part of no iteration, and has no event for its end."""
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
        """One more time of a phase is over."""
        self._measured.setdefault(item.phase, _Measured()).add(item.spent, item.flops, keep=_LATEST)
        item.done, item.spent, item.share = item.done + 1, 0.0, None

    def _follow_within(self, event: Within) -> None:
        """A round or a layer is done; of one that nobody planned, the seconds before it are its own."""
        phase, stage = "layers" if isinstance(event, Masked) else "search", event.stage or 0
        if isinstance(event, Masked) and event.unit != "layer":
            return  # it learns its masks as it trains
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
        """An iteration is over: how often its phases come again, the parameters say."""
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
        """Cuts from so many parameters to so many, as large as those of this run."""
        if target is None or params <= target:
            return 0
        latest = self._removed[-3:]
        return max(1, math.ceil((params - target) * len(latest) / sum(latest) - 0.1)) if latest else 1

    def _follow_step(self, step: Step) -> None:
        """Tokens were trained on; a reduction that cuts as it trains tells no other phase."""
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
        """Of each phase ahead: whether it has been measured, and the seconds that are left of it; None where nobody knows."""
        inside = self._current if self._current is not None and self._current.repeats else None
        measured = self._so_far()
        passed = True  # whether the phase lies before the one that is running, in its iteration
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
                coming = max(0.0, coming - 1)  # this iteration goes without it
            rest = None if one is None and coming else coming * (one or 0.0)
            if (running and item.done < item.times) or (
                item.phase == "train" and item.share
            ):  # a checkpoint may come within training
                known = known or (item.share or 0.0) > _DOUBT
                begun = self._begun(item, one, since, first=item.phase not in measured)
                rest = None if rest is None or begun is None else rest + begun
            yield known, rest

    def _so_far(self) -> dict[str, _Measured]:
        """What was measured, with the phases of this iteration that are over."""
        measured = {phase: replace(one) for phase, one in self._measured.items()}
        for item in self._items:
            if item.repeats and item.spent > 0 and item is not self._current:
                measured.setdefault(item.phase, _Measured()).add(item.spent, item.flops)
        return measured

    def _one(self, item: _Ahead, measured: Mapping[str, _Measured]) -> tuple[bool, float | None]:
        """Whether a phase was measured, and the seconds of one time."""
        if item.phase in measured and (one := measured[item.phase].one(item.flops)) is not None:
            return True, one
        if item.flops == 0:
            return True, 0.0
        pace = self._pace(measured)
        return False, None if item.flops is None or pace is None else pace * item.flops / _EASE.get(item.phase, 1.0)

    def _pace(self, measured: Mapping[str, _Measured]) -> float | None:
        """Seconds an operation of reading text, by all that was measured of this run."""
        seconds = flops = 0.0
        for phase, its in measured.items():
            seconds, flops = seconds + its.of_flops, flops + its.flops / _EASE.get(phase, 1.0)
        running = self._current
        if running is not None and running.flops and running.share and running.phase != "train":
            seconds, flops = seconds + running.spent, flops + running.share * running.flops / _EASE.get(running.phase, 1.0)
        return seconds / flops if seconds and flops else None

    def _begun(self, item: _Ahead, one: float | None, since: float, *, first: bool) -> float | None:
        """Seconds that are left of the time of a phase that has begun; `first` if the phase was not measured before."""
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


def _within(plain: Standing, sure: float, guessed: float, until: float) -> Standing:
    """A standing with so many seconds left that are known, and so many that are guessed; no more than `until`."""
    whole = sure + guessed
    vague = guessed > _GUESSED * whole
    low, high = (sure + guessed / 2, sure + 2 * guessed) if vague else (whole, whole)
    left = min(whole, until)
    share = plain.seconds / max(1e-9, plain.seconds + left)
    return replace(plain, left=left, low=min(low, until), high=min(high, until), ends=True, share=share)


def _plain(items: list[Item]) -> list[dict[str, Any]]:
    return [dict(item) for item in items]
