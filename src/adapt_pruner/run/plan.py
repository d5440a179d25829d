"""The plan of a run: its phases with their operations, its seconds, and what it takes of memory and disk; whether that is here.

It is made once. A run tells it, so that its end can be predicted; a dry run prints it; `shrink` chooses by it.
"""

import itertools
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapt_pruner.checkpoint.save import SHARD_BYTES
from adapt_pruner.checkpoint.shelved import PLACES, Offload
from adapt_pruner.core.events import phase_of
from adapt_pruner.core.events.run import Item, Planned
from adapt_pruner.core.events.words import millions, typed
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.model.shelf import SCRATCH
from adapt_pruner.core.system import world
from adapt_pruner.core.system.files import check_disk_space, files_in
from adapt_pruner.data.selfwritten import BATCH, BATCH_FROM_SHELF
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.errors import UsageError, settings
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.recipe.prune_recipe import to_prune
from adapt_pruner.reduce.units import by_passes, evidence_of, metrics_of
from adapt_pruner.run.checkpoints import kept
from adapt_pruner.run.conversations import specs_to_write
from adapt_pruner.run.estimate import (
    DISK,
    Setup,
    Shapes,
    Speed,
    operations,
    process_bytes,
    pruning_memory,
    repair_memory,
    shapes,
    training_memory,
    writing_memory,
)
from adapt_pruner.run.estimate import seconds as seconds_of
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Stage, Work

_GIB = 2**30
_READS = {"score": 2, "blocks": 2, "heads": 2, "repair": 4, "evaluate": 1}
"""Phase -> how often it reads all weights, with weights on disk."""
LEAN: dict[str, Any] = {"training.weights": "bfloat16", "training.lora.rank": 16}
"""Keys of a recipe that trains where memory has no room for more: additions of low rank to weights in bfloat16."""
_FLOAT = 4  # bytes of a number in a checkpoint


def setup_of(
    work: Work, *, device: torch.device | None = None, teacher: Shapes | None = None, processes: int | None = None
) -> Setup:
    """How a run trains, seen from one of its processes.

    Args:
        work: the run.
        device: where; None for where the model lies.
        teacher: its shapes, if the run distils; None for those of the model.
        processes: their number; None for the present one.
    """
    recipe, training, device = work.recipe, work.recipe.training, device or work.model.device
    taught = training.source is not None and training.needs_teacher
    return Setup(
        device="cpu" if device.type == "cpu" else "cuda", length=training.length,
        narrow=training.weights == "bfloat16" or uses_bfloat16(device, recipe.dtype), stored=2 if training.weights == "bfloat16" else 4,
        bits=training.moment_bits, in_backward=training.step_in_backward, micro_tokens=work.pass_tokens, batch_tokens=training.step_tokens, checkpointing=training.gradient_checkpointing,
        lora=0 if training.lora is None else training.lora.rank, teacher=(teacher or shapes(work.model)) if taught else None,
        processes=processes or world.size(), parallel=recipe.parallel, offload=work.loaded.offload,
        file_bytes=getattr(work.model.config.dtype, "itemsize", 4),
    )  # fmt: skip


def needs_whole_model(work: Work) -> str:
    """Why a run needs all weights in memory as float32, in words that begin a sentence; empty if one layer after the other is enough."""
    recipe = work.recipe
    metrics = () if not work.reduction.goes_by_layer else metrics_of(work, seed=0)
    needs = {evidence_of(work, [metric]) for metric in metrics}
    reasons = {
        f"reduce {recipe.reduce!r}": not work.reduction.goes_by_layer,
        "a latency budget": bool(recipe.latency),
        f"objective {recipe.training.objective!r}": bool(recipe.training.tokens) and recipe.training.needs_teacher,
        "init=random": recipe.init == "random",
        "a smaller vocabulary": recipe.vocabulary is not None,
        f"metric {recipe.metric!r}": bool(needs & {Evidence.STREAM_GRADIENTS, Evidence.SAMPLE_GRADIENTS})
        or by_passes(work, "metric") is not None,
        "a model with a weight mask": work.weight_mask is not None,
        "text that the model writes to train on": bool(specs_to_write(recipe)),
    }
    return next((f"{what} needs the whole model in memory" for what, applies in reasons.items() if applies), "")


