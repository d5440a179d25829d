"""`Work`, the one object of a run: what was asked, the model, what it reads, where it stands; and `Reduction`, a way of shrinking it.

A run hands one `Work` from room to room. `run.loop` moves it through the stages; a `Reduction` takes it down to a stage's budget.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.core import events
from adapt_pruner.core.axes import Axis, Mask
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.events import Event, Warned
from adapt_pruner.core.memory import give_back
from adapt_pruner.core.surgery import cut, gated
from adapt_pruner.core.task import CAUSAL_LM, Task
from adapt_pruner.data.feed import Feed
from adapt_pruner.evaluate.task_sources import Wanted
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.score.calibrate import Evidence, mean_loss
from adapt_pruner.train.loop import Progress

__all__ = ["Change", "Listener", "Looks", "Reads", "Reduction", "RunState", "Stage", "Work", "reads_text"]

Listener = Callable[[dict[str, Any]], None]
"""Told of every event of a run, as a plain dict with a key `event` (see `core.events`)."""

PHASES = ("score", "repair", "cut", "train", "save", "evaluate", "other")
"""What the seconds of a run are counted to."""


@dataclass(frozen=True)
class Stage:
    """One round of pruning and training.

    Attributes:
        stage: its number, from 1.
        params: parameters that may be left after it.
        iterations: pruning iterations it will take, as far as can be told before.
        calibration_tokens: tokens that those iterations look at.
        tokens: tokens trained on.
        steps: optimiser steps.
    """

    stage: int
    params: int
    iterations: int
    calibration_tokens: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Reads:
    """What a run reads beside the model.

    Attributes:
        calibration: number of the iteration -> its batches, int64 [batch, length]; none where nothing looks at them.
        own: batches of what the model itself wrote, which a repair reads beside those.
        feed: the training text on its way; None where nothing is to be trained.
        ends: the row of the feed that each stage ends before.
        digests: fingerprints, by what a person calls the text: of training text all rows and their order, of calibration text
            the first batches.
        held_out: evaluation windows; empty where nothing is to be evaluated.
        held_out_bytes: of the text that they predict.
        teacher: the model to distil from; None where the objective has none.
        tasks: scored at the start and the end, on the main process alone.
    """

    calibration: Callable[[int], list[Tensor]] = lambda iteration: []
    own: list[Tensor] = field(default_factory=list)
    feed: Feed | None = None
    ends: list[int] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    held_out: list[Tensor] = field(default_factory=list)
    held_out_bytes: int = 0
    teacher: Any = None
    tasks: list[Wanted] = field(default_factory=list)


@dataclass
class RunState:
    """What a run has done so far: with weights, moments and text, everything that decides what it does next.

    Attributes:
        stage: the stage it is in, from 1.
        pruned: whether the reduction of that stage is done, and what is left of it is training.
        progress: of training, over all stages; the row it names is the position in the text.
        mask: what has stayed, against the model at the start of the run.
        reduction: what the reduction carries from one step to the next (see `Reduction.state`); plain data.
        feed: what the feed carries (see `data.feed.Feed.state`); plain data.
        figures: measured so far.
        history: a note on every iteration of pruning.
        began: axis name -> units the model had when the run began.
        spent: seconds by phase, of all processes that have worked on the run one after another; phases do not overlap.

    Calibration text needs no more than the number of the iteration, random numbers no more than that of the step: both are
    functions of these and the seed.
    """

    stage: int = 1
    pruned: bool = False
    progress: Progress = field(default_factory=Progress)
    mask: Mask = field(default_factory=Mask)
    reduction: dict[str, Any] = field(default_factory=dict)
    feed: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    began: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _phase: str | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count the seconds inside to a phase, in place; the phase around it goes on afterwards. Free memory is given back."""
        around = self._turn_to(phase)
        try:
            yield
        finally:
            give_back()
            self._turn_to(around)

    @property
    def seconds(self) -> float:
        """Seconds of all phases together, up to now."""
        self._turn_to(self._phase)
        return sum(self.spent.values())

    def _turn_to(self, phase: str | None) -> str | None:
        now, before = time.perf_counter(), self._phase
        if before is not None:
            self.spent[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    @property
    def layers_left(self) -> list[int] | None:
        """The numbers, in the model at the start, of the layers that are left; None where none has gone."""
        return self.mask["layers"].nonzero().flatten().tolist() if "layers" in self.mask else None

    def to_json(self) -> dict[str, Any]:
        """As plain data; floats come back as they were."""
        self._turn_to(self._phase)
        return {
            "stage": self.stage, "pruned": self.pruned, "progress": asdict(self.progress), "mask": self.mask.to_json(),
            "reduction": self.reduction, "feed": self.feed, "figures": self.figures, "history": self.history,
            "began": self.began, "spent": self.spent,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunState":
        """What `to_json` wrote, here or in an older version, which carried `debt` alone; other keys are not looked at."""
        progress = dict(data["progress"])
        progress["lowest"] = float("inf") if progress["lowest"] is None else progress["lowest"]
        return cls(
            data["stage"], data["pruned"], Progress(**progress), Mask.from_json(data["mask"]),
            data["reduction"] if "reduction" in data else {"stage": 0, "debt": data["debt"]},
            data.get("feed", {"rows": progress["rows"]}), data["figures"], data["history"], data.get("began", {}), data["spent"],
        )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One step of a reduction.

    Attributes:
        mask: what stays, against the model as it is now; None where the reduction has changed the model itself.
        loss: on the calibration text before it, nats per token; NaN where no text was run.
        told: what the event `cut` says beside this: sizes, distances, scores, … (see `core.events.Cut`).
    """

    mask: Mask | None
    loss: float = float("nan")
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Looks:
    """What a reduction looks at, from which a dry run foresees memory and time.

    Attributes:
        text: whether it reads the calibration text.
        evidence: the most that it needs to see of the model in one pass over that text.
        forward: whether it also takes passes of its own without gradients.
        streams: whether it also takes gradients of what flows, of every second sequence.
        beside: what takes time that is not foretold, in words.
    """

    text: bool = False
    evidence: Evidence = Evidence.WEIGHTS
    forward: bool = False
    streams: bool = False
    beside: tuple[str, ...] = ()


class Reduction:
    """A way from the model as it is to a stage's budget. One class a file of `reduce/`, which says `@part("reduce")`.

    Its name in a recipe is that of its file. Keyword arguments of its `__init__` are options. One object serves a whole run.
    """

    def check(self, work: "Work") -> None:
        """Refuse what the recipe asks for and this way cannot do, before any work is done.

        Raises:
            UsageError: there is such a thing.
        """

    def floor(self, work: "Work") -> tuple[int, str]:
        """The fewest parameters that it can leave of `work.model`, and when that is: `… stay when WORDS`."""
        raise NotImplementedError

    def num_steps(self, work: "Work", *, start: int, reached: int, target: int) -> int:
        """The steps that it will take from `reached` parameters to `target`, as far as can be told; `start` is where the run began."""
        return int(reached > target)

    def looks(self, work: "Work") -> Looks:
        """What it looks at."""
        return Looks()

    def steps(self, work: "Work", target: int) -> Iterator[Change]:
        """Yield each step on the way to `target` parameters; the caller carries it out before it asks for the next.

        Nothing is yielded where the model is small enough already. A run that was killed begins again with the model after the
        last change that a checkpoint has, and with `state` as it was when that was yielded. So state is brought up to date before
        the `yield`.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside the model, as plain data."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on, in place, from what `state` gave."""

    def fit(self, work: "Work") -> None:
        """Fit, in place, a recipe that was changed on the way."""


@dataclass
class Work:
    """The one object of a run.

    Attributes:
        loaded: the model as it is now, its tokenizer, and what the model was at the start.
        recipe: everything that was asked for.
        listen: told of every event.
        trust_remote_code: whether code that comes with a model may run.
        state: what the run has done so far.
        reads: what it reads beside the model.
        stages: its rounds of pruning and training.
        budget: parameters to be left, of those at the start.
        optimizer: over all weights, for `cut` to keep in step; None where nothing is trained, or low-rank additions.
        dense: parameters of the model that the run began with, before tokens went.
        task: what the model learns.
    """

    loaded: Loaded
    recipe: Recipe
    listen: Listener = lambda event: None
    trust_remote_code: bool = False
    state: RunState = field(default_factory=RunState)
    reads: Reads = field(default_factory=Reads)
    stages: list[Stage] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(keep=0, total=0))
    optimizer: Optimizer | None = None
    dense: int = 0
    task: Task = CAUSAL_LM
    _axes: tuple[Axis, ...] | None = field(default=None, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.reduction: Reduction = parts.bind("reduce", self.recipe.reduce)()

    @classmethod
    def of(cls, model: Any, recipe: Recipe) -> "Work":
        """Work on a model alone, for arithmetic and plans: without a tokenizer, and maybe without weights."""
        return cls(Loaded(model, None, torch.float32, None, None, recipe.model, 0), recipe, dense=count_parameters(model))

    @property
    def model(self) -> Any:
        """The model as it is now."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis of the model, worked out once after each change."""
        if self._axes is None:
            self._axes = families.axes(self.model)
        return self._axes

    @property
    def num_params(self) -> int:
        """Parameters of the model now."""
        return count_parameters(self.model)

    @property
    def iteration(self) -> int:
        """The number of the next step of pruning, from 1, counted over all stages."""
        return len(self.state.history) + 1

    def batches(self) -> list[Tensor]:
        """The calibration batches of the next step, int64 [batch, length]; their tokens are counted among the figures."""
        found = self.reads.calibration(self.iteration)
        figures = self.state.figures
        figures["calibration_tokens"] = figures.get("calibration_tokens", 0) + sum(batch.numel() for batch in found)
        return found

    def loss(self, gates: Mask | Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """Mean loss of the model over `batches` with its units shut as a mask or gates say, nats per token; the model is left as found."""
        with gated(self.model, self.axes, gates):
            return mean_loss(self.model, batches, task=self.task, dtype=self.recipe.dtype)

    def apply(self, change: Change) -> None:
        """Carry out, in place, a step of the reduction: model, optimiser, mask, history and axes follow."""
        self._axes = None  # a repair may have added biases
        if change.mask is not None:
            self.shrink(change.mask)
        where = {"stage": self.state.stage, "iteration": self.iteration}
        target = self.stages[self.state.stage - 1].params
        note = {**where, "params": self.num_params, "target": target, "loss": change.loss}
        self.state.history.append(note)

    def shrink(self, mask: Mask) -> None:
        """Cut the model, in place; the optimiser, the mask of the run and the axes follow."""
        cut(self.model, self.axes, mask, optimizer=self.optimizer)
        self._axes = None
        self.state.mask = self.state.mask.then(mask, self.axes)

    def tell(self, event: Event) -> None:
        """Tell the listener of an event."""
        self.listen(event.told())

    def progress(self, phase: str, **where: Any) -> Callable[[int, int], None]:
        """What tells the listener how far a phase is, called with (done, of)."""
        return lambda done, of: self.tell(events.Progress(phase=phase, done=done, of=of, **where))

    def warn(self, message: str) -> None:
        """Tell the listener of a warning."""
        self.tell(Warned(message=message))

    def warn_of_stage(self, message: str) -> None:
        """Warn once a stage, however many steps it has and whatever figures they put into the sentence."""
        if (words := re.sub(r"\d[\d.,]*", "", message)) not in self._said:
            self._said.add(words)
            self.warn(f"stage {self.state.stage}: {message}")

    def begin_stage(self) -> None:
        """Let warnings of a stage be said anew, in place."""
        self._said.clear()


def reads_text(work: Work) -> bool:
    """Whether anything that the reduction does looks at the calibration text."""
    return work.reduction.looks(work).text
