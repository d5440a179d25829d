"""Predict a run's time and memory before it starts, by formulas and a quick probe; without weights, by formulas alone.

The time is that of the phases that `run.ahead` lists, by their operations. So it covers what a run shows as it works.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from adapt_pruner.checkpoint.load import has_weights, pick_device
from adapt_pruner.core.events import Listener, Progress, phase_of
from adapt_pruner.core.events.run import Planned, Probe
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.run.ahead import ahead, shapes_in_training
from adapt_pruner.run.estimate import (
    PAPER,
    Setup,
    Shapes,
    Speed,
    operations,
    process_bytes,
    seconds,
    setup_of,
    shapes,
)
from adapt_pruner.run.plan import free_bytes, memory, too_large
from adapt_pruner.run.start import begin, on_paper, prepare, room, to_write
from adapt_pruner.run.threads import random_rows, score_rows, seconds_of
from adapt_pruner.work import Work

__all__ = ["dry_run"]

_PROBED_TOKENS = 512


def dry_run(
    recipe: Recipe, *, listen: Listener = lambda event: None, trust_remote_code: bool = False, processes: int = 1
) -> dict[str, Any]:
    """The plan of a run, with its time and memory; for arguments, result and errors see `api.pruning.dry_run`."""
    recipe = recipe.ready()
    here = has_weights(recipe.model)
    trouble = room(recipe, trust_remote_code=trust_remote_code) if here else ""
    if here and not trouble:
        work = begin(recipe, listen, trust_remote_code=trust_remote_code)
        prepare(work, write=False)
        teacher = None if work.data.teacher is None else shapes(work.data.teacher)
        device = next(work.model.parameters()).device
        narrow = uses_bfloat16(device, recipe.dtype)
        kind = "cpu" if device.type == "cpu" else "cuda"
        how = setup_of(recipe, device=kind, narrow=narrow, teacher=teacher, processes=processes)
        return _told(work, how, _probe(work, narrow=narrow), free=free_bytes(device), measured=True)
    if recipe.latency:
        raise UsageError(
            trouble
            or f"latency {recipe.latency} needs a measurement, but the weights of {recipe.model} are not on this machine; set a "
            "budget instead"
        )
    work, how = on_paper(recipe, here=here, trust_remote_code=trust_remote_code)
    how = replace(how, processes=processes)
    free = PAPER[how.device].memory
    if here or how.device == "cpu":
        free = free_bytes(pick_device(recipe.device))
    return _told(work, how, PAPER[how.device], free=free, measured=False)


def _told(work: Work, how: Setup, speed: Speed, *, free: int | None, measured: bool) -> dict[str, Any]:
    recipe, budget, dense = work.recipe, work.budget, shapes(work.model)
    evaluation = recipe.evaluation
    windows = sum(window.numel() for window in work.data.held_out)  # not read where there are no weights
    read = windows or (0 if evaluation.source is None else evaluation.window * (evaluation.max_windows or 0))
    planned = ahead(work, how, writes=to_write(work), reads=read)
    first, *spans = _spans(work, dense, how, speed, planned)
    held = memory(work, how)
    peaks = {phase: process_bytes(parts, how.device) for phase, parts in held.items()}
    return {
        "model": recipe.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "params_before": budget.total,
        "params_after": budget.keep,
        "stages": [asdict(stage) | {"seconds": span} for stage, span in zip(work.stages, spans, strict=True)],
        "seconds": first + sum(spans),
        "minutes": recipe.minutes,
        "time_by": "probe" if measured else "assumption",
        "speed": speed.words,
        "time_without": _left_out(planned, unread=evaluation.source is not None and not read),
        "processes": how.processes,
        "parallel": recipe.parallel,
        "device": how.device,
        "memory": {phase: {"bytes": peaks[phase], "of": parts} for phase, parts in held.items()},
        "peak_bytes": max(peaks.values()),
        "too_large": too_large(work, how, free=free) or None,
    }


def _spans(work: Work, dense: Shapes, how: Setup, speed: Speed, planned: Planned) -> list[float]:
    """Seconds before the first stage, and of each stage."""
    spans = [0.0] * (1 + len(work.stages))
    for item in planned.items:
        number, ease = item["stage"], phase_of(item["phase"]).ease if how.device == "cpu" else 1.0
        flops = item["times"] * (item["flops"] or 0.0) / ease
        if item["phase"] == "train":
            stage = work.stages[number - 1]
            spans[number] += seconds(shapes_in_training(work, stage, dense), how, speed, flops=flops, trained=stage.tokens)
        else:
            spans[number] += seconds(dense, how, speed, flops=flops)
    return spans


def _left_out(planned: Planned, *, unread: bool) -> list[str]:
    """Names of the work whose operations nobody knows; `unread` says whether held-out text of an unknown length is among it."""
    unknown = dict.fromkeys(item["phase"] for item in planned.items if item["flops"] is None)
    names = [Progress(phase=phase, done=0, of=0, task="tasks", what="text").doing for phase in unknown]
    return [*names, *(["reading the whole held-out text"] if unread else [])]


def _probe(work: Work, *, narrow: bool) -> Speed:
    """The speed of this machine with the model, measured on one batch of random tokens."""
    recipe, model = work.recipe, work.model
    work.tell(Probe())
    length = recipe.calibration.length
    shape = (max(1, _PROBED_TOKENS // length), length)
    batch = random_rows(model, *shape)
    for _ in range(2):  # the first pass of a process is slow
        span = seconds_of(partial(score_rows, work, batch))
    device = next(model.parameters()).device
    flops = batch.numel() * operations(shapes(model), Setup(device.type, narrow, length), kind="score") / span
    return Speed(flops, f"this machine reaches {flops / 1e12:.3g} TFLOP/s with this model")