def offload_of(work: Work, how: Setup, *, free: int | None) -> Offload:
    """Where the weights of a run lie while no pass needs them: as its recipe says; with `auto`, the first place that fits, or memory."""
    if work.recipe.offload != "auto":
        return work.recipe.offload
    if free is None or needs_whole_model(work):
        return "none"
    return next((place for place in PLACES if most_bytes(work, replace(how, offload=place)) <= free), "none")


def writes_text(recipe: Recipe) -> bool:
    """Whether the model writes its calibration text itself."""
    return recipe.calibration.ids is None and SELF in domains(recipe.calibration.source)


def phases(work: Work, how: Setup, *, begun: bool = False, reads: int | None = None) -> Planned:
    """The phases that a run has before it, with their operations; of a resumed run, those that are left.

    Args:
        work: the run, with its stages.
        how: how the run trains, and where.
        begun: whether the run began earlier, so that the model has written its texts.
        reads: tokens of held-out text. None, before that text is read, counts `evaluation.max_windows` windows, or 64 if that
            is null.
    """
    recipe, state, now = work.recipe, work.state, shapes(work.model)
    calibration, evaluation = recipe.calibration, recipe.evaluation
    items: list[Item] = []
    if reads is None:
        reads = 0 if evaluation.source is None else evaluation.window * (evaluation.max_windows or 64)

    def add(phase: str, stage: int, flops: float | None = 0.0, *, times: int = 1, repeats: bool = False) -> None:
        items.append(Item(phase=phase, stage=stage, times=times, flops=flops, repeats=repeats))

    def measure(stage: int, of: Shapes, *, tasks: bool) -> None:
        if reads:
            add("evaluate", stage, reads * operations(of, replace(how, length=evaluation.window), kind="read"))
        if tasks and evaluation.tasks is not None:
            add("task", stage, None)

    for samples in () if begun else _written(work):
        if samples:  # on a GPU the time of a token depends on its kernels, not on its operations
            a_token = operations(now, replace(how, length=calibration.length), kind="read")
            add("write", 0, None if how.device == "cuda" else samples * calibration.length * a_token)
    if "params_before" not in state.figures:
        measure(0, now, tasks=True)
    tokens, whole = [], 0
    for stage in work.stages:
        done, whole = stage.stage < state.stage, whole + stage.tokens
        left = 0 if done else max(0, min(stage.tokens, whole - state.progress.tokens))
        tokens.append(left)
        if done:
            continue
        if stage.stage > 1:
            add("save", stage.stage)
        of = now.cut_to(min(now.params, stage.params))
        if not (state.pruned and stage.stage == state.stage):
            for phase, once, times in _iteration(work, stage, now, how):
                add(phase, stage.stage, once, times=times, repeats=True)
            if stage.tokens:
                measure(stage.stage, of, tasks=False)
        if stage.tokens:
            add("save", stage.stage)
            add("train", stage.stage, left * operations(_in_training(work, stage, now), how, kind="train"))
        measure(stage.stage, of, tasks=stage.stage == recipe.stages)
    add("finish", 0)
    return Planned(targets=[stage.params for stage in work.stages], tokens=tokens, items=items, **work.deadline)


def _written(work: Work) -> tuple[int, int, int]:
    """Sequences that the model writes to calibrate on, for the repair, and to train on."""
    recipe, calibration = work.recipe, work.recipe.calibration
    return (
        calibration.samples if work.reads_text and writes_text(recipe) else 0,
        calibration.self_generated if recipe.repair is not None else 0,
        recipe.training.written if specs_to_write(recipe) else 0,
    )


def _reads(work: Work, phase: str) -> float:
    """How often a phase reads all weights, with weights on disk; of the texts that the model writes, the mean."""
    if phase != "write":
        return _READS.get(phase, 0)
    batches = [math.ceil(samples / BATCH_FROM_SHELF) for samples in _written(work) if samples]
    return work.recipe.calibration.length * sum(batches) / len(batches)  # once for each token of a batch


def _halfway(work: Work, stage: Stage, now: Shapes, *, start: int) -> tuple[int, int]:
    """Parameters as planned where a stage begins, and halfway between those that the model has then and its end."""
    planned = min((other.params for other in work.stages if other.stage < stage.stage), default=start)
    begins = min(now.params, planned)
    return planned, (begins + min(begins, stage.params)) // 2


