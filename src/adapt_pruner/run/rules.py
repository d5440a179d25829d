"""The rules by which `shrink` plans; docs/shrink.md says which measurement each is read off.

`planned` takes what was measured on the machine, the model's sizes and what the user asked for. It returns the settings of a
recipe, five lines that explain them, and the seconds of each phase.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from adapt_pruner.core.events.words import compact, counted, millions, span
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.errors import UsageError
from adapt_pruner.run.plan import beyond

__all__ = [
    "BATCH_TOKENS",
    "CALIBRATION_ROW",
    "TRAINING_ROW",
    "Asked",
    "Machine",
    "Model",
    "Plan",
    "how_long",
    "planned",
]

_FOR_PRUNING = 1 / 3  # of the time, at most
_FOR_ANSWERS = 0.1  # of the time, at most; else no prompts are answered
_FOR_MEASURING = 0.05  # of the time, at most, unless the fewest windows take more
_SPARE = 0.02  # of the time, for what no probe predicts
_MORE, _MOST_MORE, _EASILY = 2, 8, 4_000_000
"""Tokens prepared for each that should fit, so that the text lasts to the deadline even if the probe was too slow: 2, or up to 8 as long as
that makes so many tokens, which takes seconds."""
_SURELY = 0.5  # share of the estimated tokens of a text to rely on: the estimate reads only its beginning
_ONCE = 1.05  # times that a text may be read; above, the model would learn it by heart
_ALMOST = 1.2  # times, up to which a text is read only once instead; above, the dense model's predictions teach
_DISTIL_FROM = 0.35  # share of the decoder that goes; from here on the dense model teaches in any case
_FASTER = 0.6  # a pruned model trains faster by this much of (dense / pruned parameters - 1)
_SUSTAINED = 0.85  # of the speed that the probe and the rule above say; a long run is slower
_REPAIR = 1.4  # seconds of a repair per second of scoring the same text
CALIBRATION_ROW, TRAINING_ROW, _WINDOW = 128, 256, 512
"""Tokens of a calibration sequence, of a training row, and of a window of held-out text."""
_WINDOWS = (40, 20, 8, 4, 2)
_ANSWERS = 3 * 48 * 50  # three prompts of 48 tokens at most; writing a token takes about as long as reading fifty
BATCH_TOKENS = 2048  # tokens of a step, if ten fit
_BATCHES = {BATCH_TOKENS: 10, 1024: 10, 512: 3}  # tokens of a step -> steps that have to fit; the first that does is taken
_RATES = {0.35: 1e-4, 0.5: 2e-4, math.inf: 4e-4}  # share of the decoder that goes, below -> learning rate
_LARGE, _LARGE_RATE = 2e9, 0.5  # above so many parameters the rate is this much of it
_AFTERWARDS = 10.0  # seconds for writing the result, its card and its page
_LONGEST = 10**6  # minutes


@dataclass(frozen=True)
class Machine:
    """What was measured on this machine with the dense model.

    Attributes:
        read: tokens per second of a forward pass.
        scored: tokens per second of scoring by first-order Taylor.
        trained: tokens per second of a training step.
        load: seconds to load the model.
        words: what it is, for people: `2 threads, bfloat16`.
        memory: bytes that are free; None if that is not known.
    """

    read: float
    scored: float
    trained: float
    load: float
    words: str
    memory: int | None = None


@dataclass(frozen=True)
class Model:
    """The model to be pruned.

    Attributes:
        name: as the user gave it.
        params: parameters; tied weights count once.
        decoder: parameters in decoder layers.
        target: parameters that may stay.
        longest: most tokens that the model reads at once; None if its config does not say.
        training: bytes that training takes, without and with gradient checkpointing.
        teacher: bytes that a teacher takes besides.
        instead: commands that make the model smaller without training, the best first, with the bytes that each takes.
        sparse: whether it has a mask over weights. A repair would fill its zeros, and it is not the dense model that could teach.
        chats: whether it answers prompts before and after.
    """

    name: str
    params: int
    decoder: int
    target: int
    longest: int | None = None
    training: tuple[int, int] = (0, 0)
    teacher: int = 0
    instead: tuple[tuple[str, int], ...] = ()
    sparse: bool = False
    chats: bool = False

    @property
    def share(self) -> float:
        """The share of the decoder that goes."""
        return max(0, self.params - self.target) / self.decoder


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        train: SPEC of the text to train and calibrate on.
        held_out: SPEC of the part that is held out.
        text_tokens: about how many tokens `train` has.
        held_out_tokens: about how many tokens `held_out` has; more than any plan reads if it is longer.
        own: whether the user named the text.
        most_repeats: times that the text may be read.
        minutes: minutes that it may take in all; None if `tokens` says how long.
        tokens: tokens to train on; None if `minutes` says how long.
        gone: minutes that the probe has used up.
    """

    train: str
    held_out: str
    text_tokens: int
    held_out_tokens: int
    own: bool
    most_repeats: int
    minutes: float | None = None
    tokens: int | None = None
    gone: float = 0.0

    @property
    def left(self) -> float | None:
        """Minutes that the run may take from now on; None if `tokens` says how long."""
        return None if self.minutes is None else max(1e-3, self.minutes - self.gone)


