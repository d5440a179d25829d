"""Predict a run's time and memory before it starts, by formulas and a quick probe; without weights, by formulas alone."""

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from adapt_pruner.checkpoint.load import has_weights, load_shapes
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.events import Listener
from adapt_pruner.core.precision import uses_bfloat16
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.reduce.reduction import TextUse
from adapt_pruner.reduce.work import Work
from adapt_pruner.run.estimate import (
    PAPER,
    Setup,
    Shapes,
    Speed,
    operations,
    process_bytes,
    pruning_memory,
    seconds,
    setup_of,
    shapes,
    training_memory,
)
from adapt_pruner.run.start import begin, plan, prepare, writes_text
from adapt_pruner.score.calibrate import Evidence, score
from adapt_pruner.score.weights import taylor

__all__ = ["dry_run"]

_PROBED_TOKENS = 512


def dry_run(
    recipe: Recipe, *, listen: Listener = lambda event: None, trust_remote_code: bool = False, processes: int = 1
) -> dict[str, Any]:
    """The plan of a run, with its time and memory; nothing is written.

    If the weights are on this machine, the model is loaded and the texts are found. A batch of random tokens, forward and
    backward, then probes the speed. Otherwise only config.json is read, and the speed is assumed. Memory and operations are those
    of `estimate`. The time covers passes over the texts; `time_without` names the work that it leaves out. `minutes` are those of
    the recipe, which may end its training sooner.

    Args:
        recipe: the run.
        listen: told of events.
        trust_remote_code: whether code that comes with the model may run.
        processes: number of processes that would share the work.

    Raises:
        UsageError: the recipe does not fit the model, or a text, task or package is missing.
    """
    recipe = recipe.ready()
    on_paper = not has_weights(recipe.model)
    if not on_paper:
        work = begin(recipe, listen, trust_remote_code=trust_remote_code)
        prepare(work, write=False)
        teacher = None if work.data.teacher is None else shapes(work.data.teacher)
        device = next(work.model.parameters()).device
        narrow = uses_bfloat16(device, recipe.dtype)
        speed = _probe(work, narrow=narrow)
        kind = "cpu" if device.type == "cpu" else "cuda"
    elif recipe.latency:
        raise UsageError(
            f"latency {recipe.latency} needs a measurement, but the weights of {recipe.model} are not on this machine; set a "
            "budget instead"
        )
    else:
        work = Work.of(load_shapes(recipe.model, trust_remote_code=trust_remote_code), recipe)
        _cut_on_paper(work)
        work.stages, work.budget = plan(work)
        teacher = _teacher(work, trust_remote_code)
        kind = "cpu" if recipe.device == "cpu" else "cuda"
        narrow = recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and kind == "cuda")
        speed = PAPER[kind]
    how = setup_of(recipe, device=kind, narrow=narrow, teacher=teacher, processes=processes)
    return _told(work, how, speed, on_paper=on_paper)


def _cut_on_paper(work: Work) -> None:
    """Shrink the vocabulary of a model without weights, in place, to the recipe's `vocabulary.keep`."""
    asked = work.recipe.vocabulary
    if asked is not None and asked.keep is not None:
        tokens = [axis for axis in work.axes if axis.kind == "vocabulary"]
        work.shrink(Mask({axis.name: torch.arange(axis.size) < asked.keep for axis in tokens}))
        work.state.figures["params_after_vocabulary"] = work.num_params


def _told(work: Work, how: Setup, speed: Speed, *, on_paper: bool) -> dict[str, Any]:
    recipe, budget, dense, use = work.recipe, work.budget, shapes(work.model), work.reduction.text_use(work)
    spans, evaluation = [], recipe.evaluation
    windows = sum(window.numel() for window in work.data.held_out)  # not read where there are no weights
    read = windows or (0 if evaluation.source is None else evaluation.window * (evaluation.max_windows or 0))
    first = seconds(dense, how, speed, scored=0, trained=0, read=read)
    while_cutting = "training" in parts.needs("reduce", recipe.reduce)
    begins = [dense.params, *(stage.params for stage in work.stages)]
    for stage, before in zip(work.stages, begins, strict=False):
        scored = stage.calibration_tokens if use.text else 0
        looked = read * (2 if stage.tokens else 1)  # after the cuts as well as after training
        size = dense.cut_to((before + stage.params) // 2 if while_cutting else stage.params)
        spans.append(seconds(size, how, speed, scored=scored, trained=stage.tokens, read=looked))
    trains = bool(recipe.training.tokens)
    carried = trains and recipe.moments == "carry" and recipe.stages > 1 and recipe.training.lora is None
    asked = recipe.calibration
    scoring = partial(
        pruning_memory,
        dense,
        how,
        samples=asked.samples,
        length=asked.length,
        moments=carried,
        reads=use.forward or evaluation.source is not None,
    )
    passes = [scoring(evidence=use.evidence)]
    if use.streams:  # fits to every second row of a batch
        passes.append(scoring(evidence=Evidence.STREAM_GRADIENTS, halved=True))
    memory = {"pruning": max(passes, key=lambda parts: sum(parts.values()))}
    if trains:
        memory["training"] = training_memory(dense if while_cutting else dense.cut_to(work.stages[0].params), how)
    peaks = {phase: process_bytes(parts, how.device) for phase, parts in memory.items()}
    return {
        "model": recipe.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "params_before": budget.total,
        "params_after": budget.keep,
        "stages": [asdict(stage) | {"seconds": span} for stage, span in zip(work.stages, spans, strict=True)],
        "seconds": first + sum(spans),
        "minutes": recipe.minutes,
        "time_by": "assumption" if on_paper else "probe",
        "speed": speed.words,
        "time_without": _left_out(work, use, read=read),
        "processes": how.processes,
        "parallel": recipe.parallel,
        "device": how.device,
        "memory": {phase: {"bytes": peaks[phase], "of": parts} for phase, parts in memory.items()},
        "peak_bytes": max(peaks.values()),
    }


def _left_out(work: Work, use: TextUse, *, read: int) -> list[str]:
    """Names of the work whose time is not predicted; `read` tokens of held-out text are."""
    recipe = work.recipe
    writes = (recipe.calibration.self_generated > 0 and recipe.repair is not None) or (use.text and writes_text(recipe))
    return [
        *(["text that the model writes itself"] if writes else []),
        *use.unpredicted,
        *(["tasks"] if recipe.evaluation.tasks is not None else []),
        *(["reading the whole held-out text"] if recipe.evaluation.source is not None and not read else []),
    ]


def _probe(work: Work, *, narrow: bool) -> Speed:
    """The speed of this machine with the model, measured on one batch of random tokens."""
    recipe, model = work.recipe, work.model
    length = recipe.calibration.length
    shape = (max(1, _PROBED_TOKENS // length), length)
    batch = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    axes = [axis for axis in work.axes if axis.layer is not None or axis.kind in recipe.axes]
    for _ in range(2):  # the first pass of a process is slow
        began = time.perf_counter()
        score(model, axes, [batch], metrics=[taylor], dtype=recipe.dtype)
    span = time.perf_counter() - began
    device = next(model.parameters()).device
    flops = batch.numel() * operations(shapes(model), Setup(device.type, narrow, length), kind="score") / span
    return Speed(flops, f"this machine reaches {flops / 1e12:.3g} TFLOP/s with this model")


def _teacher(work: Work, trust_remote_code: bool) -> Shapes | None:
    asked = work.recipe.training
    if asked.source is None or not asked.needs_teacher:
        return None
    return shapes(work.model if asked.teacher is None else load_shapes(asked.teacher, trust_remote_code=trust_remote_code))
