"""The events of a run, one class each: what an event holds, the line that people read, the figures that trackers are told.

Log.jsonl and a listener of the user's get plain dicts (`Event.to_dict`). `parse` turns a dict back into the event, and
`parse_line` a line of a log. Fields that a damaged log may lack have a default. To add an event, write a class, here or in the file that tells
it, and nothing else: everything that shows or keeps events asks the class.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from adapt_pruner.core.events import words
from adapt_pruner.core.events.words import millions
from adapt_pruner.core.system.strict_json import MOST, of_json

Listener = Callable[["Event"], None]
"""Whoever is told of events."""
DEFAULT_TEXT = "python-docs:train"
"""The text used if none is named."""
TOLD_AS = "ADAPT_PRUNER_EVENTS"
"""Name of an environment variable; with the value `json`, a command writes its events to stderr as lines of JSON."""
_BROKEN = 0.5  # share of the decoder's parameters below which an untrained model gives broken answers


class Phase(NamedTuple):
    """A phase of a run.

    Attributes:
        doing: what is being done, for people, with fields of `Progress`.
        bill: its name in the bill of a run's seconds; empty if they count to another phase.
        ease: operations per second on a CPU, relative to reading text.
        told: whether an event of its own says that it is over.
        anywhere: whether it may come anywhere, so that phases before it in a plan need not be over.
    """

    doing: str
    bill: str = ""
    ease: float = 1.0
    told: bool = False
    anywhere: bool = False


PHASES = {
    "read": Phase("reading text", anywhere=True),
    "write": Phase("writing {what}", ease=0.27),
    "score": Phase("scoring", bill="scoring"),
    "heads": Phase("switching heads off one by one"),
    "blocks": Phase("switching blocks off one by one"),
    "choose": Phase("choosing what to remove"),
    "repair": Phase("repairing", bill="repair", ease=0.9),
    "levels": Phase("repairing for each level"),
    "search": Phase("searching"),
    "layers": Phase("making zeros"),
    "cut": Phase("cutting", bill="cutting"),
    "train": Phase("training", bill="training", told=True),
    "save": Phase("writing a checkpoint", bill="saving", told=True, anywhere=True),
    "evaluate": Phase("evaluating", bill="evaluation", told=True),
    "task": Phase("scoring {task}", told=True),
    "time": Phase("timing {what}", anywhere=True),
    "finish": Phase("writing the model"),
}
BILL = {name: phase.bill for name, phase in PHASES.items() if phase.bill} | {"other": "all else"}
"""The phases among which a run's seconds are divided, with their names for people."""


def phase_of(name: str) -> Phase:
    """The phase of this name, which may be that of a user's own part."""
    return PHASES.get(name, Phase(name))


def _whole(value: Any) -> Any:
    """A whole number, which JSON may also have written as 7.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, Field(ge=0, lt=MOST)]
Count = Annotated[Size, BeforeValidator(_whole)]
Seconds = Annotated[float, Field(ge=0, lt=MOST)]


class Split(TypedDict, total=False):
    """Counts of entries of one kind of axis, by score relative to the cut line (see `reduce.choose.cutline`)."""

    kept: list[Count] | None
    removed: list[Count] | None


class _Score(TypedDict):
    task: str
    metric: str
    value: float
    accuracy: bool
    items: Count
    shots: Count


class Score(_Score, total=False):
    """A task's figure (see `evaluate.tasks`)."""

    stderr: float | None
    chance: float | None
    data: Any


class Event(BaseModel):
    """What all events have in common.

    Attributes:
        kind: what a dict of it calls `event`; empty if it is unknown.
        time: Unix seconds, in a log.
        logged: whether log.jsonl keeps events of this kind.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    time: Seconds | None = None
    kind: ClassVar[str] = ""
    logged: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, type["Event"]]] = {}

    def __init_subclass__(cls, kind: str = "", **_: Any) -> None:
        cls.kind = kind
        if kind:
            Event._kinds[kind] = cls

    @property
    def often(self) -> bool:
        """Whether the event comes so often that people see only one now and then."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """What a listener is told: `event` first, then the fields that were set."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {"event": self.kind} | fields | (self.model_extra or {})

    def line(self, begun: str = "dense") -> str:
        """The line for people, empty if there is nothing to say; `begun` names the model at the start (`Start.begun`)."""
        return ""

    def figures(self) -> dict[str, float]:
        """The figures that a tracker is told."""
        return {}

    def _those(self, *names: str) -> dict[str, float]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Other(Event):
    """An event of an unknown kind."""

    model_config = ConfigDict(extra="allow")