@dataclass(frozen=True)
class Plan:
    """Dotted keys of a recipe with their values, lines that explain them, and the seconds of each phase."""

    settings: Mapping[str, Any]
    lines: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pruning:
    """A way to prune by `adaptive-ls-v1`: its step, the sequences of 128 tokens read per iteration, and whether it repairs."""

    step: float
    samples: int
    repairs: bool = True

    def iterations(self, model: Model) -> int:
        return 1 if self.step == 1 else math.ceil(model.share / self.step) + 1

    def seconds(self, model: Model, machine: Machine) -> float:
        passes = 1 + _REPAIR * self.repairs
        return self.iterations(model) * passes * self.samples * CALIBRATION_ROW / machine.scored

    def settings(self) -> dict[str, Any]:
        bare = {} if self.repairs else {"repair": None}
        return {
            "method": "adaptive-ls-v1",
            "step": self.step,
            "amplitude": self.step,  # as in the method: layers give from nothing to twice the mean
            "calibration.samples": self.samples,
            "calibration.self_generated": 0,
            **bare,
        }


# The most thorough way comes first; the first that fits is taken.
_WAYS = (
    _Pruning(0.1, 64),
    _Pruning(0.1, 32),
    _Pruning(1.0, 64),
    _Pruning(1.0, 32),
    _Pruning(1.0, 16),
    _Pruning(1.0, 16, repairs=False),
)


