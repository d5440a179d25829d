"""Refuse a recipe whose keys do not fit together, before any work is done, and say why a recipe was refused.

Each check raises a `ValueError`. Its message is one sentence, which names the values, says why they do not fit, and tells the user
what to change.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from adapt_pruner.core.model.kinds import USUAL, WHOLE
from adapt_pruner.core.system.parts import CHOICE
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.errors import UsageError, nearest, option
from adapt_pruner.recipe import parts

if TYPE_CHECKING:
    from adapt_pruner.recipe.schema import Recipe

__all__ = ["check_fitting", "parse_latency", "sentence", "unread"]

_LONGEST_SHOWN = 200  # characters of a value


def parse_latency(written: str) -> float:
    """A share of the dense model's time as people write it: `0.7x`; `1.5x`, above 1, is 1.5 times as fast and so 0.667x of the time.

    Raises:
        UsageError: it is not written so, or it is 0 or 1.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*x\s*", written)
    if match is None or float(match[1]) in (0, 1):
        raise UsageError(
            f"latency {written!r} is not a share of the dense model's time; write it like 0.7x, above 0x and below 1x, or 1.5x for 1.5 "
            "times as fast"
        )
    return min(float(match[1]), 1 / float(match[1]))


def check_fitting(recipe: "Recipe") -> None:
    """Refuse keys that do not fit together.

    Raises:
        ValueError: they do not.
    """
    needs = parts.needs("reduce", recipe.reduce)
    _check_zeros(recipe)
    if recipe.latency:
        _check_latency(recipe)
    if recipe.init == "random":
        _check_random(recipe)
    if "chosen" in needs:
        _check_chosen(recipe)
    if "one stage" in needs and recipe.stages > 1:
        raise ValueError(f"reduce {recipe.reduce!r} can run only once, and stages is {recipe.stages}; set stages to 1")
    training = recipe.training
    if training.weights == "bfloat16" and recipe.dtype == "float32":
        raise ValueError(
            "training.weights 'bfloat16' are multiplied in bfloat16, and dtype is 'float32'; set dtype to auto or training.weights to float32"
        )
    spread = [training.in_fewer_bits, "training.step_in_backward" if training.step_in_backward else None]
    if recipe.parallel == "fsdp" and (unfit := next(filter(None, spread), None)):
        raise ValueError(f"{unfit} does not work with parallel 'fsdp'; set parallel to ddp, or take float32 weights and adamw")
    shards = training.shards
    if not isinstance(shards, str) and len(shards) != recipe.stages:
        raise ValueError(
            f"training.shards [{', '.join(f'{share:g}' for share in shards)}] has {len(shards)} shares and stages is {recipe.stages}; give one for each stage, or write "
            "last=0.8 for the share of the last"
        )
    if recipe.vocabulary is not None and recipe.calibration.ids is not None:
        raise ValueError(
            "calibration.ids are token ids of the vocabulary before it is pruned; name a text, or prune the vocabulary "
            "first in a separate run"
        )
    if recipe.grow is not None and recipe.init == "random":
        raise ValueError(
            "init random draws the weights anew, and grow copies weights; grow a model first, then begin with its shape"
        )
    if recipe.grow is not None and recipe.offload in ("cpu", "disk"):
        raise ValueError(f"grow makes new weights in memory, so offload {recipe.offload!r} cannot work; set offload to none")
    if recipe.minutes is not None:
        _check_minutes(recipe)


def _check_minutes(recipe: "Recipe") -> None:
    """Refuse a deadline that the run could not keep."""
    for need, why in (
        ("training", "trains while it removes, since that goes by tokens"),
        ("all its time", "takes the time that it needs"),
    ):
        if need in parts.needs("reduce", recipe.reduce):
            raise ValueError(
                f"minutes {recipe.minutes:g} cannot end a run whose reduce {recipe.reduce!r} {why}; leave minutes out and set training.tokens "
                f"(with shrink: {option('tokens')})"
            )


