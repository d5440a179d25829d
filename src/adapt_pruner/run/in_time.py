"""The recipe of `shrink`: it fits the user's time, planned after a probe of this machine; a run that goes on keeps its recipe."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner import recipe as recipes
from adapt_pruner.core.budget import parse_count
from adapt_pruner.core.events import EVERYWHERE, PlanLine
from adapt_pruner.data.apart import apart
from adapt_pruner.data.sources import texts
from adapt_pruner.errors import UsageError
from adapt_pruner.plan.rules import Asked, planned
from adapt_pruner.recipe import Recipe
from adapt_pruner.reduce.work import Listener
from adapt_pruner.run.folder import check_folder
from adapt_pruner.run.probe import probed

__all__ = ["recipe_in_time"]


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

    Args:
        common: `model`, `budget`, `seed`, `device` and `dtype` of the recipe.
        out: the run's folder.
        text: SPEC of the text to train and calibrate on; a part is held out. None for Python's language reference.
        long: minutes that the run may take, or tokens to train on, as `plan.rules.how_long` gives them.
        overrides: further keys, `KEY=VALUE`.
        started: `time.perf_counter()` when the minutes began.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UsageError: the folder holds something else, or a run of another model, size, text, seed or number format; the model or
            the text cannot be loaded; or the time is too short.
    """
    begun = _begun(out, overrides, common, text=text)
    if begun is not None:
        return begun
    minutes, tokens = long
    train, held_out, characters = apart(text or EVERYWHERE)
    plain = recipes.read({}, values=common, overrides=overrides)
    machine, its, work = probed(plain, listen=listen, trust_remote_code=trust_remote_code)
    text_tokens = characters * _tokens_a_character(work.tokenizer, train)
    del work
    spent = (time.perf_counter() - started) / 60  # the probe counts against the minutes
    left = None if minutes is None else max(1e-3, minutes - spent)
    plan = planned(machine, its, Asked(train, held_out, round(text_tokens), text is not None, left, tokens, gone=spent))
    for line in plan.lines:
        listen(PlanLine(text=line).told())
    return recipes.read({}, values={**common, **plan.settings}, overrides=overrides)


def _tokens_a_character(tokenizer: Any, spec: str) -> float:
    """Tokens per character of a text, measured on the beginning of its first document."""
    sample = next(iter(texts(spec)))[:100_000]
    return len(tokenizer(sample, add_special_tokens=False)["input_ids"]) / len(sample)


def _begun(out: Path, overrides: Sequence[str], common: Mapping[str, Any], *, text: str | None) -> Recipe | None:
    """The recipe of the run that was begun in this folder, with `overrides`; None if no run was begun.

    Raises:
        UsageError: that run has another model, size, text, seed or number format, or the folder holds something else.
    """
    if not (out / "recipe.yaml").exists():
        check_folder(out, recipes.read({}, values=common), force=False)  # before the probe
        return None
    recipe = recipes.read(str(out / "recipe.yaml"), overrides=overrides)
    others = {"MODEL": recipe.model != common["model"], "--text": apart(text or EVERYWHERE)[0] != recipe.training.source}
    params = common["budget"]
    others["--params"] = "%" not in params and str(parse_count(params)) != recipe.budget
    others |= {f"--{key}": common[key] != getattr(recipe, key) for key in ("seed", "dtype")}
    if wrong := [name for name, differs in others.items() if differs]:
        raise UsageError(
            f"{out} was started with another {' and another '.join(wrong)}; name another folder, or give what it was started with"
        )
    return recipe
