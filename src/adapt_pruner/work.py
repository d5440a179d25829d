"""`Work` holds everything of a run; a `Reduction` brings its model to a stage's budget, one `Change` at a time.

All code of a run works on the same `Work`, and `run.loop` takes it through the stages.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.core import events
from adapt_pruner.core.events import BILL, Event, Listener, Warned, counting
from adapt_pruner.core.events.run import Within
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.core.model.feed import Feed
from adapt_pruner.core.model.kinds import first_layers
from adapt_pruner.core.model.weight_mask import WeightMask
from adapt_pruner.core.system import world
from adapt_pruner.core.system.memory import give_back
from adapt_pruner.data.store import Store
from adapt_pruner.data.task import TextTask
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.task_sources import Wanted
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.score.calibrate import Evidence, mean_loss
from adapt_pruner.train.loop import Step, TrainState


def task_for(model: Any, name: str = "causal_lm") -> TextTask:
    """The task of this name; `causal_lm` stands for what the model's family learns.

    Raises:
        UsageError: the model learns something else.
    """
    learns = families.task_of(model.config)
    if name not in ("causal_lm", learns) and learns != "causal_lm":
        raise UsageError(f"a model of type {model.config.model_type!r} learns {learns}, and task is {name!r}; leave task out")
    task: TextTask = parts.bind("task", learns if name == "causal_lm" else name)()
    return task


@dataclass(frozen=True)
class Change:
    """One step of a reduction.

    Attributes:
        mask: the units of the present model that stay; None if the reduction has changed the model itself.
        loss: on the calibration text before the step, nats per token; NaN if no text was run.
        told: further values for the event `cut`: sizes, distances, scores, … (see `core.events.Cut`).
    """

    mask: Mask | None
    loss: float = float("nan")
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """The work of a phase in one iteration, for an estimate of its time.

    Attributes:
        forward: tokens of forward passes.
        both: tokens of forward and backward passes, as in scoring.
        flops: further operations; None if nobody knows how many.
        times: how often the phase runs in a stage; None for once per iteration.
    """

    forward: float = 0.0
    both: float = 0.0
    flops: float | None = 0.0
    times: int | None = None


@dataclass(frozen=True)
class TextUse:
    """What a reduction reads; a dry run computes its memory from it.

    Attributes:
        text: whether the reduction reads the calibration text.
        evidence: the most that it needs from the model in one pass over the text.
        forward: whether it also makes passes without gradients.
        streams: whether it also takes gradients of hidden states, for every second sequence.
    """

    text: bool = False
    evidence: Evidence = Evidence.WEIGHTS
    forward: bool = False
    streams: bool = False


class Reduction:
    """A way to bring a model to a stage's budget: a class with `@part("reduce")`, one per file of `reduce/`.

    A recipe names it by its file. The keyword arguments of its `__init__` are options. One object serves a whole run.

    Attributes:
        fills_zeros: whether it changes or replaces weights, so that the zeros of a sparse model would be lost.
        goes_by_layer: whether all its passes go through one layer after the other, so that the weights of one at a time are enough.
        changes_hidden_states: whether it narrows the residual stream or removes layers beside what the recipe's axes name, so that
            hidden states cannot be compared with the dense model's.
    """

    fills_zeros: ClassVar[bool] = False
    goes_by_layer: bool = False
    changes_hidden_states: bool = False

    def check(self, work: "Work") -> None:
        """Refuse, before any work is done, a recipe that this reduction cannot carry out.

        Raises:
            UsageError: the recipe asks for something that this reduction cannot do.
        """

    def floor(self, work: "Work") -> tuple[int, str]:
        """The fewest parameters that it can leave in `work.model`, and WORDS that complete the sentence `… remain when WORDS`."""
        raise NotImplementedError(f"{type(self).__name__} has no method floor")

    def num_steps(self, work: "Work", *, start: int, reached: int, target: int) -> int:
        """Estimate of the steps from `reached` parameters to `target`, in a run that began with `start` parameters."""
        return int(reached > target)

    def text_use(self, work: "Work") -> TextUse:
        """What this reduction reads."""
        return TextUse()

    def phases(self, work: "Work", target: int) -> dict[str, Passes]:
        """Phase of an iteration (see `core.events.PHASES`) -> its work on the way to `target` parameters; in order."""
        calibration = work.recipe.calibration
        return {"score": Passes(both=calibration.samples * calibration.length)} if self.text_use(work).text else {}

    def steps(self, work: "Work", target: int) -> Iterator[Change | Within]:
        """Yield each step on the way to `target` parameters. The caller carries out a step before it asks for the next.

        A reduction that takes long yields a `Within` now and then: `Searched` if only its state has changed, `Masked` if weights
        have changed, too, `MasksLearnt` if it trains. The run then reports how far it is, and may write a checkpoint.

        Yields nothing if the model is small enough already. A run that was killed continues from a checkpoint: with the model
        after a change, and with `state` as it was when that change was yielded. So bring the state up to date before the
        `yield`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method steps")

    def state(self) -> dict[str, Any]:
        """Everything but the model that the next step depends on, as plain data."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state, in place, to what `state` returned."""

    def fit(self, work: "Work") -> None:
        """Adapt the state, in place, to a recipe or a text that was changed during the run."""