class Load(Event, kind="load"):
    """A model is loaded."""

    logged = False
    model: str

    def line(self, begun: str = "dense") -> str:
        return f"loading {self.model}"


class Loaded(Event, kind="loaded"):
    """A model was loaded."""

    logged = False
    model: str
    params: Count
    dequantised: str | None = None
    may_shrink: str | None = None

    def line(self, begun: str = "dense") -> str:
        origin = f", dequantised from {self.dequantised}" if self.dequantised else ""
        checked = f"; {self.may_shrink}" if self.may_shrink else ""
        return f"loaded {self.model}: {millions(self.params)} parameters{origin}{checked}"


class Find(Event, kind="find"):
    """The data of tasks is read from disk or fetched."""

    logged = False
    tasks: str

    def line(self, begun: str = "dense") -> str:
        return f"getting the tasks {self.tasks}"


class Start(Event, kind="start"):
    """A run begins or resumes.

    Attributes:
        method: method of the recipe.
        dequantised: the GGUF file that the weights come from.
        text: the text that importance is measured on; None if nothing is read.
        stages: stages of the whole run.
        params: parameters of the model given to the run, without tokens that had to be removed.
        target: parameters to reach.
        decoder: those of `params` that are in the decoder layers.
        decoder_target: those of `target` that are in the decoder layers, if only the decoder is pruned.
        sparsity: share of the weights that become zero, or their pattern; None if units are removed instead.
        now: parameters at this moment.
        dense: whether the model had all its parameters before the run.
        random: whether the run began with random weights in the shape of the model.
        calibration_tokens: tokens still to be read for scoring.
        training_tokens: training tokens of the whole run; with a deadline, about how many will be read by then.
        trained_tokens: those of them that are done.
        processes: number of processes of the run.
        parallel: how they share the work.
        began: axis name -> units when the run began.
        sizes: axis name -> units now.
        layers_left: numbers, counted in the model at the start, of the layers that are left; None if no layer was removed.
        device: kind of device.
        precision: precision of the matrix products.
        seconds_left: until the run must end, if it has a deadline.
    """

    method: str = ""
    dequantised: str | None = None
    text: str | None = None
    stages: Count = 1
    params: Count | None = None
    target: Count | None = None
    decoder: Count | None = None
    decoder_target: Count | None = None
    sparsity: str | None = None
    now: Count | None = None
    dense: bool | None = None
    random: bool = False
    calibration_tokens: Count = 0
    training_tokens: Count = 0
    trained_tokens: Count = 0
    processes: Count = 1
    parallel: str | None = None
    began: dict[str, Size] | None = None
    sizes: dict[str, Size] | None = None
    layers_left: list[Count] | None = None
    device: str | None = None
    precision: str | None = None
    seconds_left: Seconds | None = None

    @property
    def given(self) -> str:
        """The name for the model given to the run, which may have been pruned before."""
        model = "at the start" if self.dense is False else "dense"
        return "random weights" if self.random else model

    @property
    def begun(self) -> str:
        """The name for the model that the run measures first: it may have lost tokens, or more if the run resumes."""
        whole = "now" not in self.model_fields_set or self.now == self.params
        return self.given if whole else "at the start"

    def line(self, begun: str = "dense") -> str:
        if self.target is None:
            return ""
        share = f", {self.target / self.params:.0%} of all" if self.params else ""
        if self.decoder and self.decoder_target is not None:
            share += f" and {self.decoder_target / self.decoder:.0%} of the decoder's"
        if self.sparsity:
            text = f"making {self.sparsity} zeros in a model of {millions(self.target)} parameters by {self.method}"
        elif self.target == self.params and self.now in (None, self.params):
            text = f"keeping all {millions(self.target)} parameters"
        else:
            text = f"pruning to {millions(self.target)} parameters{share}, by {self.method}"
        if self.text:
            self_written = self.text == "self"
            text += f", calibrated on {'self-written text' if self_written else self.text}"
            if self_written or self.text == DEFAULT_TEXT:
                what = "" if self_written else "Python's language reference; "
                text += f" ({what}text of your own gives a better model: --set calibration.source=FILE)"
        if self.stages > 1:
            text += f" in {self.stages} stages"
        if self.training_tokens:
            about = "about " if self.seconds_left is not None else ""
            text += f", training on {about}{self.training_tokens:,} tokens in all"
            text += f", of which {self.trained_tokens:,} are done" if self.trained_tokens else ""
        if self.processes > 1:
            text += f", on {self.processes} processes ({self.parallel})"
        little = self.decoder and self.decoder_target is not None and self.decoder_target < _BROKEN * self.decoder
        if little and not self.training_tokens:
            text += "; without training, a model with so little of its decoder answers nonsense: train it (adapt-pruner run)"
        return text


