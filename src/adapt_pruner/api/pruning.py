"""`prune`, `run` and `shrink`: make a smaller model out of a larger one, in one call each."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from adapt_pruner import recipe as recipes
from adapt_pruner.api.arguments import (
    Count,
    Keeper,
    Model,
    Place,
    Settings,
    Size,
    Spec,
    Takes,
    Text,
    as_overrides,
    heard,
    in_python,
    named,
)
from adapt_pruner.api.result import Result
from adapt_pruner.core.events import Listener
from adapt_pruner.core.system.files import expanded
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe.prune_recipe import to_prune

__all__ = ["prune", "run", "shrink"]

Latency = Annotated[str, Takes('a share of the dense model\'s time such as "0.7x"', "0.7x")]
Sparsity = Annotated[str, Takes('a share of zeros such as "50%", or a pattern such as "2:4"', "50%|2:4")]
Hours = Annotated[float, Takes("a number such as 60", None, float)]
_KEYS = {
    "params": "budget", "text": "calibration.source", "calibration_samples": "calibration.samples",
    "calibration_length": "calibration.length", "calibration_ids": "calibration.ids",
}  # fmt: skip
"""Argument -> the key of a recipe that it sets, where the two have different names."""


@in_python
def prune(
    model: Model | Recipe,
    output: Place | None = None,
    *,
    tokenizer: Any = None,
    params: Size | None = None,
    latency: Latency | None = None,
    latency_of: str | None = None,
    sparsity: Sparsity | None = None,
    method: Annotated[str, Takes("a name from `adapt-pruner methods`")] | None = None,
    text: Text | None = None,
    calibration_samples: Count | None = None,
    calibration_length: Count | None = None,
    calibration_ids: Place | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Result:
    """Prune a model to a number of parameters, or to a speed on this machine, or carry out a recipe.

    A model in memory is left as it is. It is first written to a temporary folder, then treated like any other; this costs its
    size on disk and the seconds to write and read it. Warnings are Python warnings, with `progress` lines, with `listen` events.

    Args:
        model: a folder, .gguf file, hub id or packaged model; a result; a model of transformers with its tokenizer; or a recipe
            (a Recipe, or a file that ends in .yaml), which replaces the arguments from `tokenizer` to `dtype`.
        output: new or empty folder for the checkpoint; without it a temporary one, which lives as long as the result.
        tokenizer: needed only for a model in memory.
        params: parameters to keep: "110M", 110_000_000, "80%" of the model, or "80% of decoder".
        latency: instead of `params`: time that the pruned model may take, as a share of the dense model's, such as "0.7x";
            measured on this machine.
        latency_of: what `latency` times: prefill (reading a prompt, the default) or decode (writing the answer).
        sparsity: instead of `params`, for methods that make zeros (wanda, sparsegpt, fistapruner, magnitude-sparse): the share of
            the weights of linear layers that become zero, "50%", or N of every M that stay, "2:4".
        method: pruning method; `adapt-pruner methods` lists them; adaptive-ls-v1 by default.
        text: text to measure importance on: a SPEC as in docs/data.md, a list of them, or {SPEC: weight}; "self" is
            self-written text, which the model writes first, and is the default; text of your own gives a better model.
        calibration_samples: calibration sequences per iteration; 64 by default.
        calibration_length: tokens per calibration sequence; 128 by default.
        calibration_ids: JSON file with input_ids: calibrate on exactly these tokens instead of a text.
        settings: further keys of a recipe, such as {"multiple_of": 64, "calibration.self_generated": 0}.
        seed: seed of all random draws.
        device: device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        trust_remote_code: run Python code that comes with the model.
        progress: show a bar, in a terminal and in a notebook.
        listen: called with every event, as a plain dict.

    Returns:
        The model, where it lies, and what was measured on the way.

    Raises:
        UsageError: the model, text, size or an argument is not what it should be, or `output` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    from adapt_pruner.report import with_card

    keep, place = _place(output, "model")
    options = {
        "params": params, "latency": latency, "latency_of": latency_of, "sparsity": sparsity, "method": method, "text": _source(text),
        "calibration_samples": calibration_samples, "calibration_length": calibration_length,
        "calibration_ids": None if calibration_ids is None else str(expanded(calibration_ids)), "seed": seed or None,
        "device": None if device == "auto" else device, "dtype": None if dtype == "auto" else dtype,
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if isinstance(model, str | Path) and str(model).endswith(".yaml"):
            model = recipes.read(str(model)).ready()
        if isinstance(model, Recipe):
            others = {"tokenizer": tokenizer, "settings": settings, **options}
            if ignored := [name for name, value in others.items() if value is not None]:
                raise UsageError(
                    f"{' and '.join(ignored)} would be ignored, since a recipe sets everything itself; put it into the recipe"
                )
            recipe = model
        else:
            keys = {_KEYS.get(name, name): value for name, value in options.items() if value is not None}
            overrides = as_overrides(settings)
            recipe = to_prune({"model": stack.enter_context(named(model, tokenizer)), **keys}, overrides=overrides)
        tell = stack.enter_context(heard(listen, progress=progress))

        def noted(event: dict[str, Any]) -> None:
            events.append({"time": time.time(), **event})
            tell(event)

        outcome = with_card.prune(recipe, place, listen=noted, trust_remote_code=trust_remote_code)
    return Result(
        place, recipe, outcome.figures, history=outcome.history, mask=outcome.mask, events=events, trust_remote_code=trust_remote_code, keeper=keep
    )  # fmt: skip


def _source(text: Any) -> str | dict[str, float] | None:
    """A text of an argument as a recipe has it."""
    if text is None:
        return None
    if isinstance(text, str | Path):
        return str(text)
    return {str(spec): text[spec] if isinstance(text, Mapping) else 1.0 for spec in text}


@in_python
def run(
    recipe: Annotated[Recipe | str | Path, Takes("a Recipe, a YAML file or a name")],
    output: Place | None = None,
    *,
    settings: Settings | None = None,
    trust_remote_code: bool = False,
    force_recipe: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Result:
    """Carry out a recipe in a run's folder: prune and train, stage by stage, with checkpoints, a log and a page.

    The same call on the folder of a stopped run continues the run; for a finished run it returns the result.

    Args:
        recipe: a recipe, a YAML file, or the name of a built-in one.
        output: the run's folder, new or of a run; without it a temporary one, which lives as long as the result.
        settings: keys that override those of a file or a built-in recipe, such as {"training.tokens": "1M"}.
        trust_remote_code: run Python code that comes with the model.
        force_recipe: continue with this recipe although the run began with another.
        progress: show a bar, in a terminal and in a notebook.
        listen: called with every event, as a plain dict.

    Raises:
        UsageError: the recipe does not fit the model or the folder; nothing has been changed.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    keep, place = _place(output)
    overrides = as_overrides(settings)
    if not isinstance(recipe, Recipe):
        recipe = recipes.read(str(recipe), overrides=overrides)
    elif overrides:
        raise UsageError("settings would be ignored, since a Recipe sets everything itself; put them into the recipe")
    recipe = recipe.ready()
    with heard(listen, progress=progress) as tell:
        return _ran(recipe, place, keep, tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe)


@in_python
def shrink(
    model: Model,
    output: Place | None = None,
    *,
    tokenizer: Any = None,
    params: Size,
    text: Spec | None = None,
    minutes: Hours | None = None,
    hours: Hours | None = None,
    tokens: Annotated[str | int, Takes('a number such as 2_000_000 or "2M"')] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Result:
    """Make a smaller model in the time that you have: probe this machine, plan what fits, prune and train.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer, which is left as it is.
        output: the run's folder, new or of a run that was stopped; without it a temporary one, which lives as long as the result.
            A stopped run of a model in memory cannot go on, since its recipe names a copy that is gone; save the model first.
        tokenizer: needed only for a model in memory.
        params: parameters to keep: "110M", 110_000_000, "80%" of the model, or "80% of decoder".
        text: your text, for training and calibration: file, folder, glob or hub:NAME; a part is held out to measure on. By default
            Python's language reference.
        minutes: minutes that the whole run may take.
        hours: instead of `minutes`: hours.
        tokens: instead of `minutes`: tokens to train on, such as "2M".
        settings: further keys of a recipe.
        seed: seed of all random draws.
        device: device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        trust_remote_code: run Python code that comes with the model.
        progress: show the plan and a bar.
        listen: called with every event, as a plain dict.

    Raises:
        UsageError: the time is too short or not given, or the model, text, size or folder is not what it should be.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    started = time.perf_counter()
    from adapt_pruner.run.in_time import recipe_in_time
    from adapt_pruner.run.rules import how_long
    from adapt_pruner.run.threads import kept_threads

    long = how_long(minutes, hours, None if tokens is None else str(tokens))
    keep, place = _place(output)
    overrides = as_overrides(settings)
    with kept_threads(), named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        common = {"model": name, "budget": str(params), "seed": seed, "device": device, "dtype": dtype}
        recipe = recipe_in_time(
            common, place, text=None if text is None else str(text), long=long, overrides=overrides, started=started, listen=tell,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return _ran(recipe, place, keep, tell, trust_remote_code=trust_remote_code)


def _ran(
    recipe: Recipe,
    place: Path,
    keep: Keeper | None,
    tell: Listener,
    *,
    trust_remote_code: bool,
    force_recipe: bool = False,
) -> Result:
    from adapt_pruner.report import with_card
    from adapt_pruner.run.folder import figures_of

    outcome = with_card.run(recipe, place, listen=tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe)
    kept: dict[str, Any] = {} if outcome is None else {"history": outcome.history, "mask": outcome.mask}
    figures = figures_of(place) if outcome is None else outcome.figures
    return Result(place / "model", recipe, figures, run_dir=place, trust_remote_code=trust_remote_code, keeper=keep, **kept)


def _place(output: str | Path | None, name: str = "run") -> tuple[Keeper | None, Path]:
    """The path of the result, and the keeper of a temporary folder if it lies in one.

    Raises:
        UsageError: it is missing although several processes work together.
    """
    if output is not None:
        return None, expanded(output)
    from adapt_pruner.core.system import world

    if world.size() > 1:
        raise UsageError("several processes work together and need one shared folder; give output=")
    temporary = Keeper()
    return temporary, Path(temporary.name) / name