def _in_training(work: Work, stage: Stage, now: Shapes) -> Shapes:
    """The shapes of the model while a stage trains; halfway between its start and end if it cuts while it trains."""
    if "training" not in parts.needs("reduce", work.recipe.reduce):
        return now.cut_to(min(now.params, stage.params))
    return now.cut_to(_halfway(work, stage, now, start=now.params)[1])


def _iteration(work: Work, stage: Stage, now: Shapes, how: Setup) -> list[tuple[str, float | None, int]]:
    """Each phase of an iteration: its name, its operations, and how often it runs in the stage."""
    start = work.state.figures.get("params_after_vocabulary", work.dense_params)
    planned, halfway = _halfway(work, stage, now, start=start)
    of, how, times = now.cut_to(halfway), replace(how, length=work.recipe.calibration.length, teacher=None), stage.iterations
    if now.params < planned:  # some of its cuts are done
        times = work.reduction.num_steps(work, start=start, reached=now.params, target=stage.params)
    read, both = operations(of, how, kind="read"), operations(of, how, kind="score")
    items: list[tuple[str, float | None, int]] = []
    for phase, passes in work.reduction.phases(work, stage.params).items():
        flops = None if passes.flops is None else passes.forward * read + passes.both * both + passes.flops
        items.append((phase, flops, times if passes.times is None else passes.times))
    return [*items, ("cut", 0.0, times)]


def seconds(work: Work, how: Setup, speed: Speed, planned: Planned) -> dict[tuple[int, str], float]:
    """Stage and phase -> its seconds, as far as its operations are known. Stage 0 is what comes before the first.

    With weights on disk a phase takes the time of its operations or of reading the weights, whichever is longer.
    """
    dense, by_phase = shapes(work.model), dict[tuple[int, str], float]()
    for item in planned.items:
        phase, number, of, tokens, taught = item["phase"], item["stage"], dense, 0, 0.0
        flops = item["times"] * (item["flops"] or 0.0) / (phase_of(phase).ease if how.device == "cpu" else 1.0)
        if phase == "train":
            of, tokens = _in_training(work, work.stages[number - 1], dense), work.stages[number - 1].tokens
            taught = 0.0 if how.teacher is None else tokens * operations(how.teacher, how, kind="read")  # a teacher only reads
        took = seconds_of(of, how, speed.of(phase), flops=flops - taught, trained=tokens)
        if how.offload == "disk":
            took = max(took, item["times"] * _reads(work, phase) * how.file_bytes * dense.params / DISK)
        by_phase[number, phase] = by_phase.get((number, phase), 0.0) + took + seconds_of(dense, how, speed, flops=taught)
    return by_phase


def memory(work: Work, how: Setup, *, dense: Shapes | None = None) -> dict[str, dict[str, int]]:
    """Phase -> what of it holds memory -> bytes of one process at its peak, by the formulas of `estimate`.

    Args:
        work: the run, with its stages; the model may lie on the meta device.
        how: how it trains, and where.
        dense: the shapes of the model at the start, or of another; None for those of the run's model.
    """
    recipe, dense, use = work.recipe, dense or shapes(work.model), work.reduction.text_use(work)
    calibration = recipe.calibration
    moments = bool(recipe.training.tokens) and recipe.moments == "carry" and recipe.stages > 1 and recipe.training.lora is None
    scoring = partial(
        pruning_memory, dense, how, samples=calibration.samples, length=calibration.length, moments=moments,
        reads=use.forward or recipe.evaluation.source is not None,
    )  # fmt: skip
    after = dense.cut_to(round(dense.params * work.stages[0].params / work.num_params)) if work.stages else dense
    passes = [scoring(evidence=use.evidence)]
    if rows := min(BATCH if how.offload == "none" else BATCH_FROM_SHELF, max(_written(work))):
        passes.append(writing_memory(dense, how, rows=rows, length=calibration.length, moments=moments))
    if use.streams:  # fits to every second row of a batch
        passes.append(scoring(evidence=Evidence.STREAM_GRADIENTS, halved=True))
    if recipe.repair is not None and "gram" in parts.needs("repair", recipe.repair):
        samples = calibration.samples + calibration.self_generated + calibration.repair_samples
        options = parts.bind("repair", recipe.repair).keywords
        chosen, sequential = options.get("ridge", 0) is None, bool(options.get("sequential"))
        stays = max(1 - recipe.step, after.decoder / dense.decoder)
        passes.append(
            repair_memory(
                dense, how, samples=samples, length=calibration.length, moments=moments, stays=stays, chosen=chosen, sequential=sequential,
            )
        )  # fmt: skip
    peaks = {"pruning": max(passes, key=lambda parts: sum(parts.values()))}
    if recipe.training.tokens:
        while_cutting = "training" in parts.needs("reduce", recipe.reduce)
        peaks["training"] = training_memory(dense if while_cutting else after, how)
    return peaks