class Progress(Event, kind="progress"):
    """How far a long operation is: `done` of `of`. It begins with 0 of 0, and stays there if nothing can be counted.

    `phase` is a key of `PHASES`; `task` names a task, and `what` says what is timed in the phase `time`, and
    which text is written in the phase `write`: the calibration text if it is not set.
    """

    logged = False
    phase: str
    done: Count
    of: Count
    stage: Count | None = None
    iteration: Count | None = None
    task: str | None = None
    what: str | None = None

    @property
    def often(self) -> bool:
        return True

    @property
    def doing(self) -> str:
        """What is being done and how far it is: repairing 12/60."""
        doing = phase_of(self.phase).doing.format(task=self.task, what=self.what or "calibration text")
        return f"{doing} {words.progress(self.done, self.of)}".rstrip()

    @property
    def where(self) -> str:
        """The stage and iteration."""
        parts = {"stage": self.stage, "iteration": self.iteration}
        return ", ".join(f"{name} {number}" for name, number in parts.items() if number)

    def line(self, begun: str = "dense") -> str:
        return f"{self.where}: {self.doing}" if self.where else self.doing


def counting(listen: Listener, phase: str, **where: Any) -> Callable[[int, int], None]:
    """A function of (done, of) that tells how far a phase is."""
    return lambda done, of: listen(Progress(phase=phase, done=done, of=of, **where))


class Cut(Event, kind="cut"):
    """An iteration of pruning is done.

    Attributes:
        stage: counted from 1.
        iteration: its number in the run, counted from 1.
        params: parameters left after it.
        target: parameters to reach in this stage.
        loss: on the calibration text, before the cut; None if no text was run.
        sizes: axis name -> units kept, axes named as before the cut; for a sliced model `width`.
        distances: raw, by layer; None without a distance.
        blocks: raw distances, axis name -> distance, for blocks that may be removed whole.
        layers_left: as in `Start`, after the cut.
        scores: kind of axis -> counts of entries by score relative to the cut line.
        read: calibration tokens so far.
        zeros: masked weights; None if there are none.
        used: name of an axis of experts -> the share of the calibration tokens that went to each expert before the cut.
    """

    stage: Count | None = None
    iteration: Count | None = None
    params: Count
    target: Count | None = None
    loss: float | None = None
    sizes: dict[str, Size] | None = None
    distances: list[float | None] | None = None
    blocks: dict[str, float | None] | None = None
    layers_left: list[Count] | None = None
    scores: dict[str, Split] | None = None
    read: Count | None = None
    zeros: Count | None = None
    used: dict[str, list[float]] | None = None

    def line(self, begun: str = "dense") -> str:
        if self.target is None:
            return ""
        if self.zeros is not None and self.params >= self.target:
            return f"stage {self.stage}: {millions(self.zeros)} of {millions(self.params)} parameters are zero"
        loss = "" if self.loss is None or not math.isfinite(self.loss) else f", calibration loss {self.loss:.3f}"
        return f"stage {self.stage}, iteration {self.iteration}: {millions(self.params)} parameters (target {millions(self.target)}){loss}"

    def figures(self) -> dict[str, float]:
        return self._those("params", "loss")


class Step(Event, kind="step"):
    """Optimiser step `step` of the run is done. `gradient_norm` is before clipping; `tokens` and `peak_bytes` are so far.

    `loss_is` says what the loss is, if it is not the cross-entropy, which is the logarithm of the perplexity.
    """

    stage: Count | None = None
    step: Count | None = None
    tokens: Count
    loss: float | None = None
    loss_is: str | None = None
    lr: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: Count | None = None

    @property
    def often(self) -> bool:
        return True

    @property
    def said_loss(self) -> str:
        """The loss in words for people: loss 0.187 (KL to the dense model)."""
        loss = "loss not a number" if self.loss is None else f"loss {self.loss:.3f}"
        return f"{loss} ({self.loss_is})" if self.loss_is else loss

    @property
    def speed(self) -> str:
        """The tokens per second in words for people."""
        return "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"

    def line(self, begun: str = "dense") -> str:
        if self.lr is None or self.tokens_per_second is None:
            return ""
        return f"stage {self.stage}: training, {self.tokens:,} tokens, {self.said_loss}, lr {self.lr:.2e}, {self.speed}"

    def figures(self) -> dict[str, float]:
        return self._those("loss", "lr", "gradient_norm", "tokens", "tokens_per_second", "peak_bytes")


