"""`prune`, `run` and `shrink`: make a smaller model out of a larger one, in one call each; and their result."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from adapt_pruner.api.arguments import (
    Count,
    Keeper,
    Listener,
    Model,
    Name,
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
    placed,
)
from adapt_pruner.api.exporting import export
from adapt_pruner.api.measuring import Evaluation, chat, evaluate
from adapt_pruner.core.events import Event
from adapt_pruner.core.events.words import measured_text, millions, span
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import expanded
from adapt_pruner.errors import UsageError

if TYPE_CHECKING:
    from adapt_pruner.checkpoint.load import Loaded
    from adapt_pruner.core.model.axes import Mask
    from adapt_pruner.recipe import Recipe


Latency = Annotated[str, Takes('a share of the dense model\'s time such as "0.7x"', "0.7x")]
Sparsity = Annotated[str, Takes('a share of zeros such as "50%", or a pattern such as "2:4"', "50%|2:4")]
Hours = Annotated[float, Takes("a number such as 60", None, float)]
_KEYS = {
    "params": "budget", "text": "calibration.source", "calibration_samples": "calibration.samples",
    "calibration_length": "calibration.length", "calibration_ids": "calibration.ids",
}  # fmt: skip
"""Argument -> the key of a recipe that it sets, where the two have different names."""


class Result:
    """A pruned model.

    The model lies in a folder, and every method but `model` and `tokenizer` works on that folder. Without an `output` the folder is a
    temporary one, which lives as long as this object; `save` keeps it.

    Attributes:
        path: the folder of the model.
        recipe: the recipe that was run.
        figures: what was measured on the way: `params_before`, `params_after`, `calibration_losses`, `seconds`, …
        history: a note on each step of pruning.
        mask: which units of the model at the start stayed.
    """

    def __init__(
        self, path: Path, recipe: "Recipe", figures: Mapping[str, Any], *, history: Sequence[Mapping[str, Any]] = (), mask: "Mask | None" = None,
        run_dir: Path | None = None, events: Sequence[Event] = (), trust_remote_code: bool = False, keeper: Keeper | None = None,
    ) -> None:  # fmt: skip
        self.path, self.recipe, self.figures, self.history = path, recipe, dict(figures), list(history)
        self._mask, self._run_dir, self._events, self._trust, self._keeper = mask, run_dir, events, trust_remote_code, keeper

    @cached_property
    def loaded(self) -> "Loaded":
        """The model with everything that belongs to it, in float32; loaded at first use."""
        from adapt_pruner.checkpoint.load import load, pick_device

        return load(str(self.path), device=pick_device(self.recipe.device), trust_remote_code=self._trust, any_task=True)

    @property
    def model(self) -> Any:
        """The model as a transformers model, in float32, on the recipe's device."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.loaded.tokenizer

    @property
    def mask(self) -> "Mask":
        """Which units of the model at the start stayed; for a run that was finished before, of the dense model."""
        from adapt_pruner.core.model.axes import Mask

        return self._mask if self._mask is not None else self.loaded.mask or Mask()

    @in_python
    def save(self, output: Place) -> Path:
        """Copy the model to a new or empty folder; if it was in a temporary folder, it lies there from now on.

        Raises:
            UsageError: `output` is not empty.
            RunError: the copy could not be written; nothing is left there.
        """
        from adapt_pruner.checkpoint.save import check_target, whole_or_nothing

        place = expanded(output)
        check_target(place)
        with whole_or_nothing(place) as folder:
            shutil.copytree(self.path, folder, dirs_exist_ok=True)
        if self._keeper is not None:
            self.path = place
        return place

    def evaluate(
        self, text: Spec | None = None, *, window: int | None = None, max_windows: int | None = None, tasks: str | Sequence[str] | None = None,
        progress: bool = False,
    ) -> Evaluation:  # fmt: skip
        """Measure perplexity and speed on a text, scores on tasks, or both, as `adapt_pruner.evaluate` does."""
        return evaluate(
            self, text=text, window=window, max_windows=max_windows, tasks=tasks, device=self.recipe.device, trust_remote_code=self._trust,
            progress=progress,
        )  # fmt: skip

    def export(
        self, to: str, output: str | Path, *, quant: str | None = None, pad: int | None = None, progress: bool = False
    ) -> Path:
        """Write the model in the form of another tool, as `adapt_pruner.export` does."""
        return export(self, to, output, quant=quant, pad=pad, trust_remote_code=self._trust, progress=progress)

    def chat(self, prompt: str, *, system: str | None = None, max_new_tokens: int = 200, temperature: float = 0.0) -> str:
        """What the model answers, as `adapt_pruner.chat` gives it."""
        return chat(
            self, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, device=self.recipe.device,
            trust_remote_code=self._trust,
        )  # fmt: skip

    @in_python
    def report(self, output: Place | None = None) -> Path:
        """Write the run as one HTML page: before and after, anatomy, reasons, cost.

        Args:
            output: the page; by default report.html in a run's folder, else FOLDER.html beside the model's folder.

        Returns:
            Where it was written.

        Raises:
            UsageError: a file that is not a page of ours would be overwritten.
            RunError: the page could not be written.
        """
        from adapt_pruner.report.page import check_page, page, write_page
        from adapt_pruner.report.record import read_record, record_of_result

        if self._run_dir is not None:
            record, place = read_record(self._run_dir), self._run_dir / filenames.PAGE
        else:
            record, place = record_of_result(self.path, self._events), self.path.with_name(f"{self.path.name}.html")
        place = place if output is None else expanded(output)
        check_page(place, self._run_dir or self.path)
        return write_page(place, page(record))

    def __repr__(self) -> str:
        """Five lines: kind, size, loss, cost, place."""
        figures = self.figures
        before, after = figures["params_before"], figures["params_after"]
        inside = figures["decoder_params_before"], figures["decoder_params_after"]
        trained = f", trained on {figures['trained_tokens']:,} tokens" if figures.get("trained_tokens") else ""
        memory = f", {figures['peak_rss_bytes'] / 2**30:.1f} GiB at the peak" if "peak_rss_bytes" in figures else ""
        temporary = self._keeper is not None and self.path.is_relative_to(self._keeper.name)
        kept = ", which is temporary: .save(folder) keeps the model" if temporary else ""
        return "\n".join(
            [
                f"{Path(self.recipe.model).name} pruned by {self.recipe.method}{trained}",
                f"parameters  {before:,} → {after:,} ({after / before:.1%}; of the decoder {inside[1] / inside[0]:.1%})",
                f"loss        {self._said_loss()}",
                f"time        {span(figures['seconds'])}{memory}",
                f"folder      {self.path}{kept}",
            ]
        )

    def _said_loss(self) -> str:
        """The loss before and after, if known; of held-out text if there is some."""
        measured = [value for value in self.figures.get("perplexities") or [] if value is not None]
        if len(measured) > 1:
            return f"perplexity {measured[0]:.2f} → {measured[-1]:.2f} on {measured_text(self.figures)}"
        losses = [value for value in self.figures.get("calibration_losses") or [] if value is not None]
        if len(losses) > 1:
            return f"{losses[0]:.3f} → {losses[-1]:.3f} nats a token on the calibration text"
        return f"not measured; .evaluate(text) measures it, with {millions(self.figures['params_after'])} parameters"


