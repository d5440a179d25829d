"""Predict a run's time and memory before it starts, by formulas and a quick probe; without weights, by formulas alone.

The time is that of the phases of `run.plan`. So it covers what a run shows as it works.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from adapt_pruner import recipe as recipes
from adapt_pruner.checkpoint.load import has_weights, pick_device
from adapt_pruner.checkpoint.shelved import PLACES
from adapt_pruner.core.events import Listener, Progress
from adapt_pruner.core.events.run import Planned
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import num_active, num_left
from adapt_pruner.core.system.memory import free_bytes
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.reduce.units import mask_to, prunable, sizes_alike
from adapt_pruner.run.estimate import PAPER, Setup, Shapes, Speed, process_bytes, shapes
from adapt_pruner.run.plan import memory, most_bytes, needs_whole_model, phases, seconds, setup_of, too_large
from adapt_pruner.run.probe import scoring_speed
from adapt_pruner.run.start import begin, on_paper, placed, prepare
from adapt_pruner.work import Work


def dry_run(
    recipe: Recipe, *, listen: Listener = lambda event: None, trust_remote_code: bool = False, processes: int = 1
) -> dict[str, Any]:
    """The plan of a run, with its time and memory; for arguments, result and errors see `api.pruning.dry_run`."""
    recipe = recipe.ready()
    here = has_weights(recipe.model)
    place, trouble = placed(recipe, trust_remote_code=trust_remote_code) if here else ("none", "")
    if here and not trouble:
        work = begin(recipe, listen, trust_remote_code=trust_remote_code, place=place)
        prepare(work, write=False)
        teacher = None if work.data.teacher is None else shapes(work.data.teacher)
        how = setup_of(work, teacher=teacher, processes=processes)
        return _told(work, how, scoring_speed(work), free=free_bytes(work.model.device), measured=True)
    if recipe.latency:
        raise UsageError(
            trouble
            or f"latency {recipe.latency} needs a measurement, but the weights of {recipe.model} are not on this machine; set a "
            "budget instead"
        )
    work, how = on_paper(recipe, here=here, trust_remote_code=trust_remote_code, processes=processes)
    free = PAPER[how.device].memory
    if here or how.device == "cpu":
        free = free_bytes(pick_device(recipe.device))
    return _told(work, how, PAPER[how.device], free=free, measured=False)


def _told(work: Work, how: Setup, speed: Speed, *, free: int | None, measured: bool) -> dict[str, Any]:
    recipe, budget, evaluation = work.recipe, work.budget, work.recipe.evaluation
    windows = sum(window.numel() for window in work.data.held_out)  # not read where there are no weights
    read = windows or (0 if evaluation.source is None else evaluation.window * (evaluation.max_windows or 0))
    planned = phases(work, how, reads=read)
    spans = [0.0] * (1 + len(work.stages))
    for (stage_idx, _), span in seconds(work, how, speed, planned).items():
        spans[stage_idx] += span
    unknown = dict.fromkeys(item["phase"] for item in planned.items if item["flops"] is None)
    left_out = [Progress(phase=phase, done=0, of=0, task="tasks", what="text").doing for phase in unknown]
    if evaluation.source is not None and not read:
        left_out.append("reading the whole held-out text")
    dense = shapes(work.model)
    held = memory(work, how, dense=dense)
    peaks = {phase: process_bytes(parts, how.device) for phase, parts in held.items()}
    return {
        "model": recipe.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "params_before": budget.total,
        "params_after": budget.keep,
        **_active(work),
        "stages": [asdict(stage) | {"seconds": span} for stage, span in zip(work.stages, spans[1:], strict=True)],
        "seconds": sum(spans),
        "minutes": recipe.minutes,
        "time_by": "probe" if measured else "assumption",
        "speed": speed.words,
        "time_without": left_out,
        "processes": how.processes,
        "parallel": recipe.parallel,
        "device": how.device,
        "offload": how.offload,
        "memory": {phase: {"bytes": peaks[phase], "of": parts} for phase, parts in held.items()},
        "peak_bytes": max(peaks.values()),
        "too_large": too_large(work, how, free=free) or None,
        "ways": [_way(work, way, speed, planned, dense=dense, free=free) for way in _ways(work, how)],
    }


def _ways(work: Work, how: Setup) -> Iterator[Setup]:
    """Where the weights may lie, on one process; and if the run trains on GPUs, several with a share of them each."""
    for place in PLACES[:1] if needs_whole_model(work) else PLACES:
        how = replace(how, offload=place, processes=1)
        yield how
    if how.device == "cpu":
        return
    try:
        recipes.read(work.recipe.model_dump(mode="json", exclude_unset=True), values={"parallel": "fsdp"})
    except UsageError:  # it does not train, or in a way that cannot be spread
        return
    for processes in (2, 4, 8):
        yield replace(how, processes=processes, parallel="fsdp")


def _way(work: Work, how: Setup, speed: Speed, planned: Planned, *, dense: Shapes, free: int | None) -> dict[str, Any]:
    num_bytes = most_bytes(work, how, dense=dense)
    return {
        "offload": how.offload, "processes": how.processes, "bytes": num_bytes, "seconds": sum(seconds(work, how, speed, planned).values()),
        "fits": free is None or num_bytes <= free,
    }  # fmt: skip


def _active(work: Work) -> dict[str, int | None]:
    """Parameters that one token goes through, before and after; None for a model without experts, where these are all."""
    if not any(axis.per_token for axis in work.axes):
        return {"active_params_before": None, "active_params_after": None}
    before, mask = num_active(work.model, work.axes), Mask()
    if "experts" in work.recipe.axes and "chosen" in parts.needs("reduce", work.recipe.reduce):
        mask = mask_to(prunable(work), sizes_alike(work, keep=work.budget.keep))
    further = max(0, num_left(work.model, work.axes, mask) - work.budget.keep)  # what goes of other units, which all are active
    return {"active_params_before": before, "active_params_after": num_active(work.model, work.axes, mask) - further}