def _check_zeros(recipe: "Recipe") -> None:
    """Refuse a budget where weights become zero, and a pattern of zeros or a solver where none do."""
    if not recipe.makes_zeros:
        if recipe.sparsity:
            size = "; prune to a size in a separate command" if recipe.budget or recipe.latency else ""
            raise ValueError(
                f"method {recipe.method!r} removes units and makes no zeros, so sparsity {recipe.sparsity!r} would be ignored; set method to one "
                f"that makes zeros, such as wanda{size}"
            )
        return
    if size := recipe.budget or recipe.latency:
        raise ValueError(
            f"method {recipe.method!r} makes weights zero and removes none, so it cannot reach {size!r}; give "
            f"{option('sparsity', '50%')} or {option('sparsity', '2:4')}; for both, prune first, then make zeros in the result with a second command"
        )


def _check_chosen(recipe: "Recipe") -> None:
    """Refuse a chooser that lacks what it needs, and axes that it cannot shrink."""
    chooser, needs = recipe.chooser.partition("(")[0], parts.needs("chooser", recipe.chooser)
    drops = "whole" in needs
    if recipe.distance is None and "distance" in needs & parts.reads("reduce", recipe.reduce):
        raise ValueError(f"chooser {chooser!r} needs a distance, and distance is null; name one, for example blocks.cosine")
    whole = [kind for kind in recipe.axes if kind in WHOLE]
    if drops and not whole:
        raise ValueError(
            f"chooser {chooser!r} drops whole layers, attentions or mlps, and axes names none; add one of them to axes"
        )
    if whole and not drops:
        raise ValueError(
            f"axes names {' and '.join(whole)}, which chooser {chooser!r} cannot drop; set chooser=depth.drop_layers, or another that "
            "declares needs={'whole'}"
        )
    if "residual" in recipe.axes and "layers" in needs:
        raise ValueError(
            f"chooser {chooser!r} prunes layer by layer, and the axis residual is in no layer; set chooser to allocate.uniform"
        )
    if recipe.multiple_of not in (1, "auto") and "neurons" not in recipe.axes:
        raise ValueError(f"multiple_of {recipe.multiple_of} counts neurons, and axes does not name neurons; add neurons to axes")


def unread(recipe: "Recipe") -> dict[str, tuple[str, str]]:
    """The dotted keys that nothing in a recipe reads, whatever their values: key -> why, and what else to set so that it is read."""
    reads, needs = parts.reads("reduce", recipe.reduce), parts.needs("reduce", recipe.reduce)
    ignored: dict[str, tuple[str, str]] = {}

    def add(keys: Iterable[str], why: str, remedy: str = "") -> None:
        for key in keys:
            ignored.setdefault(key, (why, remedy))

    chosen = "chosen" in needs
    part = f"reduce {recipe.reduce.partition('(')[0]!r}"
    add(sorted((CHOICE | {"solver"}) - reads), f"{part} does not read it")
    if not chosen:
        add(("amplitude",), f"{part} does not read it")
    chooser = f"chooser {recipe.chooser.partition('(')[0]!r} does not read it"
    add([key for key in ("step", "amplitude") if not parts.takes("chooser", recipe.chooser, key)], chooser)
    if "distance" not in parts.needs("chooser", recipe.chooser):
        add(("distance",), chooser, "set chooser to one that needs a distance, such as allocate.adaptive")
    if "kv_heads" not in recipe.axes:
        add(("head_metric",), "axes does not name kv_heads")
    if set(recipe.axes) <= set(WHOLE):
        add(("metric",), f"axes names only {' and '.join(recipe.axes)}, which a distance scores")

    repairs = recipe.repair is not None and "repair" in reads
    if not repairs:
        add(("calibration.self_generated", "calibration.repair_samples"), "only a repair reads it", "set repair")
    scored = {key for key in ("metric", "distance", "head_metric") if key not in ignored and getattr(recipe, key) is not None}
    by_text = scored - ({"metric"} if "text" not in parts.needs("metric", recipe.metric) else set())
    solved = "solver" in reads and recipe.solver is not None and "text" in parts.needs("solver", recipe.solver)
    if not (repairs or solved or needs & {"text"} or "calibration" in reads or (chosen and "training" not in needs and by_text)):
        add(
            [f"calibration.{key}" for key in ("source", "samples", "length", "redraw", "ids")],
            f"method {recipe.method!r} reads no calibration text",
        )
    if recipe.calibration.ids is not None:
        written = repairs and recipe.calibration.self_generated
        drawn = ("source", "samples", "redraw") if written else ("source", "samples", "length", "redraw")
        add([f"calibration.{key}" for key in drawn], "calibration.ids fixes every token", "leave calibration.ids out")

    training = recipe.training
    if training.source is None and "training" not in needs:  # without training text such a reduction is refused as it begins
        leaves = [f"training.{key}" for key in type(training).model_fields if key not in ("source", "tokens", "teacher")]
        add([*leaves, "moments"], "the recipe trains nothing", "set training.source and training.tokens")
    for key in ("warmup", "decay", "floor"):
        if not parts.takes("schedule", training.schedule, key):
            add((f"training.{key}",), f"training.schedule {training.schedule.partition('(')[0]!r} does not read it")
    if recipe.evaluation.source is None:
        add(("evaluation.window", "evaluation.max_windows"), "there is no held-out text", "set evaluation.source")
    if recipe.evaluation.tasks is None:
        add(("evaluation.limit", "evaluation.task_dir"), "there are no tasks", "set evaluation.tasks, for example to commonsense")
    if not recipe.latency:
        add(("latency_of",), "there is no latency to reach", "set latency, for example to 0.7x")
    return ignored


