"""The recipe of `shrink`: it fits the user's time, planned after a probe of this machine; a run that goes on keeps its recipe.

docs/shrink.md says which measurement each rule is read off.
"""

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from adapt_pruner import recipe as recipes
from adapt_pruner.core.events import DEFAULT_TEXT, Listener, Progress
from adapt_pruner.core.events.run import PlanLine
from adapt_pruner.core.events.words import compact, counted, millions, span, typed
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system import filenames, world
from adapt_pruner.data.conversations import HELD_OUT
from adapt_pruner.data.fixed import MOST_REPEATS
from adapt_pruner.data.sources import domains, parts_of, written_spec
from adapt_pruner.data.split import specs_of, split_off_heldout
from adapt_pruner.errors import UsageError, option
from adapt_pruner.evaluate.anatomy import decoder_parameters, weight_size
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe.overrides import keys_of
from adapt_pruner.run.conversations import Writing, writing_planned
from adapt_pruner.run.estimate import Speed, operations, shapes
from adapt_pruner.run.folder import check_folder
from adapt_pruner.run.plan import LEAN, most_bytes, phases, seconds, setup_of
from adapt_pruner.run.probe import probed
from adapt_pruner.run.start import placed, stages
from adapt_pruner.run.trackers import check_trackers
from adapt_pruner.work import Work

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
_SUSTAINED = 0.8  # of the speed that the probe and the operations say; a long run is slower
_CALIBRATION_ROW, _TRAINING_ROW, _WINDOW = 128, 256, 512
"""Tokens of a calibration sequence, of a training row, and of a window of held-out text."""
_WINDOWS = (40, 20, 8, 4, 2)
_ANSWERS = 3 * 48 * 50  # three prompts of 48 tokens at most; writing a token takes about as long as reading fifty
_BATCH = 2048  # tokens of a step, if ten fit
_BATCHES = {_BATCH: 10, 1024: 10, 512: 3}  # tokens of a step -> steps that have to fit; the first that does is taken
_RATES = {0.35: 5e-4, 0.5: 1e-3, math.inf: 2e-3}
"""Share of the decoder that goes, below -> learning rate, as a share of the size of a weight."""
_ADDED = 0.2  # the size that counts of additions of low rank, which begin at zero
_AFTERWARDS = 10.0  # seconds for writing the result, its card and its page
_LONGEST = 10**6  # minutes
_ENDLESS = 10**12  # tokens of a text that is never used up