def how_long(minutes: float | None, hours: float | None, tokens: str | None) -> tuple[float | None, int | None]:
    """How long the run may take, in minutes or in tokens; the other is None.

    Raises:
        UsageError: none of the three is given, or more than one, or the one is not a valid time.
    """
    given = {"--minutes": minutes, "--hours": hours, "--tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        said = f"{' and '.join(named)} all say how long it may take" if named else "shrink needs to know how long it may take"
        raise UsageError(f"{said}; give one of --minutes 60, --hours 1 and --tokens 2M")
    if tokens is not None:
        return None, parse_count(tokens)
    asked = float(minutes if minutes is not None else 60 * (hours or 0.0))
    if not 0 < asked <= _LONGEST:
        most = _LONGEST // (60 if named[0] == "--hours" else 1)
        raise UsageError(f"{named[0]} {given[named[0]]:g} is out of range; give {named[0][2:]} above 0 and up to {most:,}")
    return asked, None


def planned(machine: Machine, model: Model, asked: Asked) -> Plan:
    """The plan for a machine, a model and a time or a number of tokens.

    Raises:
        UsageError: the time is too short for the smallest plan, the text too short for the time, or the model does not fit into
            memory.
    """
    why = ""
    if model.share >= _DISTIL_FROM:
        why = f"since {model.share:.0%} of the decoder goes"
    elif not asked.own:
        why = "since the text is not yours"
    plan, tokens = _planned(machine, model, asked, taught="" if model.sparse else why)
    readings = tokens / max(1, asked.text_tokens)
    if readings > _ONCE and not (why or model.sparse):
        if readings <= _ALMOST:
            plan, tokens = _planned(machine, model, asked, once=True, enough=tokens)
        else:
            why = f"since the text would be read {readings:.1f} times without them"
            plan, tokens = _planned(machine, model, asked, taught=why, enough=tokens)
    _check_repeats(tokens, asked)
    return plan


def _planned(
    machine: Machine, model: Model, asked: Asked, *, taught: str = "", once: bool = False, enough: int | None = None
) -> tuple[Plan, int]:
    """The plan, and the tokens that it expects to train on.

    Args:
        taught: why the dense model teaches, for people; it does if both fit into memory. Empty if it does not.
        once: whether the text is read at most once.
        enough: tokens of a text that would be long enough; None if this plan reads as many.
    """
    distilled = bool(taught) and (machine.memory is None or model.training[1] + model.teacher <= machine.memory)
    checkpointing = _fitting(machine, model, distilled)
    if checkpointing:
        machine = replace(machine, trained=machine.trained * 3 / 4)  # the forward pass of the layers is made twice
    total = math.inf if asked.left is None else 60 * asked.left
    silent = _answering(model, machine) > _FOR_ANSWERS * total
    model = replace(model, chats=model.chats and not silent)
    speed = _training_speed(machine, model, distilled)
    batch, windows, way, left = _thoroughness(total, model, machine, asked, speed=speed)
    pruning = way.seconds(model, machine)
    tokens = wanted = _whole(asked.tokens if asked.tokens is not None else left * speed, batch)
    if once:
        tokens = max(batch, asked.text_tokens // batch * batch)
    exactly = once or asked.tokens is not None
    settings = {
        **way.settings(), "model": model.name, "budget": str(model.target), "stages": 1,
        "calibration.source": asked.train, "calibration.length": min(CALIBRATION_ROW, model.longest or CALIBRATION_ROW),
        "training.source": asked.train, "training.tokens": tokens if exactly else _prepared(tokens, batch, asked),
        **({} if asked.minutes is None else {"training.expected": tokens}),
        "training.batch_tokens": batch, "training.length": min(TRAINING_ROW, model.longest or TRAINING_ROW),
        "training.lr": _rate(model),
        "training.objective": "objectives.distil(temperature=1)" if distilled else "objectives.lm",
        "training.gradient_checkpointing": checkpointing,
        "evaluation.source": asked.held_out, "evaluation.window": min(_WINDOW, model.longest or _WINDOW),
        "evaluation.max_windows": windows, **({"evaluation.prompts": []} if silent else {}),
        "checkpoint_minutes": _checkpoints(total), "keep_checkpoints": 0,
        **({} if asked.left is None else {"minutes": asked.left}),
    }  # fmt: skip
    seconds = {
        "load": machine.load,
        "measure": _measuring(windows, model, machine) + _answering(model, machine),
        "prune": pruning,
        "train": tokens / speed,
    }
    plan = Plan(settings, (), seconds)
    what = f"learning from the dense model's predictions on the text, {taught}" if distilled else "on the text"
    if once:
        what = (
            f"on one reading of the text, which is a little short; a text of {compact(enough or wanted)} tokens would be enough"
        )
    elif enough is not None or tokens > _ONCE * asked.text_tokens:
        often = tokens / max(1, asked.text_tokens)
        what += f", each about {often:.1f} times" if often > _ONCE else ""
        what += f"; a text of {compact(enough or wanted)} tokens would be read once, which is better"
    lacking = "; the dense model, which would teach it, does not fit into memory beside it" if taught and not distilled else ""
    return replace(plan, lines=_lines(plan, machine, model, asked, way, tokens=tokens, what=what, lacking=lacking)), tokens


def _thoroughness(
    total: float, model: Model, machine: Machine, asked: Asked, *, speed: float
) -> tuple[int, int, _Pruning, float]:
    """Tokens of a step, windows to measure, how to prune, and seconds left for training: the first choice that fits `total` seconds.

    Raises:
        UsageError: even the smallest choice takes longer.
    """
    ways = [replace(way, repairs=False) for way in _WAYS[:-1]] if model.sparse else _WAYS
    there = max(1, asked.held_out_tokens // min(_WINDOW, model.longest or _WINDOW))
    for (batch, fewest), most, way in product(_BATCHES.items(), _WINDOWS, ways):
        windows = min(most, there)
        measuring, pruning = _measuring(windows, model, machine), way.seconds(model, machine)
        left = (1 - _SPARE) * total - machine.load - _AFTERWARDS - measuring - _answering(model, machine) - pruning
        least = fewest * batch / speed
        barest = most in _WINDOWS[-2:] and way is ways[-1]
        if left >= least and (barest or (measuring <= _FOR_MEASURING * total and pruning <= _FOR_PRUNING * total)):
            return batch, windows, way, left
    needed = (total * (1 - _SPARE) - left + least) / (1 - _SPARE)
    raise UsageError(
        f"{asked.minutes:g} minutes are too few: to measure this machine, load {model.name}, prune it in one cut, train "
        f"{fewest} steps and measure it takes about {_minutes_up(needed + 60 * asked.gone):g} minutes here; give at least that many"
    )


def _fitting(machine: Machine, model: Model, distilled: bool) -> bool:
    """Whether the model needs gradient checkpointing to fit into memory.

    Raises:
        UsageError: it does not fit even with checkpointing.
    """
    plain, again = (each + model.teacher * distilled for each in model.training)
    if machine.memory is None or plain <= machine.memory:
        return False
    if trouble := beyond(model.name, "train", needed=again, free=machine.memory, ways=model.instead):
        raise UsageError(trouble)
    return True


def _measuring(windows: int, model: Model, machine: Machine) -> float:
    """Seconds to read the held-out windows: with the dense model, and with the pruned one after the cuts and after training."""
    return windows * _WINDOW / machine.read * (1 + 2 * model.target / model.params)


def _answering(model: Model, machine: Machine) -> float:
    """Seconds in which the dense and the final model answer prompts."""
    return _ANSWERS * model.chats / machine.read * (1 + model.target / model.params)


def _training_speed(machine: Machine, model: Model, distilled: bool) -> float:
    """Tokens per second of training the pruned model; a teacher adds a forward pass of the dense model."""
    student = machine.trained * (1 + _FASTER * (model.params / model.target - 1))
    return _SUSTAINED / (1 / student + (1 / machine.read if distilled else 0))


def _rate(model: Model) -> float:
    """The learning rate for a model that loses so much of its decoder."""
    rate = next(rate for most, rate in _RATES.items() if model.share < most)
    return rate * (_LARGE_RATE if model.params > _LARGE else 1)


def _check_repeats(tokens: int, asked: Asked) -> None:
    """Refuse to train on so many tokens of a text that it would be read too often.

    Raises:
        UsageError: it would be.
    """
    if tokens > asked.most_repeats * asked.text_tokens:
        less = "less time with --minutes" if asked.tokens is None else "fewer --tokens"
        raise UsageError(
            f"the training text {asked.train!r} has about {asked.text_tokens:,} tokens, and training on {tokens:,} would read it "
            f"{tokens / max(1, asked.text_tokens):,.0f} times; at most {asked.most_repeats:,} are allowed, so give a longer --text, "
            f"or {less}"
        )


def _prepared(expected: int, batch: int, asked: Asked) -> int:
    """Tokens to prepare for a run that a deadline ends. They are no more than the text has if it is read as often as allowed."""
    more = max(_MORE * expected, min(_MOST_MORE * expected, _whole(_EASILY, batch)))
    return max(expected, min(more, _whole(_SURELY * asked.most_repeats * asked.text_tokens, batch)))


def _whole(tokens: float, batch: int) -> int:
    return max(1, round(tokens / batch)) * batch


def _checkpoints(total: float) -> float:
    """Minutes between checkpoints: a sixth of the time, at least one and at most ten."""
    return round(min(10.0, max(1.0, total / 60 / 6)), 1)


def _minutes_up(seconds: float) -> float:
    """Minutes, rounded up to a tenth, or to a whole one above ten."""
    minutes = seconds / 60
    return math.ceil(minutes) if minutes > 10 else math.ceil(10 * minutes) / 10


def _lines(
    plan: Plan, machine: Machine, model: Model, asked: Asked, way: _Pruning, *, tokens: float, what: str, lacking: str
) -> tuple[str, ...]:
    """The plan in five lines."""
    settings, seconds = plan.settings, plan.seconds
    cuts = way.iterations(model)
    own = "" if asked.own else " (Python's language reference, which teaches little beyond Python; name your own with --text)"
    when = f"ends within {span(60 * asked.left)}" if asked.left is not None else f"takes about {span(sum(seconds.values()))}"
    return (
        f"machine: {machine.words}; with this model it reads {machine.read:,.0f} tokens a second and trains on "
        f"{machine.trained:,.0f}",
        f"prune: {millions(model.params)} → {millions(model.target)} parameters by adaptive-ls-v1, about {counted(cuts, 'cut')}, each "
        f"reading {way.samples} × {CALIBRATION_ROW} tokens: about {span(seconds['prune'])}",
        f"train: about {compact(tokens)} tokens in steps of {settings['training.batch_tokens']:,} at a learning rate of "
        f"{settings['training.lr']:g}, {what}: about {span(seconds['train'])}{lacking}",
        f"text: {asked.train}{own}; held out and measured: {settings['evaluation.max_windows']} windows of {asked.held_out}",
        f"it {when}; a checkpoint every {settings['checkpoint_minutes']:g} min; Ctrl-C keeps the newest checkpoint, and the "
        "same command continues",
    )  # fmt: skip
