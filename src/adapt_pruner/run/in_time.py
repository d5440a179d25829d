"""The recipe of `shrink`: it fits the user's time, planned after a probe of this machine; a run that goes on keeps its recipe."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner import recipe as recipes
from adapt_pruner.core.events import DEFAULT_TEXT, Listener, PlanLine, Progress
from adapt_pruner.core.events.words import compact, typed
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system import world
from adapt_pruner.data.conversations import HELD_OUT
from adapt_pruner.data.fixed import MOST_REPEATS
from adapt_pruner.data.sources import domains, parts_of, written_spec
from adapt_pruner.data.split import specs_of, split_off_heldout
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe.overrides import keys_of
from adapt_pruner.run.conversations import writing_planned
from adapt_pruner.run.folder import check_folder
from adapt_pruner.run.probe import probed
from adapt_pruner.run.rules import TRAINING_ROW, Asked, planned
from adapt_pruner.run.trackers import check_trackers

__all__ = ["recipe_in_time"]

_ENDLESS = 10**12  # tokens of a text that is never used up
_ASKED = re.compile(r"shrink to (.+?)(?: in ([\d.e+]+) minutes)?")
"""An `about` as `_about` writes it."""


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
        long: minutes that the run may take, or tokens to train on, as `run.rules.how_long` gives them.
        overrides: further keys, `KEY=VALUE`.
        started: `time.perf_counter()` when the minutes began.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UsageError: the folder holds something else, or a run of another model, size, text, tokens, seed or number format; the
            model or the text cannot be loaded; the time is too short; or several processes were started.
    """
    world.check_alone("shrink")
    named = keys_of(overrides)
    if "about" in named:
        raise UsageError(
            "--set about would replace the words by which shrink recognises a run that it continues; leave about out"
        )
    minutes, tokens = long
    spec = DEFAULT_TEXT if text is None else text
    train, held_out = specs_of(spec)
    asked = _about(common["budget"], minutes, tokens)
    plain = recipes.read({}, overrides=overrides, values={
        **common, "about": asked, "calibration.source": train, "training.source": train,
        "training.tokens": tokens or 1_000_000, "training.length": TRAINING_ROW, "evaluation.source": held_out, **({} if minutes is None else {"minutes": minutes}),
    }, shared=True)  # fmt: skip
    plain.fitted(named)
    if (begun := _begun(out, overrides, plain, asked=asked, listen=listen)) is not None:
        return begun
    check_trackers(plain)
    listen(Progress(phase="read", done=0, of=0).to_dict())
    parts = split_off_heldout(spec)
    machine, its, work = probed(plain, listen=listen, trust_remote_code=trust_remote_code)
    tokens_of, own = parts.tokens(work.tokenizer, length=TRAINING_ROW), text is not None
    seconds = None if minutes is None else 60 * minutes
    asked_texts = plain.training.written if "training.written" in named else None
    writing = writing_planned(work, text=text, seconds=seconds, texts=asked_texts)
    if writing.texts and not own:  # what it writes is read as often as need be
        train, held_out = parts_of(writing.base)
        tokens_of = (_ENDLESS, writing.texts // HELD_OUT * TRAINING_ROW)
    del work
    spent = (time.perf_counter() - started) / 60  # the probe counts against the minutes
    writes = (writing.seconds + writing.answering) / 60
    wanted = Asked(train, held_out, *tokens_of, own or bool(writing.texts), MOST_REPEATS, minutes, tokens, gone=spent + writes)
    plan = planned(machine, its, wanted)
    for line in [*plan.lines, *([writing.line] if writing.line else [])]:
        listen(PlanLine(text=line).to_dict())
    if overrides:
        listen(PlanLine(text=f"your own settings, which replace those above: {', '.join(overrides)}").to_dict())
    settings = {**plan.settings, **writing.settings(train, own=own)}
    if "minutes" in settings:  # of the run, in which the model writes
        settings["minutes"] += writes
    if "step" in named:  # layers differ by amplitude / step
        settings["amplitude"] = plain.step
    if "method" in named:  # another method has its own step and repair
        settings = {key: value for key, value in settings.items() if key not in ("method", "step", "amplitude", "repair")}
    recipe = recipes.read({}, values={**common, "about": plain.about, **settings}, overrides=overrides, shared=True)
    return recipe.fitted(named)  # another method may not read all that was planned


def _about(size: str, minutes: float | None, tokens: int | None) -> str:
    """What was asked for, in the recipe for people, and for the same request to be recognised by."""
    asked = size if "%" in size else f"{parse_count(size):,}"
    return f"shrink to {asked}" + (f" in {minutes:g} minutes" if tokens is None else f" by training on {tokens:,} tokens")


def _text_of(recipe: Recipe) -> str:
    """The text that the user named; empty if `shrink` took another."""
    specs = domains(recipe.training.source or DEFAULT_TEXT)
    return ", ".join(spec for spec in specs if written_spec(spec) is None and spec != DEFAULT_TEXT)


def _begun(out: Path, overrides: Sequence[str], plain: Recipe, *, asked: str, listen: Listener) -> Recipe | None:
    """The recipe of the run that was begun in this folder, with `overrides` and the minutes asked for; None if no run was begun.

    Raises:
        UsageError: that run has another model, size, text, tokens, seed or number format, or the folder holds something else.
    """
    if not (out / "recipe.yaml").exists():
        check_folder(out, plain, force=False)  # before the probe
        return None
    recipe = recipes.read(str(out / "recipe.yaml"), overrides=overrides)
    before, now = _ASKED.fullmatch(recipe.about), _ASKED.fullmatch(asked)
    assert now is not None
    if before is None:
        raise UsageError(
            f"the run in {out} was not started by shrink; name another folder, or continue it with: "
            f"`{typed('run', out / 'recipe.yaml', '-o', out)}`"
        )
    others = {
        "MODEL": (recipe.model, plain.model), "--text": (_text_of(recipe), _text_of(plain)),
        "--params or --tokens": (before[1], now[1]), "--seed": (recipe.seed, plain.seed),
        "--dtype": (recipe.dtype, plain.dtype),
    }  # fmt: skip
    if wrong := [f"{name} ({there}, not {here})" for name, (there, here) in others.items() if there != here]:
        raise UsageError(
            f"{out} was started with another {' and another '.join(wrong)}; name another folder, or give what it was started with"
        )
    if changed := recipes.differing(recipes.read(str(out / "recipe.yaml")), recipe):
        again = [word for override in overrides for word in ("--set", override)]
        raise UsageError(
            f"{out} was started with another {' and another '.join(changed)}; name another folder, or continue with the new one by: "
            f"`{typed('run', out / 'recipe.yaml', '-o', out, *again, '--force-recipe')}`"
        )
    recipe = recipe.model_copy(update={"device": plain.device})
    if not (before[2] and now[2] and recipe.minutes) or before[2] == now[2] or (out / "model").is_dir():
        return recipe
    listen(PlanLine(text=(
        f"the run may now take {now[2]} minutes instead of {before[2]}; training ends earlier if it has read all "
        f"{compact(recipe.training.tokens)} tokens that were prepared"
    )).to_dict())  # fmt: skip
    more = float(now[2]) - float(before[2])  # the recipe's minutes are fewer than were asked for, by those of the probe
    return recipe.model_copy(update={"minutes": max(1e-3, recipe.minutes + more), "about": asked})