class _TooShortError(UsageError):
    """The time is too short for the smallest plan."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for, and the text.

    Attributes:
        text_tokens: about how many tokens the text to train on has.
        held_out_tokens: about how many tokens its held-out part has; more than any plan reads if it is longer.
        own: whether the user named the text, or the model writes it.
        minutes: minutes that it may take in all; None if `tokens` says how long.
        tokens: tokens to train on; None if `minutes` says how long.
        gone: minutes that the probe has used up.
    """

    text_tokens: int
    held_out_tokens: int
    own: bool
    minutes: float | None = None
    tokens: int | None = None
    gone: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that the run may take from now on; infinite if `tokens` says how long."""
        return math.inf if self.minutes is None else 60 * max(1e-3, self.minutes - self.gone)


@dataclass(frozen=True)
class Choice:
    """What was planned: dotted keys of a recipe with their values, lines that explain them, and the seconds of each part."""

    settings: Mapping[str, Any]
    lines: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Way:
    """A way to prune by `adaptive-ls-v1`: its step, the sequences of 128 tokens read per iteration, and whether it repairs."""

    step: float
    samples: int
    repairs: bool = True


# The most thorough way comes first; the first that fits is taken.
_WAYS = (_Way(0.1, 64), _Way(0.1, 32), _Way(1.0, 64), _Way(1.0, 32), _Way(1.0, 16), _Way(1.0, 16, repairs=False))


@dataclass(frozen=True)
class _Draft:
    """What a way to prune and to train takes.

    Attributes:
        way: how to prune.
        cuts: how many cuts it makes.
        prune: seconds of its cuts.
        window: seconds to read a held-out window, with the dense model, after the cuts and after the training.
        speed: tokens per second of training.
        memory: bytes at its peak.
    """

    way: _Way
    cuts: int
    prune: float
    window: float
    speed: float
    memory: int


def how_long(minutes: float | None, hours: float | None, tokens: str | None) -> tuple[float | None, int | None]:
    """How long the run may take, in minutes or in tokens; the other is None.

    Raises:
        UsageError: none of the three is given, or more than one, or the one is not a valid time.
    """
    given = {"minutes": minutes, "hours": hours, "tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        clash = f"{' and '.join(map(option, named))} all say how long it may take"
        trouble = clash if named else "shrink needs to know how long it may take"
        raise UsageError(f"{trouble}; give one of {option('minutes', 60)}, {option('hours', 1)} and {option('tokens', '2M')}")
    if tokens is not None:
        return None, parse_count(tokens)
    long = float(minutes if minutes is not None else 60 * (hours or 0.0))
    if not 0 < long <= _LONGEST:
        most = _LONGEST // (60 if named[0] == "hours" else 1)
        raise UsageError(f"{option(named[0])} {given[named[0]]:g} is out of range; give {named[0]} above 0 and up to {most:,}")
    return long, None


def recipe_in_time(
    common: Mapping[str, Any],
    out: Path,
    *,
    text: str | None,
    long: tuple[float | None, int | None],
    overrides: Sequence[str] = (),
    started: float,
    listen: Listener,
    trust_remote_code: bool = False,
) -> Recipe:
    """The recipe to run in the folder `out`; the listener is told the plan, line by line, unless a run goes on there.

    Its `about` says what was asked for. The same request goes on with a run that was stopped, and may give it other minutes.

    Args:
        common: `model`, `budget`, `seed`, `device` and `dtype` of the recipe.
        out: the run's folder.
        text: SPEC of the text to train and calibrate on; a part is held out. None for text that the model writes.
        long: minutes that the run may take, or tokens to train on, as `how_long` gives them.
        overrides: further keys, `KEY=VALUE`.
        started: `time.perf_counter()` when the minutes began.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UsageError: the folder holds something else, or a run of another model, size, text, tokens, seed or number format; the
            model or the text cannot be loaded; or the time is too short.
    """
    named = keys_of(overrides)
    if "about" in named:
        raise UsageError(
            f"{option('settings')} about would replace the words by which shrink recognises a run that it continues; leave about out"
        )
    minutes, tokens = long
    spec = DEFAULT_TEXT if text is None else text
    train, held_out = specs_of(spec)
    plain = recipes.read({}, overrides=overrides, values={
        **common, "about": _about(common["budget"], minutes, tokens), "calibration.source": train, "calibration.self_generated": 0, "training.source": train,
        "training.tokens": tokens or 1_000_000, "training.length": _TRAINING_ROW, "evaluation.source": held_out, **({} if minutes is None else {"minutes": minutes}),
    }, shared=True)  # fmt: skip
    plain.fitted(named)
    if (begun := world.on_main(lambda: _begun(out, overrides, plain, listen=listen))) is not None:
        return begun
    check_trackers(plain)
    listen(Progress(phase="read", done=0, of=0))
    parts = split_off_heldout(spec)
    training = plain.training.model_copy(update={"batch_tokens": max(_BATCH, plain.training.length)})
    probe_recipe = _that_fits(plain.model_copy(update={"training": training}), trust_remote_code=trust_remote_code)
    speed, work = probed(probe_recipe, listen=listen, trust_remote_code=trust_remote_code)
    text_tokens, held_out_tokens = parts.tokens(work.tokenizer, length=_TRAINING_ROW)
    own, texts = text is not None, plain.training.written if "training.written" in named else None
    writing = world.agreed(writing_planned(work, text=text, seconds=None if minutes is None else 60 * minutes, texts=texts))
    spent = world.agreed(time.perf_counter() - started) / 60  # the probe counts against the minutes

    def planned_with(writing: Writing) -> Choice:
        wanted = Asked(text_tokens, held_out_tokens, own or bool(writing.texts), minutes, tokens, gone=spent + writing.minutes)
        if own or not writing.texts:
            return planned(speed, work, wanted)
        wanted = replace(
            wanted, text_tokens=_ENDLESS, held_out_tokens=writing.texts // HELD_OUT * _TRAINING_ROW
        )  # read as often as need be
        return planned(speed, replace(work, recipe=_with_texts(work.recipe, *parts_of(writing.base))), wanted)

    def first_in_time() -> tuple[Choice, Writing]:
        *more, least = writing.and_less(asked=texts is not None)
        for enough in more:
            with suppress(_TooShortError):
                return planned_with(enough), enough
        return planned_with(least), least

    choice, writing = world.on_main(first_in_time)
    for line in [*choice.lines, *([writing.line] if writing.line else [])]:
        listen(PlanLine(text=line))
    if overrides:
        listen(PlanLine(text=f"your own settings, which replace those above: {', '.join(overrides)}"))
    settings = {**choice.settings, **writing.settings(train, own=own)}
    if "minutes" in settings:  # of the run, in which the model writes
        settings["minutes"] += writing.minutes
    if "step" in named:  # layers differ by amplitude / step
        settings["amplitude"] = plain.step
    if "method" in named:  # another method has its own step and repair
        settings = {key: value for key, value in settings.items() if key not in ("method", "step", "amplitude", "repair")}
    recipe = recipes.read({}, values={**common, "about": plain.about, **settings}, overrides=overrides, shared=True)
    return recipe.fitted(named)  # another method may not read all that was planned


def _that_fits(recipe: Recipe, *, trust_remote_code: bool) -> Recipe:
    """The recipe, or if it takes more memory than is free, one that trains additions of low rank to weights in bfloat16.

    If neither fits, the probe refuses the recipe.
    """
    _, trouble = placed(recipe, trust_remote_code=trust_remote_code, again=True)
    chosen = recipe.training.weights == "bfloat16" or recipe.training.lora is not None or recipe.parallel == "fsdp"
    if not trouble or chosen or recipe.dtype == "float32":
        return recipe
    lean = recipes.read(recipe.model_dump(mode="json", exclude_unset=True), values=LEAN, shared=True)
    _, still = placed(lean, trust_remote_code=trust_remote_code, again=True)
    return recipe if still else lean


def _with_texts(recipe: Recipe, train: str, held_out: str) -> Recipe:
    training = recipe.training.model_copy(update={"source": train})
    evaluation = recipe.evaluation.model_copy(update={"source": held_out})
    return recipe.model_copy(update={"training": training, "evaluation": evaluation})


def planned(speed: Speed, work: Work, asked: Asked) -> Choice:
    """The plan for a machine, a model and a time or a number of tokens.

    Args:
        speed: of this machine with the model.
        work: the model, and a recipe that names it, its text and its size.
        asked: what the user asked for.

    Raises:
        UsageError: the time is too short for the smallest plan, or the text too short for the time.
    """
    sparse, why, gone = work.weight_mask is not None, "", _share_gone(work)
    if gone >= _DISTIL_FROM:
        why = f"since {gone:.0%} of the decoder goes"
    elif not asked.own:
        why = "since the text is not yours"
    choice, tokens = _planned(speed, work, asked, taught="" if sparse else why)
    readings = tokens / max(1, asked.text_tokens)
    if readings > _ONCE and not (why or sparse):
        if readings <= _ALMOST:
            choice, tokens = _planned(speed, work, asked, once=True, enough=tokens)
        else:
            why = f"since the text would be read {readings:.1f} times without them"
            choice, tokens = _planned(speed, work, asked, taught=why, enough=tokens)
    if tokens > MOST_REPEATS * asked.text_tokens:
        less = f"less time with {option('minutes')}" if asked.tokens is None else f"fewer {option('tokens')}"
        raise UsageError(
            f"the training text {work.recipe.training.source!r} has about {asked.text_tokens:,} tokens, and training on {tokens:,} would read it "
            f"{tokens / max(1, asked.text_tokens):,.0f} times; at most {MOST_REPEATS:,} are allowed, so give a longer {option('text')}, "
            f"or {less}"
        )
    return choice


def _planned(
    speed: Speed, work: Work, asked: Asked, *, taught: str = "", once: bool = False, enough: int | None = None
) -> tuple[Choice, int]:
    """The plan, and the tokens that it expects to train on.

    Args:
        taught: why the dense model teaches, for people; it does if both fit into memory. Empty if it does not.
        once: whether the text is read at most once.
        enough: tokens of a text that would be long enough; None if this plan reads as many.
    """
    free = math.inf if speed.memory is None else speed.memory
    ways = [replace(way, repairs=False) for way in _WAYS[:-1]] if work.weight_mask is not None else _WAYS
    whole = work.loaded.offload == "none"  # else the model cannot lie beside itself
    distilled = bool(taught) and whole and _draft(speed, work, ways[0], distilled=True, again=True).memory <= free
    again = _draft(speed, work, ways[0], distilled=distilled, again=False).memory > free

    @cache
    def draft_of(way: _Way) -> _Draft:
        return _draft(speed, work, way, distilled=distilled, again=again)

    chats = whole and bool(getattr(work.tokenizer, "chat_template", None))
    answering = _ANSWERS * chats / tokens_a_second(speed, work, "read") * (1 + _target(work) / work.num_params)
    silent = answering > _FOR_ANSWERS * asked.left
    answering = 0.0 if silent else answering
    batch, windows, draft, left = _thoroughness(speed, work, asked, answering, ways, draft_of)
    tokens = wanted = _whole(asked.tokens if asked.tokens is not None else left * draft.speed, batch)
    if once:
        tokens = max(batch, asked.text_tokens // batch * batch)
    exactly = once or asked.tokens is not None
    settings = _settings(
        work, draft.way, distilled=distilled, again=again, batch=batch, windows=windows,
        tokens=tokens if exactly else _prepared(tokens, batch, asked),
    ) | {
        "checkpoint_minutes": round(min(10.0, max(1.0, asked.left / 60 / 6)), 1), "keep_checkpoints": 0,
        "training.lr": _rate(work), **({} if asked.minutes is None else {"training.expected": tokens, "minutes": asked.left / 60}),
        **({"evaluation.prompts": []} if silent else {}),
    }  # fmt: skip
    what = f"learning from the dense model's predictions on the text, {taught}" if distilled else "on the text"
    longer = f"a text of {compact(enough or wanted)} tokens would be"
    if once:
        what = f"on one reading of the text, which is a little short; {longer} enough"
    elif enough is not None or tokens > _ONCE * asked.text_tokens:
        often = tokens / max(1, asked.text_tokens)
        what += (f", each about {often:.1f} times" if often > _ONCE else "") + f"; {longer} read once, which is better"
    if taught and not distilled:
        what += "; the dense model, which would teach it, does not fit into memory beside it"
    took = {
        "load": speed.load, "measure": windows * draft.window + answering, "prune": draft.prune, "train": tokens / draft.speed,
    }  # fmt: skip
    if work.recipe.training.lora is not None:
        what += f"; additions of rank {work.recipe.training.lora.rank} to weights in bfloat16, since memory has no room for more"
    away = {"none": "", "cpu": ", as stored in memory", "disk": ", from disk"}[work.loaded.offload]
    not_own = f" (Python's language reference, which teaches little beyond Python; name your own with {option('text')})"
    when = f"takes about {span(sum(took.values()))}" if asked.minutes is None else f"ends within {span(asked.left)}"
    lines = (
        f"machine: {speed.words}; with this model it reads {tokens_a_second(speed, work, 'read'):,.0f} tokens a second and trains on "
        f"{tokens_a_second(speed, work, 'train'):,.0f}",
        f"prune: {millions(work.num_params)} → {millions(_target(work))} parameters by adaptive-ls-v1{away}, about {counted(draft.cuts, 'cut')}, each "
        f"reading {draft.way.samples} × {_CALIBRATION_ROW} tokens: about {span(took['prune'])}",
        f"train: about {compact(tokens)} tokens in steps of {batch:,} at a learning rate of {settings['training.lr']:g}, {what}: about "
        f"{span(took['train'])}",
        f"text: {work.recipe.training.source}{'' if asked.own else not_own}; held out and measured: {windows} windows of {work.recipe.evaluation.source}",
        f"it {when}; a checkpoint every {settings['checkpoint_minutes']:g} min; Ctrl-C keeps the newest checkpoint, and the "
        "same command continues",
    )  # fmt: skip
    return Choice(settings, lines, took), tokens


def _settings(
    work: Work, way: _Way, *, distilled: bool, again: bool, batch: int = _BATCH, windows: int = 1, tokens: int = _BATCH
) -> dict[str, Any]:
    """Keys of a recipe that prunes in a way and trains on so many tokens; `again` is gradient checkpointing."""
    longest = getattr(work.model.config, "max_position_embeddings", None) or math.inf
    return {
        "method": "adaptive-ls-v1", "model": work.recipe.model, "budget": str(_target(work)), "stages": 1, "step": way.step,
        "amplitude": way.step,  # as in the method: layers give from nothing to twice the mean
        **({} if way.repairs else {"repair": None}),
        "calibration.source": work.recipe.training.source, "calibration.samples": way.samples, "calibration.self_generated": 0,
        "calibration.length": min(_CALIBRATION_ROW, longest),
        "training.source": work.recipe.training.source, "training.tokens": tokens, "training.batch_tokens": batch,
        "training.length": min(_TRAINING_ROW, longest),
        "training.objective": "objectives.distil(temperature=1)" if distilled else "objectives.lm",
        "training.gradient_checkpointing": again, **(LEAN if work.recipe.training.lora is not None else {}),
        **({} if work.loaded.offload == "none" else {"offload": work.loaded.offload}),
        "evaluation.source": work.recipe.evaluation.source, "evaluation.window": min(_WINDOW, longest), "evaluation.max_windows": windows,
    }  # fmt: skip


def _draft(speed: Speed, work: Work, way: _Way, *, distilled: bool, again: bool) -> _Draft:
    """What a run that prunes in this way takes on a machine."""
    recipe = recipes.read({}, values=_settings(work, way, distilled=distilled, again=again))
    work = replace(work, recipe=recipe)
    work.stages, how = stages(work, start=work.num_params, end=_target(work)), setup_of(work)
    took: dict[str, float] = {}
    for (_, phase), phase_seconds in seconds(work, how, speed, phases(work, how, begun=True)).items():
        took[phase] = took.get(phase, 0.0) + phase_seconds
    window, train = took.pop("evaluate"), took.pop("train")
    return _Draft(
        way,
        work.stages[0].iterations,
        sum(took.values()),
        window,
        _SUSTAINED * recipe.training.tokens / train,
        most_bytes(work, how),
    )


def _thoroughness(
    speed: Speed, work: Work, asked: Asked, answering: float, ways: Sequence[_Way], draft_of: Callable[[_Way], _Draft]
) -> tuple[int, int, _Draft, float]:
    """Tokens of a step, windows to measure, how to prune, and seconds left for training: the first choice that fits the time.

    Raises:
        _TooShortError: even the smallest choice takes longer.
    """
    total = asked.left
    usual = _settings(work, ways[0], distilled=False, again=False)
    there = max(1, asked.held_out_tokens // usual["evaluation.window"])
    at_least = usual["training.length"] * world.size()  # a row for each process
    for (batch, fewest), most, way in product(_BATCHES.items(), _WINDOWS, ways):
        batch = -(-batch // at_least) * at_least
        windows, draft = min(most, there), draft_of(way)
        measuring, least = windows * draft.window, fewest * batch / draft.speed
        left = (1 - _SPARE) * total - speed.load - _AFTERWARDS - measuring - answering - draft.prune
        barest = most in _WINDOWS[-2:] and way is ways[-1]
        if left >= least and (barest or (measuring <= _FOR_MEASURING * total and draft.prune <= _FOR_PRUNING * total)):
            return batch, windows, draft, left
    needed = ((total * (1 - _SPARE) - left + least) / (1 - _SPARE)) / 60 + asked.gone
    needed = math.ceil(needed) if needed > 10 else math.ceil(10 * needed) / 10
    raise _TooShortError(
        f"{asked.minutes:g} minutes are too few: to measure this machine, load {work.recipe.model}, prune it in one cut, train "
        f"{fewest} steps and measure it takes about {needed:g} minutes here; give at least that many"
    )


def _target(work: Work) -> int:
    return min(work.budget.keep, work.num_params)


def _share_gone(work: Work) -> float:
    """The share of the decoder that goes."""
    return (work.num_params - _target(work)) / decoder_parameters(work.model)


def _rate(work: Work) -> float:
    """The learning rate: higher the more goes, and the larger the weights are, since Adam moves each by about the rate."""
    size = weight_size(work.model) if work.recipe.training.lora is None else _ADDED
    rate = size * next(rate for most, rate in _RATES.items() if _share_gone(work) < most)
    return float(f"{rate:.1e}")


def tokens_a_second(speed: Speed, work: Work, phase: Literal["read", "score", "train"]) -> float:
    """Tokens per second of the model as it is, in a phase."""
    how = replace(setup_of(work), checkpointing=False, teacher=None, lora=0)
    return speed.of(phase).flops / operations(shapes(work.model), how, kind=phase)


def _prepared(expected: int, batch: int, asked: Asked) -> int:
    """Tokens to prepare for a run that a deadline ends. They are no more than the text has if it is read as often as allowed."""
    more = max(_MORE * expected, min(_MOST_MORE * expected, _whole(_EASILY, batch)))
    return max(expected, min(more, _whole(_SURELY * MOST_REPEATS * asked.text_tokens, batch)))


def _whole(tokens: float, batch: int) -> int:
    return max(1, round(tokens / batch)) * batch


def _about(size: str, minutes: float | None, tokens: int | None) -> str:
    """The command that asks for the run: it tells people what the recipe is, and the same request is recognised by it."""
    size = size if "%" in size else str(parse_count(size))
    long = ("--tokens", str(tokens)) if minutes is None else ("--minutes", f"{minutes:.15g}")
    return shlex.join(["shrink", "--params", size, *long])


def _options(about: str) -> dict[str, str]:
    """The options in a recipe's `about`; none if `shrink` did not write it."""
    with suppress(ValueError):  # somebody edited it
        command, *words = shlex.split(about)
        return dict(zip(words[::2], words[1::2], strict=True)) if command == "shrink" else {}
    return {}


