"""`prune`, `run` and `shrink`: make a smaller model out of a larger one, in one call each."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_pruner import recipe as recipes
from adapt_pruner.api.arguments import (
    Keeper,
    Name,
    Saved,
    Spec,
    Text,
    as_count,
    as_overrides,
    as_place,
    as_size,
    as_source,
    as_spec,
    heard,
    in_python,
    named,
    of_kind,
)
from adapt_pruner.api.result import Result
from adapt_pruner.core.events import Listener
from adapt_pruner.core.system import world
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe.prune_recipe import to_prune
from adapt_pruner.report import with_card
from adapt_pruner.run.folder import figures_of
from adapt_pruner.run.in_time import recipe_in_time
from adapt_pruner.run.rules import how_long
from adapt_pruner.run.threads import kept_threads

__all__ = ["prune", "run", "shrink"]


@in_python
def prune(
    model: Name | Saved | Recipe | Any,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    params: str | int | None = None,
    latency: str | None = None,
    latency_of: str | None = None,
    sparsity: str | None = None,
    method: str | None = None,
    text: Text | None = None,
    calibration_samples: int | None = None,
    calibration_length: int | None = None,
    calibration_ids: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
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
        model: a folder, .gguf file, hub id or packaged model; a result; a model of transformers with its tokenizer; or a recipe,
            which replaces the arguments from `tokenizer` to `dtype`.
        output: new or empty folder for the checkpoint; without it a temporary one, which lives as long as the result.
        tokenizer: needed only for a model in memory.
        params: parameters to keep: "110M", 110_000_000, "80%" of the model, or "80% of decoder".
        latency: instead of `params`: time that the pruned model may take, as a share of the dense model's, "0.7x"; measured here.
        latency_of: what `latency` times: prefill or decode.
        sparsity: instead of `params`, for methods that make zeros: "50%" or "2:4".
        method: a name from `adapt-pruner methods`.
        text: text to measure importance on: a SPEC as in docs/data.md, a list of them, or {SPEC: weight}; "self" is
            self-written text, which the model writes first, and is the default; text of your own gives a better model.
        calibration_samples: sequences of it per iteration; 64 by default.
        calibration_length: tokens per sequence; 128 by default.
        calibration_ids: JSON file with input_ids: exactly these tokens instead of a text.
        settings: further keys of a recipe, such as {"multiple_of": 64, "calibration.self_generated": 0}.
        seed: seed of all random draws.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: auto, float32 or bfloat16.
        trust_remote_code: run Python code that comes with the model.
        progress: show a bar, in a terminal and in a notebook.
        listen: called with every event, as a plain dict.

    Returns:
        The model, where it lies, and what was measured on the way.

    Raises:
        UsageError: the model, text, size or an argument is not what it should be, or `output` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    keep, place = _place(output, "model")
    if isinstance(model, Recipe):
        alone = {
            "tokenizer": tokenizer, "params": params, "latency": latency, "latency_of": latency_of, "sparsity": sparsity, "method": method,
            "text": text, "calibration_samples": calibration_samples, "calibration_length": calibration_length,
            "calibration_ids": calibration_ids, "settings": settings, "seed": seed or None, "device": None if device == "auto" else device,
            "dtype": None if dtype == "auto" else dtype,
        }  # fmt: skip
        if given := [name for name, value in alone.items() if value is not None]:
            raise UsageError(
                f"{' and '.join(given)} would be ignored, since a recipe sets everything itself; put it into the recipe"
            )
        return _pruned(model, place, keep, trust_remote_code, progress, listen)
    overrides = as_overrides(settings)
    asked = {
        "budget": None if params is None else as_size("params", params), "latency": latency, "latency_of": latency_of, "sparsity": sparsity,
        "method": None if method is None else of_kind("method", method, str, "a name from `adapt-pruner methods`"),
        "calibration.source": None if text is None else as_source("text", text), "calibration.samples": calibration_samples,
        "calibration.length": calibration_length,
        "calibration.ids": None if calibration_ids is None else str(as_place("calibration_ids", calibration_ids)), "seed": seed,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    with named(model, tokenizer) as name:
        return _pruned(to_prune({"model": name, **asked}, overrides=overrides), place, keep, trust_remote_code, progress, listen)


def _pruned(
    recipe: Recipe, place: Path, keep: Keeper | None, trust_remote_code: bool, progress: bool, listen: Listener | None
) -> Result:
    events: list[dict[str, Any]] = []
    with heard(listen, progress=progress) as tell:

        def noted(event: dict[str, Any]) -> None:
            events.append({"time": time.time(), **event})
            tell(event)

        outcome = with_card.prune(recipe, place, listen=noted, trust_remote_code=trust_remote_code)
    return Result(
        place, recipe, outcome.figures, history=outcome.history, mask=outcome.mask, events=events, trust_remote_code=trust_remote_code, keeper=keep
    )  # fmt: skip


@in_python
def run(
    recipe: Recipe | Name,
    output: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
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
        recipe = recipes.read(str(of_kind("recipe", recipe, (str, Path), "a Recipe, a YAML file or a name")), overrides=overrides)
    elif overrides:
        raise UsageError("settings would be ignored, since a Recipe sets everything itself; put them into the recipe")
    return _ran(recipe.ready(), place, keep, trust_remote_code, progress, listen, force_recipe=force_recipe)


@in_python
def shrink(
    model: Name | Saved | Any,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    params: str | int,
    text: Spec | None = None,
    minutes: float | None = None,
    hours: float | None = None,
    tokens: str | int | None = None,
    settings: Mapping[str, Any] | None = None,
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
        text: your text: it is trained and calibrated on, and a part is held out. By default the model writes it: conversations, or plain text.
        minutes: the time that it may take.
        hours: instead of `minutes`.
        tokens: instead of `minutes`: tokens to train on, such as "2M".
        settings: further keys of a recipe.
        seed: seed of all random draws.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: auto, float32 or bfloat16.
        trust_remote_code: run Python code that comes with the model.
        progress: show the plan and a bar.
        listen: called with every event, as a plain dict.

    Raises:
        UsageError: the time is too short or not given, or the model, text, size or folder is not what it should be.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    started = time.perf_counter()
    for name, value in (("minutes", minutes), ("hours", hours)):
        of_kind(name, value, (int, float, type(None)), "a number such as 60")
    long = how_long(minutes, hours, None if tokens is None else as_count("tokens", tokens))
    keep, place = _place(output)
    overrides = as_overrides(settings)
    spec = None if text is None else as_spec("text", text)
    size = as_size("params", params)
    with kept_threads(), named(model, tokenizer) as name:
        common = {"model": name, "budget": size, "seed": seed, "device": device, "dtype": dtype}
        with heard(listen, progress=progress) as tell:
            recipe = recipe_in_time(
                common, place, text=spec, long=long, overrides=overrides, started=started, listen=tell, trust_remote_code=trust_remote_code
            )  # fmt: skip
        return _ran(recipe, place, keep, trust_remote_code, progress, listen)


def _ran(
    recipe: Recipe,
    place: Path,
    keep: Keeper | None,
    trust_remote_code: bool,
    progress: bool,
    listen: Listener | None,
    *,
    force_recipe: bool = False,
) -> Result:
    with heard(listen, progress=progress) as tell:
        outcome = with_card.run(recipe, place, listen=tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe)
    known: dict[str, Any] = {} if outcome is None else {"history": outcome.history, "mask": outcome.mask}
    figures = figures_of(place) if outcome is None else outcome.figures
    return Result(place / "model", recipe, figures, run_dir=place, trust_remote_code=trust_remote_code, keeper=keep, **known)


def _place(output: Any, name: str = "run") -> tuple[Keeper | None, Path]:
    """The path of the result, and the keeper of a temporary folder if it lies in one.

    Raises:
        UsageError: `output` is no path, or it is missing although several processes work together.
    """
    if output is not None:
        return None, as_place("output", output)
    if world.size() > 1:
        raise UsageError("several processes work together and need one shared folder; give output=")
    temporary = Keeper()
    return temporary, Path(temporary.name) / name