def most_bytes(work: Work, how: Setup, *, dense: Shapes | None = None) -> int:
    """Bytes that a process of the run occupies at its peak; see `memory`."""
    return max(process_bytes(parts, how.device) for parts in memory(work, how, dense=dense).values())


def largest(work: Work, how: Setup, *, free: int) -> int:
    """Parameters of the largest model of the same proportions for which the run fits, to two digits; 0 if none does."""
    dense, least, most = shapes(work.model), 0.0, 1.0
    for _ in range(20):
        scale = (least + most) / 2
        least, most = (scale, most) if most_bytes(work, how, dense=dense.scaled(scale)) <= free else (least, scale)
    params = dense.scaled(least).params if least else 0
    return round(params, 1 - int(math.log10(params))) if params else 0


def too_large(work: Work, how: Setup, *, free: int | None) -> str:
    """A sentence if a run takes more memory than is free, with a way that fits; else an empty one."""
    needed, trains = most_bytes(work, how), bool(work.recipe.training.tokens)
    if free is None or needed <= free:
        return ""
    ways: Iterable[tuple[str, int]] = ways_to_prune(work.model, work.recipe, how)
    ways = itertools.chain(_ways_to_train(work, how), ways) if trains else ways
    instead = next((f"this fits here, in {size / _GIB:.1f} GiB: {words}" for words, size in ways if size <= free), "")
    fits = (
        f"; with these settings, a model of about {millions(params)} parameters would fit"
        if (params := largest(work, how, free=free))
        else ""
    )
    return (
        f"{work.recipe.model} needs {needed / _GIB:.1f} GiB of memory to {'train' if trains else 'prune'}, but only {free / _GIB:.1f} GiB are free; "
        + (instead or f"nothing that makes it smaller fits here: take a machine with {math.ceil(needed / _GIB)} GiB") + fits
    )  # fmt: skip


def _ways_to_train(work: Work, how: Setup) -> Iterator[tuple[str, int]]:
    """Settings with which the same run takes less memory, one more at a time, with the bytes that it then needs."""
    changed: dict[str, Any] = {}
    if work.recipe.offload != "none" and not needs_whole_model(work):
        how = replace(how, offload="disk")  # as `auto` chooses by itself
    for keys, lean in lean_training(how):
        changed, how = changed | keys, replace(how, **lean)
        yield settings({key: value for key, value in changed.items() if value is not None}), most_bytes(work, how)


def lean_training(how: Setup) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Keys of a recipe that let a training take less memory, the cheapest first, and the same as fields of a `Setup`.

    Each comes on top of those before. None stands for the default.
    """
    yield {"training.gradient_checkpointing": True}, {"checkpointing": True}
    yield {"training.micro_batch_tokens": how.length}, {"micro_tokens": how.length}
    if how.narrow:
        yield {"training.weights": "bfloat16", "training.optimizer": "adamw8bit"}, {"stored": 2, "bits": 8}
        yield {"training.optimizer": None, **LEAN}, {"bits": 32, "lora": LEAN["training.lora.rank"]}


def ways_to_prune(model: Any, recipe: Recipe, how: Setup) -> Iterator[tuple[str, int]]:
    """Commands that prune a model to a recipe's size without training, the best first, with the bytes that each needs."""
    common = {"model": recipe.model, "device": recipe.device, "dtype": recipe.dtype}
    options = {"budget": "--params", "sparsity": "--sparsity", "latency": "--latency"}
    given = {key: value for key in options if (value := getattr(recipe, key))}
    typed_size = [word for key, value in given.items() for word in (options[key], value)]
    lightest = "magnitude-sparse" if recipe.sparsity else "magnitude-all"
    ways: list[tuple[dict[str, Any], list[str]]] = [({"method": lightest}, ["--method", lightest])]
    if not (recipe.sparsity or recipe.latency):  # zeros, and a size that is measured, need the whole model
        from_disk = {"offload": "disk", "calibration.source": "TEXT", "calibration.self_generated": 0}
        ways.insert(0, (from_disk, ["--offload", "disk", "--calibration", "TEXT", "--set", "calibration.self_generated=0"]))
    if not recipe.sparsity:
        ways.insert(0, ({}, []))
    for keys, words in ways:
        place: Offload = keys.get("offload", "none")
        pruning = Work.of(model, to_prune({**common, **given, **keys}))
        line = typed("prune", recipe.model, "-o", "DIR", *typed_size, *words)
        yield f"`{line}`", most_bytes(pruning, replace(how, teacher=None, offload=place))