def _text_of(recipe: Recipe) -> str:
    """The text that the user named; empty if `shrink` took another."""
    specs = domains(recipe.training.source or DEFAULT_TEXT)
    return ", ".join(spec for spec in specs if written_spec(spec) is None and spec != DEFAULT_TEXT)


def _begun(out: Path, overrides: Sequence[str], plain: Recipe, *, listen: Listener) -> Recipe | None:
    """The recipe of the run that was begun in this folder, with `overrides` and the minutes asked for; None if no run was begun.

    Raises:
        UsageError: that run has another model, size, text, tokens, seed or number format, or the folder holds something else.
    """
    if not (out / filenames.RECIPE).exists():
        check_folder(out, plain, force=False)  # before the probe
        return None
    recipe = recipes.read(str(out / filenames.RECIPE), overrides=overrides)
    before, now = _options(recipe.about), _options(plain.about)
    if not before:
        raise UsageError(
            f"the run in {out} was not started by shrink; name another folder, or continue it with: "
            f"`{typed('run', out / 'recipe.yaml', '-o', out)}`"
        )
    others = {
        "MODEL": (recipe.model, plain.model), "--text": (_text_of(recipe), _text_of(plain)),
        "--params": (before.get("--params"), now["--params"]), "--tokens": (before.get("--tokens"), now.get("--tokens")),
        "--seed": (recipe.seed, plain.seed), "--dtype": (recipe.dtype, plain.dtype),
    }  # fmt: skip
    if wrong := [f"{name} ({there}, not {here})" for name, (there, here) in others.items() if there != here]:
        raise UsageError(
            f"{out} was started with another {' and another '.join(wrong)}; name another folder, or give what it was started with"
        )
    if changed := recipes.differing(recipes.read(str(out / filenames.RECIPE)), recipe):
        again = [word for override in overrides for word in ("--set", override)]
        raise UsageError(
            f"{out} was started with another {' and another '.join(changed)}; name another folder, or continue with the new one by: "
            f"`{typed('run', out / 'recipe.yaml', '-o', out, *again, '--force-recipe')}`"
        )
    recipe = recipe.model_copy(update={"device": plain.device})
    minutes, more = float(before.get("--minutes", 0)), float(now.get("--minutes", 0))
    if not (minutes and more and recipe.minutes) or minutes == more or (out / filenames.RESULT).is_dir():
        return recipe
    listen(PlanLine(text=(
        f"the run may now take {more:g} minutes instead of {minutes:g}; training ends earlier if it has read all "
        f"{compact(recipe.training.tokens)} tokens that were prepared"
    )))  # fmt: skip
    more = recipe.minutes + more - minutes  # the recipe's minutes are fewer than were asked for, by those of the probe
    return recipe.model_copy(update={"minutes": max(1e-3, more), "about": plain.about})