@in_python
def prune(
    model: "Model | Recipe",
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
    offload: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Result:
    """Prune a model to a number of parameters, or to a speed on this machine, or carry out a recipe.

    A model in memory is left as it is. It is first written to a temporary folder, then treated like any other; this costs its
    size on disk and the seconds to write and read it. Warnings are Python warnings, with `progress` lines, with `listen` events.

    Args:
        model: a folder, .gguf file, hub id or packaged model; a result; a model of transformers with its tokenizer; or a recipe
            (a Recipe, or a file that ends in .yaml), which replaces the arguments from `tokenizer` to `offload`.
        output: new or empty folder for the checkpoint; without it a temporary one, which lives as long as the result.
        tokenizer: needed only for a model in memory.
        params: parameters to keep: "110M", 110_000_000, "80%" of the model, "80% of decoder", or "75% of experts".
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
        offload: where weights lie while no pass needs them: none (in memory, as float32), cpu (in memory, as stored), disk (in the
            model's files), or `auto` (the first of these that fits).
        trust_remote_code: run Python code that comes with the model.
        progress: show a bar, in a terminal and in a notebook.
        listen: called with every event, as a plain dict.

    Returns:
        The model, where it lies, and what was measured on the way.

    Raises:
        UsageError: the model, text, size or an argument is not what it should be, or `output` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    from adapt_pruner import recipe as recipes
    from adapt_pruner.recipe.prune_recipe import to_prune
    from adapt_pruner.report import with_card

    keep, place = placed(output, "model")
    options = {
        "params": params, "latency": latency, "latency_of": latency_of, "sparsity": sparsity, "method": method, "text": _source(text),
        "calibration_samples": calibration_samples, "calibration_length": calibration_length,
        "calibration_ids": None if calibration_ids is None else str(expanded(calibration_ids)), "seed": seed or None,
        "device": None if device == "auto" else device, "dtype": None if dtype == "auto" else dtype,
        "offload": None if offload == "auto" else offload,
    }  # fmt: skip
    events: list[Event] = []
    with ExitStack() as stack:
        if isinstance(model, str | Path) and str(model).endswith(".yaml"):
            model = recipes.read(str(model))
        if isinstance(model, recipes.Recipe):
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

        def noted(event: Event) -> None:
            events.append(event.model_copy(update={"time": time.time()}))
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
    recipe: "Recipe | Name",
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
    from adapt_pruner import recipe as recipes

    keep, place = placed(output)
    overrides = as_overrides(settings)
    if not isinstance(recipe, recipes.Recipe):
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
        params: parameters to keep: "110M", 110_000_000, "80%" of the model, "80% of decoder", or "75% of experts".
        text: your text, for training and calibration: file, folder, glob or hub:NAME; a part is held out to measure on. By default
            the model writes it: conversations, or plain text.
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
    keep, place = placed(output)
    planned = in_time(
        model, place, tokenizer, params=params, text=text, minutes=minutes, hours=hours, tokens=tokens, settings=settings, seed=seed,
        device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress, listen=listen,
    )  # fmt: skip
    with planned as (recipe, tell):
        return _ran(recipe, place, keep, tell, trust_remote_code=trust_remote_code)


@contextmanager
def in_time(
    model: Any, place: Path, tokenizer: Any = None, *, params: Any, text: Any, minutes: float | None, hours: float | None, tokens: Any,
    settings: Any, trust_remote_code: bool, progress: bool, listen: Listener | None = None, **common: Any,
) -> Iterator[tuple["Recipe", Callable[[Event], None]]]:  # fmt: skip
    """The recipe that `shrink` carries out, with the listener that is told of it; a model in memory lies in a folder until the context ends."""
    started = time.perf_counter()
    from adapt_pruner.run.probe import kept_threads
    from adapt_pruner.run.shrink import how_long, recipe_in_time

    long = how_long(minutes, hours, None if tokens is None else str(tokens))
    overrides = as_overrides(settings)
    with kept_threads(), named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        recipe = recipe_in_time(
            {"model": name, "budget": str(params), **common}, place, text=None if text is None else str(text), long=long,
            overrides=overrides, started=started, listen=tell, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        yield recipe, tell


def dry_run(
    recipe: "Recipe", *, listen: Listener = lambda event: None, trust_remote_code: bool = False, processes: int = 1
) -> dict[str, Any]:
    """The plan of a run, with its time and memory; nothing is written.

    If the weights are on this machine and the run fits its memory, the model is loaded, the texts are found, and a batch of random
    tokens, forward and backward, probes the speed. Otherwise only config.json is read, and the speed is assumed.

    The plan's `too_large` says how much memory the run lacks, and names a way that fits. `time_without` names the work whose time
    nobody can compute. `minutes` are those of the recipe; training may end sooner.

    Args:
        recipe: the run.
        listen: called with every event, as a plain dict.
        trust_remote_code: whether code that comes with the model may run.
        processes: number of processes that would share the work.

    Raises:
        UsageError: the recipe does not fit the model, or a text, task or package is missing.
    """
    from adapt_pruner.run import forecast

    return forecast.dry_run(
        recipe, listen=lambda event: listen(event.to_dict()), trust_remote_code=trust_remote_code, processes=processes
    )


def _ran(
    recipe: "Recipe",
    place: Path,
    keep: Keeper | None,
    tell: Callable[[Event], None],
    *,
    trust_remote_code: bool,
    force_recipe: bool = False,
) -> Result:
    from adapt_pruner.report import with_card
    from adapt_pruner.run.folder import figures_of

    outcome = with_card.run(recipe, place, listen=tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe)
    kept: dict[str, Any] = {} if outcome is None else {"history": outcome.history, "mask": outcome.mask}
    figures = figures_of(place) if outcome is None else outcome.figures
    return Result(
        place / filenames.RESULT, recipe, figures, run_dir=place, trust_remote_code=trust_remote_code, keeper=keep, **kept
    )