class Evaluation(Event, kind="evaluation"):
    """The perplexity of held-out text was measured after a stage; stage 0 is the model at the start.

    Other fields are as in `evaluate.perplexity`. JSON has None for an infinite perplexity. If a stage trains, there is also one
    event `after_cuts`, before that training. `used` has for each layer with experts the share of the tokens that went to each.
    """

    stage: Count
    after_cuts: bool = False
    params: Count | None = None
    perplexity: float | None = None
    nll: float | None = None
    tokens: Count | None = None
    windows: Count | None = None
    seconds: Seconds | None = None
    tokens_per_second: float | None = None
    bits_per_byte: float | None = None
    judged: dict[str, float] = Field(default_factory=dict)
    by_text: dict[str, float] = Field(default_factory=dict)
    used: dict[str, list[float]] | None = None

    def line(self, begun: str = "dense") -> str:
        if self.params is None:
            return ""
        value = math.inf if self.perplexity is None else self.perplexity
        judged = "".join(f", {name} {figure:.4g}" for name, figure in self.judged.items())
        whose = _whose(self.stage, begun) + (" after the cuts" if self.after_cuts else "")
        return f"{whose}: perplexity {value:.2f}{judged} on held-out text, {millions(self.params)} parameters"

    def figures(self) -> dict[str, float]:
        if self.after_cuts:
            return {f"{name}_after_cuts": value for name, value in self._those("perplexity").items()}
        return self._those("perplexity", "params") | self.judged | {f"nll/{text}": nll for text, nll in self.by_text.items()}


class Tasks(Event, kind="tasks"):
    """Tasks were scored; `average` and its `stderr` cover those that have an accuracy."""

    stage: Count
    params: Count | None = None
    average: float | None = None
    stderr: float | None = None
    scores: list[Score]

    def line(self, begun: str = "dense") -> str:
        scores = ", ".join(f"{task['task']} {words.score(task['value'], None, share=task['accuracy'])}" for task in self.scores)
        mean = "" if self.average is None else f", average {words.score(self.average, self.stderr, share=True)}"
        return f"{_whose(self.stage, begun)}: {scores}{mean}"

    def figures(self) -> dict[str, float]:
        return self._those("average", "params")


class Saved(Event, kind="saved"):
    """A checkpoint was written; if it has the figures of the whole run, it is the result."""

    model_config = ConfigDict(extra="allow")

    path: str = ""
    stage: Count | None = None

    @property
    def is_result(self) -> bool:
        """Whether this checkpoint is the result of the run."""
        return "params_after" in (self.model_extra or {})

    @property
    def often(self) -> bool:
        return "-step-" in self.path

    def line(self, begun: str = "dense") -> str:
        return "" if self.is_result or not self.path else f"saved {self.path}"


class Warned(Event, kind="warning"):
    """Something that a user should know."""

    message: str

    def line(self, begun: str = "dense") -> str:
        return f"warning: {self.message}"


class Finished(Event, kind="finished"):
    """The requested run was already finished."""

    logged = False
    path: str

    def line(self, begun: str = "dense") -> str:
        return f"this run is finished: {self.path}"


class Interrupted(Event, kind="interrupted"):
    """Somebody stopped the work; `path` is the result if it was already written."""

    logged = False
    message: str
    path: str | None = None

    def line(self, begun: str = "dense") -> str:
        return self.message


def parse(data: Mapping[str, Any]) -> Event | None:
    """The event that a listener was told; None if it is no event, or fields of its kind are missing or have the wrong form."""
    kind = data.get("event")
    try:
        return Event._kinds.get(kind, Other).model_validate(data) if isinstance(kind, str) else None
    except ValidationError:
        return None


def parse_line(line: str | bytes) -> Event | None:
    """The event in a line of a log; None as for `parse`, and also if the line holds NaN or infinity, which JSON does not have."""
    try:
        data = of_json(line)
        json.dumps(data, allow_nan=False)  # refuses what JSON does not have
    except ValueError:
        return None
    return parse(data) if isinstance(data, dict) else None


def _whose(stage: int, begun: str) -> str:
    model = "dense model" if begun == "dense" else begun
    return f"stage {stage}" if stage else model