def check_training(work: "Work", way: str, *, masks: bool = False) -> None:
    """Refuse training that does not work with a reduction which changes the model between the steps of its training.

    Args:
        work: the run.
        way: name of the reduction.
        masks: whether it learns masks.

    Raises:
        UsageError: the recipe asks for such training.
    """
    recipe, training = work.recipe, work.recipe.training
    unfit = {
        "training.lora": training.lora is not None,
        "training.compile": training.compile,
        f"training.optimizer {training.optimizer}": training.optimizer != "adamw",  # whose groups of other parameters ascend
        f"training.weights {training.weights}": training.weights != "float32",
        "training.step_in_backward": training.step_in_backward,  # no gradient is left to choose by
        "training.gradient_checkpointing": training.gradient_checkpointing and masks,
        "parallel=fsdp": recipe.parallel == "fsdp",
        "moments=reset": recipe.moments == "reset",  # a run that goes on would forget moments in the middle of its training
    }
    if wrong := [key for key, given in unfit.items() if given]:
        raise UsageError(
            f"reduce {way} does not work with {' and '.join(wrong)}; leave {'it' if len(wrong) == 1 else 'them'} out"
        )


_WIDTHS = ((1024, 64), (256, 32))
"""(neurons, multiple): `multiple_of: auto` is the first multiple for which the narrowest layer has at least these neurons."""

_FOR_CUTS = 0.5  # share of a recipe's minutes after which pruning takes no more small steps