def _check_random(recipe: "Recipe") -> None:
    """Refuse settings that make no sense with random weights."""
    if not recipe.training.tokens:
        raise ValueError("init random begins with a model that knows nothing, and the recipe trains nothing; set training.tokens")
    if recipe.training.needs_teacher and recipe.training.teacher is None:
        raise ValueError(
            f"training.objective {recipe.training.objective!r} would be taught by the random model itself; name a training.teacher"
        )
    if SELF in domains(recipe.calibration.source) or recipe.calibration.self_generated:
        raise ValueError(
            "init random has no model that could write calibration text; name a text as calibration.source and set calibration.self_generated to 0"
        )


def _check_latency(recipe: "Recipe") -> None:
    """Refuse a latency that is badly written, or that a table of neurons and KV heads cannot predict."""
    parse_latency(recipe.latency)
    if recipe.budget:
        raise ValueError(
            f"budget {recipe.budget!r} and latency {recipe.latency!r} both say how far to prune; leave one of them out"
        )
    others = [f"axes {', '.join(kinds)}"] if (kinds := sorted(set(recipe.axes) - set(USUAL))) else []
    if recipe.vocabulary is not None:
        others.insert(0, "vocabulary")
    if "chosen" not in parts.needs("reduce", recipe.reduce):
        others.insert(0, f"reduce {recipe.reduce}")
    if others:
        raise ValueError(
            f"latency {recipe.latency!r} is predicted from neurons and kv_heads alone, and the recipe also has {others[0]}; set "
            "budget instead"
        )


def sentence(error: ValidationError, recipe: type[BaseModel]) -> str:
    """What is wrong with a recipe, in one sentence: its key, its value and the limit, or the key that was meant."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        model = _model_at(recipe, first["loc"][:-1])
        return f"recipe key {key!r} is not known; {nearest(str(first['loc'][-1]), model.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return message if key.rpartition(".")[2] in message else f"recipe key {key!r}: {message}"
    return f"recipe key {key!r} is {_shown(first['input'])}: {message[0].lower() + message[1:]}"


def _shown(value: Any) -> str:
    """A value as a sentence shows it, shortened if it is long."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # a number of many thousand digits, a list in lists in lists
        return f"a {type(value).__name__} that is too long to show"
    return written if len(written) <= _LONGEST_SHOWN else f"{written[:_LONGEST_SHOWN]}…"


def _model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    for key in path:
        annotation = model.model_fields[str(key)].annotation
        for kind in get_args(annotation) or (annotation,):  # a table may be optional
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return model