def check_scratch(work: Work, scratch: Path) -> None:
    """Refuse a folder for changed weights that is none, or too small for them and for the hidden states of a pass.

    Raises:
        UsageError: it is refused.
    """
    recipe, model = work.recipe, work.model
    gates = {axis.gate.module for axis in work.axes if axis.gate.is_linear}
    changed = sum(model.get_parameter(f"{name}.weight").numel() for name in gates) if recipe.repair is not None else 0
    if recipe.training.tokens:
        changed = max(changed, work.num_params)
    hidden = len(decoder_layers(model)) * recipe.calibration.samples * recipe.calibration.length * shapes(model).width
    if not scratch.is_dir():
        raise UsageError(f"{scratch} is no folder, and changed weights would go there; make it, or name another in {SCRATCH}")
    if (free := shutil.disk_usage(scratch).free) < (needed := _FLOAT * (changed + hidden)):
        raise UsageError(
            f"{scratch} has {free / _GIB:.1f} GiB left, and pruning writes up to {needed / _GIB:.1f} GiB of changed weights and hidden states there; "
            f"make room, or name a folder on another disk in {SCRATCH}"
        )


def check_result(work: Work, path: Path) -> None:
    """Refuse a place without room for the resulting model.

    Raises:
        UsageError: there is too little room.
    """
    num_bytes = _result_bytes(work)
    check_disk_space(path, num_bytes, largest=min(num_bytes, SHARD_BYTES))


def check_run(work: Work, path: Path, checkpoints: Path) -> None:
    """Refuse a run's folder without room for the result and for all checkpoints that exist at the same time.

    Each stage writes a checkpoint after its cuts if it trains, and one at its end unless it is the last. As many stay as the
    recipe keeps, and one more while the next is written. Checkpoints that lie in the folder already make room for new ones.

    Raises:
        UsageError: there is too little room.
    """
    recipe, state, keep = work.recipe, work.state, kept(work.recipe)
    trains = work.data.feed is not None
    with_moments = trains and recipe.training.lora is None
    beside = recipe.training.moment_bits / 16  # bytes of a parameter's moments, per byte of its float32 weight
    sizes, largest = [], _result_bytes(work)
    for stage in work.stages[state.stage - 1 :]:
        weights = _FLOAT * min(stage.params, work.num_params)
        if trains and not (state.pruned and stage.stage == state.stage):
            carried = with_moments and stage.stage > 1 and recipe.moments == "carry"
            sizes.append(round(weights * (1 + beside * carried)))
        if stage.stage < recipe.stages:
            sizes.append(round(weights * (1 + beside * with_moments)))
            largest = max(largest, round(weights * max(1, beside * with_moments)))
    windows = [sizes[max(0, end - keep - 1) : end] for end in range(1, len(sizes) + 1)]
    most = max(sum(together) for together in ([*sizes[-keep:], _result_bytes(work)], *windows))
    there = sum(file.stat().st_size for file in files_in(checkpoints).values())
    check_disk_space(path, most, largest=min(largest, SHARD_BYTES) if not with_moments else largest, there=there)


def _result_bytes(work: Work) -> int:
    return min(work.budget.keep, work.num_params) * work.loaded.dtype.itemsize