@dataclass(frozen=True)
class Stage:
    """One round of pruning and training.

    Attributes:
        stage: its number, from 1.
        params: most parameters that may be left after the stage.
        iterations: estimate of the pruning iterations that the stage takes.
        calibration_tokens: calibration tokens that these iterations read.
        tokens: training tokens.
        steps: optimiser steps.
    """

    stage: int
    params: int
    iterations: int
    calibration_tokens: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class TrainingSpan:
    """The part of a stage's training in which a reduction works, in rows of the feed.

    Attributes:
        first: the row at which it began.
        stop: the row before which it ends.
        batch_rows: rows of one optimiser step.
    """

    first: int
    stop: int
    batch_rows: int

    def share_read(self, rows: int) -> float:
        """The share of it that is over when `rows` of the feed have been read."""
        return (rows - self.first) / (self.stop - self.first)

    def steps_left(self, rows: int) -> int:
        """Optimiser steps to its end when `rows` of the feed have been read."""
        return -(-(self.stop - rows) // self.batch_rows)


@dataclass(frozen=True)
class RunData:
    """What a run reads beside the model.

    Attributes:
        calibration: number of an iteration -> its batches, int64 [batch, length]; no batches if nothing reads them.
        own: batches that only a repair reads, beside the calibration batches: text that the model wrote, and more of the text.
        feed: gives the training text; None without training.
        ends: for each stage, the number of rows of the feed that are read when it ends.
        digests: what people call the text -> its fingerprint: of training text that of all rows in order, of calibration text
            that of the first batches.
        held_out: evaluation windows; empty without an evaluation.
        held_out_texts: the SPEC of each window's text.
        held_out_bytes: bytes of the text that these windows predict; None if the task counts none.
        teacher: the model to distil from; None if the objective has none.
        held_out_chats: conversations that the dense model wrote and nothing learns from; None if it wrote none.
        has_goals: whether the dense model wrote some of the training text, which is then learnt from its likeliest tokens.
        tasks: tasks to score at the start and the end, on the main process alone.
    """

    calibration: Callable[[int], list[Tensor]] = lambda iteration: []
    own: list[Tensor] = field(default_factory=list)
    feed: Feed | None = None
    ends: list[int] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    held_out: list[Tensor] = field(default_factory=list)
    held_out_texts: list[str] = field(default_factory=list)
    held_out_bytes: int | None = None
    teacher: Any = None
    held_out_chats: Store | None = None
    has_goals: bool = False
    tasks: list[Wanted] = field(default_factory=list)


@dataclass
class RunState:
    """What a run has done so far. With weights, moments and texts, this decides everything that the run does next.

    Attributes:
        stage: number of the current stage, from 1.
        pruned: whether the reduction of this stage is done, so that only its training is left.
        progress: of training, over all stages; its row is the position in the training text.
        mask: the units that stayed, of the model at the start of the run.
        reduction: what the reduction carries from one step to the next (see `Reduction.state`); plain data.
        feed: what the feed carries (see `core.model.feed.Feed.state`); plain data.
        figures: measured so far.
        history: a note on every iteration of pruning.
        began: axis name -> units the model had when the run began.
        spent: phase of `BILL` -> seconds, summed over all sessions of the run; phases do not overlap.

    Calibration text is a function of the seed and the number of the iteration, random numbers of the seed and the number of the
    step. So neither has state of its own.
    """

    stage: int = 1
    pruned: bool = False
    progress: TrainState = field(default_factory=TrainState)
    mask: Mask = field(default_factory=Mask)
    reduction: dict[str, Any] = field(default_factory=dict)
    feed: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    began: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BILL, 0.0))
    _phase: str | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count the seconds of the context to a phase, in place; then the outer phase goes on. Frees unused memory at the end."""
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
        """The layers that are left, by their numbers in the model at the start, all towers in a row; None if no layer is gone."""
        first = first_layers(self.began)
        if len(first) < 2:
            return self.mask.layers_left
        left = {tower: self.mask.of_tower(tower).layers_left for tower in first}
        if all(numbers is None for numbers in left.values()):
            return None
        every = {tower: range(self.began[f"{tower}layers"]) for tower, numbers in left.items() if numbers is None}
        return [begin + number for tower, begin in first.items() for number in every.get(tower) or left[tower] or ()]

    def to_json(self) -> dict[str, Any]:
        """The state as plain data; `from_json` gives back the same floats."""
        self._turn_to(self._phase)
        return {
            "stage": self.stage, "pruned": self.pruned, "progress": asdict(self.progress), "mask": self.mask.to_json(),
            "reduction": self.reduction, "feed": self.feed, "figures": self.figures, "history": self.history,
            "began": self.began, "spent": self.spent,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunState":
        """The state that `to_json` wrote."""
        progress = dict(data["progress"])
        progress["lowest"] = float("inf") if progress["lowest"] is None else progress["lowest"]
        return cls(
            data["stage"], data["pruned"], TrainState(**progress), Mask.from_json(data["mask"]),
            data["reduction"], data["feed"], data["figures"], data["history"], data["began"], data["spent"],
        )  # fmt: skip


@dataclass
class Work:
    """Everything of a run.

    Attributes:
        loaded: the model as it is now, its tokenizer, and facts on the model at the start.
        recipe: all choices of the user.
        listen: told of every event.
        trust_remote_code: whether code that comes with a model may run.
        state: what the run has done so far.
        data: the texts, the teacher and the tasks.
        stages: the rounds of pruning and training.
        budget: parameters at the start, and parameters to keep.
        optimizer: over all weights; `cut` cuts its moments too. None without training, or with LoRA adapters.
        dense_params: parameters of the model at the start, before its vocabulary was cut.
        started: when this session of the run began, by `time.perf_counter`; the model was loaded after that.
        weight_mask: which single weights stay and which are zero; None for a model without such zeros.
        training: trains up to row `until`, step by step (see `run.training.Trainer.train_steps`), for a reduction that needs
            `training`; None as long as no `Trainer` is at work.
        task: what the model learns; see `task_for`.
    """

    loaded: Loaded
    recipe: Recipe
    listen: Listener = lambda event: None
    trust_remote_code: bool = False
    state: RunState = field(default_factory=RunState)
    data: RunData = field(default_factory=RunData)
    stages: list[Stage] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(keep=0, total=0))
    optimizer: Optimizer | None = None
    dense_params: int = 0
    started: float = field(default_factory=time.perf_counter)
    training: Callable[..., Iterator[Step]] | None = None
    weight_mask: WeightMask | None = None
    _axes: tuple[Axis, ...] | None = field(default=None, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._earlier = sum(self.state.spent.values())
        self.reduction: Reduction = parts.bind("reduce", self.recipe.reduce)()
        self.task = task_for(self.model, self.recipe.task)
        self.weight_mask = self.weight_mask or self.loaded.weight_mask

    @classmethod
    def of(cls, model: Any, recipe: Recipe) -> "Work":
        """A `Work` with only a model, for arithmetic and plans: it has no tokenizer and may have no weights."""
        return cls(Loaded(model, None, torch.float32, None, None, recipe.model, 0), recipe, dense_params=count_parameters(model))

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
        """All axes of the model, computed once after each change."""
        if self._axes is None:
            self._axes = families.axes(self.model)
        return self._axes

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken: this session since it `started`, and the phases of earlier ones."""
        return self._earlier + time.perf_counter() - self.started

    @property
    def deadline(self) -> dict[str, Any]:
        """For events: `seconds_left` until the run must end; nothing without a time limit."""
        return {} if self.recipe.minutes is None else {"seconds_left": max(0.0, 60 * self.recipe.minutes - self.elapsed)}

    @property
    def step(self) -> float:
        """The recipe's `step`; 1 once half of its `minutes` are over, training aside: then one cut takes all of a stage."""
        minutes = self.recipe.minutes
        if minutes is None or not world.agreed(self.elapsed - self.state.spent["train"] > _FOR_CUTS * 60 * minutes):
            return self.recipe.step
        if self.recipe.step < 1:
            self.warn_of_stage(
                f"half of the {minutes:g} minutes are over at {self.num_params:,} parameters, so one cut removes all that is "
                "left to remove"
            )
        return 1.0

    @property
    def expected(self) -> int | None:
        """The training tokens that should fit, `training.expected`; None if no `minutes` end the run."""
        return self.recipe.training.expected if self.recipe.minutes is not None else None

    @property
    def multiple_of(self) -> int:
        """The number of which each layer's neurons stay a multiple; `auto` goes by the narrowest layer at the start."""
        multiple_of = self.recipe.multiple_of
        if isinstance(multiple_of, int):
            return multiple_of
        began = self.state.began or families.sizes(self.model)
        narrowest = min((size for name, size in began.items() if name.endswith(".neurons")), default=0)
        return next((multiple for least, multiple in _WIDTHS if narrowest >= least), 1)

    @property
    def pass_tokens(self) -> int | None:
        """Training tokens in one pass, None for what the device gets: of samples that are told apart together, those of a whole step."""
        training = self.recipe.training
        return training.pass_tokens or (training.step_tokens if len(self.task.towers) > 1 else None)

    @property
    def num_params(self) -> int:
        """Parameters of the model now."""
        return count_parameters(self.model)

    @property
    def iteration(self) -> int:
        """Number of the next pruning step, from 1, over all stages."""
        return len(self.state.history) + 1

    def train_new_parameters(self) -> None:
        """Add the parameters that a repair has made, which are biases, to the optimiser, in place, without weight decay.

        They stand in the order of the model, as in a run that goes on: the order decides how weights in bfloat16 are rounded.
        """
        if self.optimizer is not None:
            *others, last = self.optimizer.param_groups
            elsewhere = {id(parameter) for group in others for parameter in group["params"]}
            last["params"] = [parameter for parameter in self.model.parameters() if id(parameter) not in elsewhere]

    def span(self, share: float, *, first: int, steps: int | None = None) -> TrainingSpan:
        """This share, at least one row, of the rows that the stage trains on from row `first` of the feed on.

        With `steps` it ends after so many optimiser steps at the latest.
        """
        end, batch_rows = self.data.ends[self.state.stage - 1], self.recipe.training.batch_rows
        rows = max(1, round((end - first) * share))
        return TrainingSpan(first, min(end, first + (rows if steps is None else min(rows, steps * batch_rows))), batch_rows)

    def batches(self, *, ahead: int = 0) -> list[Tensor]:
        """The calibration batches of the next step, or of `ahead` steps later, int64 [batch, length]; counts their tokens."""
        batches = self.data.calibration(self.iteration + ahead)
        figures = self.state.figures
        figures["calibration_tokens"] = figures.get("calibration_tokens", 0) + sum(batch.numel() for batch in batches)
        return batches

    def loss(self, gates: Mask | Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """Mean loss over `batches` with units shut as a mask or gates say, nats per token; the model is left as found."""
        with gated(self.model, self.axes, gates):
            return mean_loss(self.model, batches, task=self.task, dtype=self.recipe.dtype)

    def apply(self, change: Change) -> None:
        """Carry out a step of the reduction, in place: changes model, optimiser, mask, history and axes."""
        self._axes = None  # a repair may have added biases
        if change.mask is not None:
            self.shrink(change.mask)
        where = {"stage": self.state.stage, "iteration": self.iteration}
        target = self.stages[self.state.stage - 1].params
        note = {**where, "params": self.num_params, "target": target, "loss": change.loss}
        self.state.history.append(note)

    def shrink(self, mask: Mask) -> None:
        """Cut the model, in place, and with it the optimiser, the mask of the run and the axes."""
        if self.weight_mask is None:
            cut(self.model, self.axes, mask, optimizer=self.optimizer)
        else:
            pattern = self.weight_mask.pattern
            self.weight_mask = self.weight_mask.cut(self.model, self.axes, mask, optimizer=self.optimizer)
            if pattern and not self.weight_mask.pattern:
                self.warn(
                    f"the cut keeps the zeros, but the weights that stay no longer follow {pattern}; if an engine relies on the "
                    "pattern, cut first and make zeros in the result"
                )
        self._axes = None
        self.state.mask = self.state.mask.then(mask, self.axes)

    def tell(self, event: Event) -> None:
        """Tell the listener of an event."""
        self.listen(event)

    def progress(self, phase: str, **where: Any) -> Callable[[int, int], None]:
        """Tell the listener that a phase begins; returns a function of (done, of) that tells how far it is."""
        self.begins(phase, **where)
        return self.counts(phase, **where)

    def counts(self, phase: str, **where: Any) -> Callable[[int, int], None]:
        """A function of (done, of) that tells how far a phase is, for a phase that may never begin."""
        return counting(self.listen, phase, **where)

    def begins(self, phase: str, **where: Any) -> None:
        """Tell the listener that a phase begins (see `core.events.PHASES`)."""
        self.tell(events.Progress(phase=phase, done=0, of=0, **where))

    def warn(self, message: str) -> None:
        """Tell the listener of a warning."""
        self.tell(Warned(message=message))

    def warn_of_stage(self, message: str) -> None:
        """Warn once per stage; sentences that differ only in their figures count as one."""
        if (words := re.sub(r"\d[\d.,]*", "", message)) not in self._said:
            self._said.add(words)
            self.warn(f"stage {self.state.stage}: {message}")

    @property
    def reads_text(self) -> bool:
        """Whether the reduction reads the calibration text."""
        return self.reduction.text_use(self).text

    def forget_warnings(self) -> None:
        """Forget, in place, the warnings of the stage before, so that they can be given again."""
        self._said.clear()
