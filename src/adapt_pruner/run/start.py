"""Prepare a run: load the model, plan its stages and find the texts that they read."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load, load_shapes, locate, pick_device
from adapt_pruner.checkpoint.save import can_save_unequal_layers, stock_class
from adapt_pruner.checkpoint.shelved import Offload, Shelving
from adapt_pruner.checkpoint.state import identity
from adapt_pruner.checkpoint.vocabulary import kept_tokens, smaller_tokenizer
from adapt_pruner.core import events
from adapt_pruner.core.events import Find, Listener, Load, Start
from adapt_pruner.core.events.run import VocabularyCut
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.feed import Feed
from adapt_pruner.core.model.kinds import BLOCKS, OF_THE_MODEL
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.model.shards import stage_tokens
from adapt_pruner.core.system import filenames, world
from adapt_pruner.core.system.files import write_whole
from adapt_pruner.core.system.memory import free_bytes
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.data.fixed import Rows, Written
from adapt_pruner.data.overlap import overlaps, same_tokens
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import Source, domains, written_spec
from adapt_pruner.data.tokens import batches_of, calibration_ids, digest_of, token_uses
from adapt_pruner.data.windows import MICRO_TOKENS, too_long
from adapt_pruner.errors import RunError, UsageError, of_all
from adapt_pruner.evaluate.anatomy import decoder_parameters, expert_parameters
from adapt_pruner.evaluate.task_sources import Wanted, check_tasks, find_tasks
from adapt_pruner.evaluate.tasks import set_shots
from adapt_pruner.grow import grown
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.run import latency
from adapt_pruner.run.conversations import dense_again, held_out_chats, specs_to_write, written_texts
from adapt_pruner.run.estimate import PAPER, Setup, shapes
from adapt_pruner.run.folder import writing
from adapt_pruner.run.plan import (
    check_scratch,
    needs_whole_model,
    offload_of,
    phases,
    setup_of,
    too_large,
    writes_text,
)
from adapt_pruner.run.towers import check_towers
from adapt_pruner.run.training import teacher_of
from adapt_pruner.train.loop import whole_batches
from adapt_pruner.work import RunData, RunState, Stage, Work


def on_paper(recipe: Recipe, *, here: bool, trust_remote_code: bool = False, processes: int | None = None) -> tuple[Work, Setup]:
    """A run by its config.json alone, planned as far as that tells, and how it trains: on this machine, or else on a GPU or CPU.

    It is one of so many `processes`, or of those that run now.

    Raises:
        UsageError: the model cannot be loaded, or the recipe does not fit it.
    """
    if recipe.grow is not None:
        raise UsageError(
            f"grow copies weights, and those of {recipe.model} are not on this machine; fetch the model, or leave grow out of the plan"
        )
    work = Work.of(load_shapes(recipe.model, trust_remote_code=trust_remote_code, any_task=True), recipe)
    keep = None if recipe.vocabulary is None else recipe.vocabulary.keep
    if keep is not None:
        work.shrink(Mask({axis.name: torch.arange(axis.size) < keep for axis in work.axes if axis.kind == "vocabulary"}))
        work.state.figures["params_after_vocabulary"] = work.num_params
    if recipe.latency:  # its size is measured later
        work.stages = stages(work, start=work.num_params, end=work.num_params)
    else:
        work.stages, work.budget = plan(work)
    teacher = None
    if recipe.training.teacher is not None:
        teacher = shapes(load_shapes(recipe.training.teacher, trust_remote_code=trust_remote_code, any_task=True))
    if here:
        how = setup_of(work, device=pick_device(recipe.device), teacher=teacher, processes=processes)
        return work, replace(how, offload=offload_of(work, how, free=free_bytes(pick_device(recipe.device))))
    device = "cpu" if recipe.device == "cpu" else "cuda"
    narrow = recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and device == "cuda")
    how = replace(setup_of(work, device=torch.device(device), teacher=teacher, processes=processes), narrow=narrow)
    return work, replace(how, offload=offload_of(work, how, free=PAPER[device].memory))


def placed(recipe: Recipe, *, trust_remote_code: bool = False, again: bool = False) -> tuple[Offload, str]:
    """Where the weights of a run will lie, and a sentence if it takes more memory than is free here, or else an empty one.

    Where config.json does not tell the sizes, `auto` is in memory and the sentence is empty. With `again`, the run may use gradient
    checkpointing although the recipe does not say so.
    """
    if locate(recipe.model)[1] is not None or recipe.vocabulary is not None or recipe.grow is not None:
        return "none" if recipe.offload == "auto" else recipe.offload, ""
    work, how = on_paper(recipe, here=True, trust_remote_code=trust_remote_code)
    free, how = free_bytes(pick_device(recipe.device)), replace(how, checkpointing=how.checkpointing or again)
    how = replace(how, offload=offload_of(work, how, free=free))
    return world.agreed((how.offload, too_large(work, how, free=free)))


def begin(
    recipe: Recipe,
    listen: Listener,
    *,
    trust_remote_code: bool = False,
    place: Offload | None = None,
    scratch: Path | None = None,
) -> Work:
    """A run at its start: load the model, cut its vocabulary and turn a latency into a number of parameters.

    Without a `place` for its weights, one that fits is found, and a run that takes more memory than is free here is refused before
    its weights are read. `scratch` is the folder for changed weights of a model whose weights stay on disk; ADAPT_PRUNER_SCRATCH
    goes before it.

    Raises:
        UsageError: there is too little memory, the model cannot be loaded, its vocabulary cannot be cut, or the latency cannot be reached.
    """
    listen(Load(model=recipe.model))
    if place is None:
        place, trouble = placed(recipe, trust_remote_code=trust_remote_code)
        if trouble:
            raise of_all(UsageError(trouble))
    device, fresh = pick_device(recipe.device), recipe.seed if recipe.init == "random" else None
    shelving = Shelving.at(place, scratch)
    loaded = load(
        recipe.model,
        device=device,
        trust_remote_code=trust_remote_code,
        fresh=fresh,
        shelving=shelving,
        any_task=recipe.grow is None,
    )
    found, checked = count_parameters(loaded.model), families.summary(loaded.model.config)
    listen(events.Loaded(model=recipe.model, params=found, dequantised=loaded.dequantised, may_shrink=checked))
    loaded = grown(loaded, recipe.grow, seed=recipe.seed, listen=listen)
    dense = count_parameters(loaded.model)
    loaded, mask = _cut_vocabulary(loaded, recipe, listen)
    state = RunState(mask=mask, began=families.sizes(loaded.model))
    if recipe.grow is not None:
        state.figures["grown_from"] = found
    if (zeros := loaded.weight_mask) is not None:
        if unmasked := zeros.unmasked(loaded.model):
            raise RunError(
                f"the mask over weights of {recipe.model} does not fit these weights: {unmasked[0]} is not zero where the mask "
                "says so; remove the folder sparsity/ to start with the weights as they are"
            )
        state.figures["sparsity_before"] = "" if zeros.pattern is None else str(zeros.pattern)
    if (tokens := mask.kept.get("vocabulary")) is not None:
        state.figures |= {"vocabulary_before": tokens.numel(), "vocabulary_after": int(tokens.sum())}
        state.figures["params_after_vocabulary"] = count_parameters(loaded.model)
    work = Work(loaded, recipe, listen, trust_remote_code, state, dense_params=dense)
    if shelving is not None and shelving.scratch is not None:
        check_scratch(work, shelving.scratch)
    state.figures |= world.on_main(lambda: latency.budget_for(work))
    return work


def _cut_vocabulary(loaded: Loaded, recipe: Recipe, listen: Listener) -> tuple[Loaded, Mask]:
    """Remove the tokens that the recipe does not keep from the model, in place, and make a smaller tokenizer.

    Returns:
        The model with the new tokenizer, and the mask of the tokens kept.

    Raises:
        UsageError: the text does not exist, or the tokenizer cannot be rewritten.
    """
    vocabulary, tokenizer = recipe.vocabulary, loaded.tokenizer
    if vocabulary is None or vocabulary.source is None:
        return loaded, Mask()
    axes, source = families.axes(loaded.model), vocabulary.source
    axis = next((axis for axis in axes if axis.kind == "vocabulary"), None)
    if axis is None:
        raise UsageError(
            f"models of type {loaded.model.config.model_type!r} cannot lose tokens; leave vocabulary out of the recipe"
        )
    configs = (loaded.model.config, loaded.model.generation_config)
    named = [getattr(config, field, None) for config in configs for field in axis.indices]
    numbers = [number for field in named for number in (field if isinstance(field, list) else [field]) if number is not None]
    how: dict[str, Any] = {"keep": vocabulary.keep, "min_uses": vocabulary.min_uses, "named": numbers}
    keep = world.on_main(lambda: kept_tokens(tokenizer, token_uses(tokenizer, source, size=axis.size), **how))
    smaller, mask = smaller_tokenizer(tokenizer, keep), Mask({"vocabulary": keep})
    cut(loaded.model, axes, mask)
    listen(VocabularyCut(tokens_before=axis.size, tokens=int(keep.sum()), params=count_parameters(loaded.model)))
    return replace(loaded, tokenizer=smaller), mask


def stage_targets(start: int, end: int, stages: int) -> list[int]:
    """Parameters after each of T stages, linear: N_k = N_0 - (N_0 - N_T) · k / T, in whole numbers."""
    return [start - (start - end) * k // stages for k in range(1, stages + 1)]


def plan(work: Work) -> tuple[list[Stage], Budget]:
    """The stages and the budget of a run; checks that the budget can be met.

    Raises:
        UsageError: the budget cannot be met, or the reduction cannot do what the recipe asks for.
    """
    recipe, figures = work.recipe, work.state.figures
    _check_class(work)
    check_towers(work)
    if recipe.offload in ("cpu", "disk") and (why := needs_whole_model(work)):
        raise UsageError(f"{why}, so offload={recipe.offload} cannot work; set offload=none")
    work.reduction.check(work)
    if recipe.makes_zeros:
        _check_zeros(work, cuts=False)
        return stages(work, start=work.num_params, end=work.num_params), Budget(keep=work.num_params, total=work.num_params)
    keep = latency.params_to_keep(recipe, figures)
    start, decoder = sizes_begun(work)
    budget = Budget.parse(
        recipe.budget if keep is None else keep,
        dense=work.dense_params,
        decoder=decoder,
        outside=start - decoder,
        experts=expert_parameters(work.axes, work.state.began),
    )
    total = work.num_params
    _check_zeros(work, cuts=total > budget.keep)
    if total > budget.keep and getattr(work.model.config, "block_sums", False):
        raise UsageError(
            f"{recipe.model} has SLoRB matrices beside its zeros, which cannot be cut; prune first, and train zeros in the result"
        )
    if total > budget.keep and families.is_sliced(work.model.config):
        raise UsageError(
            f"the model is sliced and has {total:,} parameters, more than the budget {budget.keep:,}, and a sliced model cannot be "
            "cut further; prune the dense model it came from"
        )
    if total > budget.keep:
        _check_saved(work)
        floor, when = work.reduction.floor(work)
        budget.check_reachable(floor, when=when)
    return stages(work, start=start, end=min(start, budget.keep)), budget


def _check_class(work: Work) -> None:
    """Refuse a model that only its own code can build: the result would be saved without that code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = work.model.config.model_type
    if type(work.model).__module__.startswith("transformers_modules.") and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"only code in the folder of {work.recipe.model} builds a model of type {kind!r}, and the result would be saved without "
            "it; register the class with transformers from Python, or name another model"
        )


def _check_saved(work: Work) -> None:
    """Refuse to make layers that differ in size if no class builds such a model, before any work is done."""
    recipe = work.recipe
    unequal = [axis for axis in recipe.axes if axis not in (*OF_THE_MODEL, "experts")]  # layers have as many experts each
    blocks = [axis for axis in unequal if axis in BLOCKS]
    chosen = "chosen" in parts.needs("reduce", recipe.reduce)
    if chosen and (blocks or (unequal and not recipe.equal_widths)) and not can_save_unequal_layers(work.model):
        remedy = "" if blocks else "set equal_widths=true, or "
        raise UsageError(
            f"{stock_class(work.model)} has no class in core/model/modeling_pruned.py, so layers that differ in size could not be "
            f"saved; {remedy}prune whole layers, for example with method=shortgpt"
        )


def _check_zeros(work: Work, *, cuts: bool) -> None:
    """Refuse settings that would fill a model's zeros, and a sparse model as its own teacher; `cuts` says whether units go.

    Raises:
        UsageError: the recipe asks for such a thing.
    """
    recipe, training, began_sparse = work.recipe, work.recipe.training, "sparsity_before" in work.state.figures
    if not (recipe.makes_zeros or began_sparse):
        return
    trains, reduce = training.source is not None, f"reduce={recipe.reduce.partition('(')[0]}"
    filling = {
        "repair": (cuts and recipe.repair is not None, "set repair=null"),
        reduce: (cuts and work.reduction.fills_zeros, "prune the model that it was made from"),
        "training.lora": (trains and training.lora is not None, "set training.lora=null, which trains the weights that stay"),
        "parallel=fsdp": (trains and recipe.parallel == "fsdp", "set parallel=ddp"),
    }
    for key, (given, remedy) in filling.items():
        if given:
            raise UsageError(f"{key} would not keep the zeros of a sparse model; {remedy}")
    if began_sparse and trains and training.needs_teacher and training.teacher is None:
        raise UsageError(
            f"{recipe.model} is sparse, and training.objective {training.objective!r} would use it as teacher; name the dense "
            "model as training.teacher"
        )


def sizes_begun(work: Work) -> tuple[int, int]:
    """Parameters of the model and of its decoder layers when pruning began, without removed tokens; the same in a resumed run."""
    figures = work.state.figures
    decoder = figures.get("decoder_params_before") or decoder_parameters(work.model)
    return figures.get("params_after_vocabulary", work.dense_params), decoder


def stages(work: Work, *, start: int, end: int) -> list[Stage]:
    """The stages of a run that goes from `start` parameters to `end`."""
    recipe, planned, reached = work.recipe, [], start
    tokens = stage_tokens(recipe.training.tokens, stages=recipe.stages, shards=recipe.training.shards)
    for k, (target, trained) in enumerate(zip(stage_targets(start, end, recipe.stages), tokens, strict=True), start=1):
        iterations = work.reduction.num_steps(work, start=start, reached=reached, target=target)
        read = iterations * recipe.calibration.samples * recipe.calibration.length
        planned.append(Stage(k, target, iterations, read, trained, -(-trained // recipe.training.step_tokens)))
        reached = target
    return planned


def prepare(work: Work, *, begun: bool = False, folder: Path | None = None, write: bool = True) -> None:
    """Prepare `work`, in place, before any work is done: check the recipe, plan the stages and find the texts.

    The recipe is checked against the model, the machine and the processes.

    Args:
        work: the run; its `stages`, `budget` and `data` are filled.
        begun: whether the run began earlier, so that its model has changed since.
        folder: the run's folder, which keeps text that the model writes.
        write: whether the model writes its own calibration text now and tasks are loaded; a plan needs neither.

    Raises:
        UsageError: the recipe does not fit, or a text, task or package is missing.
    """
    recipe = work.recipe
    work.stages, work.budget = plan(work)
    _check_machine(work)
    if write and not begun and (trouble := too_large(work, setup_of(work), free=free_bytes(work.model.device))):
        raise UsageError(trouble)
    by_model = work.reads_text and (writes_text(recipe) or recipe.calibration.self_generated)
    if not work.task.writes_text and (by_model or specs_to_write(recipe)):
        raise UsageError(
            f"the model cannot write text of the task {type(work.task).__name__} itself; name a text as calibration.source and set "
            "calibration.self_generated to 0"
        )
    tasks: list[Wanted] = []
    world.on_main(lambda: tasks.extend(_tasks(work, load=write)))
    if write:
        work.tell(phases(work, setup_of(work), begun=begun))
        work.begins("read")
    written = written_texts(work, begun=begun) if write and specs_to_write(recipe) else {}
    with work.state.clock("score") if writes_text(recipe) else nullcontext():
        calibration = _calibration(work, folder, written, begun=begun, write=write) if work.reads_text else lambda iteration: []
    with work.state.clock("repair"):
        further = [*_repair_text(work, folder, begun=begun), *_further_text(work, written)] if write else []
    if write:
        work.begins("read")  # the model may have written in between
    make_feed = parts.bind("feed", recipe.training.feed, seed=recipe.seed)
    rows = _rows(work, written, moving=getattr(make_feed.func, "wants_losses", False))
    feed: Feed | None = None if rows is None else make_feed(rows)
    begins_with, by_text = calibration(0), _held_out(work, written)
    held_out = [window for windows in by_text.values() for window in windows]
    if world.is_main() and not begun:
        _warn_of_texts(work, begins_with if work.reads_text else None, held_out)
    digests = {
        "calibration text": digest_of([*begins_with, *further]),
        "training text": "" if rows is None else rows.digest(),
        "held-out text": digest_of(held_out) if held_out else "",
        "teacher": "" if recipe.training.teacher is None else identity(recipe.training.teacher),
    }
    ends: list[int] = []
    if feed is not None:
        ends = whole_batches(feed.ends([stage.tokens for stage in work.stages]), batch_rows=recipe.training.batch_rows)
        digests |= feed.inputs()
    work.data = RunData(
        calibration, further, feed, ends, digests, held_out, [text for text, windows in by_text.items() for _ in windows], work.task.num_bytes(work.tokenizer, held_out),
        teacher_of(work, begun=begun), held_out_chats(written), rows is not None and rows.has_goals, tasks,
    )  # fmt: skip


def _warn_of_texts(work: Work, begins_with: list[Tensor] | None, held_out: list[Tensor]) -> None:
    """Warn of texts that overlap and of sequences longer than the model reads; `begins_with` is None if no text is read."""
    recipe, ids = work.recipe, work.recipe.calibration.ids
    reads = begins_with is not None
    sources = {
        "calibration": recipe.calibration.source if ids is None and reads else None,
        "training": recipe.training.source,
        "evaluation": recipe.evaluation.source,
        "vocabulary": None if recipe.vocabulary is None else recipe.vocabulary.source,
    }
    settings = {"calibration": "length", "training": "length", "evaluation": "window"}
    if len(work.task.towers) > 1:  # the words of pairs are few, and the same again and again
        return
    lengths = {
        f"{role}.{key}": getattr(getattr(recipe, role), key) for role, key in settings.items() if sources[role] is not None
    }
    shared = same_tokens(ids, begins_with, str(recipe.evaluation.source), held_out) if ids and begins_with is not None else None
    overlapping = overlaps(sources)
    if repeated := [overlap.found for overlap in overlapping if "evaluation" in overlap.roles]:
        work.state.figures["not_held_out"] = repeated
    for sentence in (*(overlap.sentence for overlap in overlapping), shared, *too_long(work.model.config, lengths)):
        if sentence:
            work.warn(sentence)


def _tasks(work: Work, *, load: bool) -> list[Wanted]:
    evaluation = work.recipe.evaluation
    if evaluation.tasks is None:
        return []
    work.tell(Find(tasks=evaluation.tasks))
    how: dict[str, Any] = {"task_dir": evaluation.task_dir, "trust_remote_code": work.trust_remote_code}
    if not load:
        check_tasks(evaluation.tasks, **how)
        return []
    tasks = find_tasks(evaluation.tasks, **how)
    set_shots(tasks, None)
    return tasks


def _check_machine(work: Work) -> None:
    """Refuse a recipe that this machine or these processes cannot run.

    Raises:
        UsageError: a batch does not fit the processes, or a package or GPU is missing.
    """
    training, model = work.recipe.training, work.model
    if training.source is None:
        return
    if training.step_tokens != training.batch_tokens:
        work.warn(
            f"a step reads {training.step_tokens:,} tokens, since training.batch_tokens {training.batch_tokens:,} is no multiple of "
            f"training.length {training.length:,}"
        )
    if training.batch_rows % world.size():
        raise of_all(UsageError(
            f"a batch of {training.batch_tokens:,} tokens is {training.batch_rows} rows of {training.length}, which {world.size()} processes "
            f"cannot share evenly; set training.batch_tokens to a multiple of {training.length * world.size():,}"
        ))  # fmt: skip
    if training.step_in_backward and world.size() > 1:
        raise of_all(UsageError(
            f"training.step_in_backward works in one process, and this run has {world.size()}; set training.step_in_backward=false"
        ))  # fmt: skip
    if training.liger and families.is_sliced(model.config):
        raise UsageError("training.liger has no kernel for the norms of a sliced model; set training.liger=false")
    lacking = training.liger and [layer for layer in model.config.per_layer_config if getattr(layer, "skip", ())]
    if training.liger and (lacking or {"attentions", "mlps"} & set(work.recipe.axes)):
        raise UsageError("training.liger has no kernel for a layer without its attention or MLP; set training.liger=false")
    if training.liger and model.device.type != "cuda":
        raise UsageError("training.liger needs a CUDA device and this run has none; set training.liger=false")
    for package, setting, extra in (
        ("liger_kernel", "training.liger" if training.liger else None, "liger"),
        ("peft", "training.lora" if training.lora is not None else None, "lora"),
        ("torchao", training.needs_torchao, "torchao"),
    ):
        if setting is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"{setting} needs the package {package}; {to_install(extra)}")


def _calibration(work: Work, folder: Path | None, written: Written, *, begun: bool, write: bool) -> Callable[[int], list[Tensor]]:
    """A function from the number of an iteration to its batches. It gives none if the model has yet to write the text."""
    recipe = work.recipe
    if not write and (writes_text(recipe) or _unwritten(recipe.calibration.source, written)):
        return lambda iteration: []
    keys = recipe.calibration.of_feed()
    if writes_text(recipe) and folder is not None:
        path = folder / filenames.CALIBRATION_TEXT
        keys["ids"] = str(path)
        world.on_main(lambda: _kept_text(path, work, "calibration text", samples=keys["samples"], seed=recipe.seed, begun=begun))
    feed = work.task.calibration(
        work.model, work.tokenizer, **keys, **_with(written), seed=recipe.seed, dtype=recipe.dtype, on_tokens=work.counts("write")
    )
    return feed if recipe.calibration.redraw else lambda iteration: feed(0)


def _with(written: Written) -> dict[str, Any]:
    """What the model wrote, for a task that takes it; nothing if it wrote nothing."""
    return {"written": written} if written else {}


def _unwritten(source: Source, written: Written) -> bool:
    """Whether the model has yet to write some of a text."""
    return any(written_spec(spec) is not None and spec not in written for spec in domains(source))


def _repair_text(work: Work, folder: Path | None, *, begun: bool) -> list[Tensor]:
    """The repair text, which the model writes. A run's folder keeps it, since the model changes later."""
    recipe = work.recipe
    samples, seed = recipe.calibration.self_generated, recipe.seed + 1  # so that the text differs from that of `source: self`
    if not samples or recipe.repair is None:
        return []
    if folder is None:
        rows: Sequence[Tensor] = _written(work, work.model, "repair text", samples=samples, seed=seed).split(1)
    else:
        path = folder / filenames.REPAIR_TEXT
        world.on_main(lambda: _kept_text(path, work, "repair text", samples=samples, seed=seed, begun=begun))
        rows = calibration_ids(str(path), vocab_size=work.model.config.vocab_size)
    return batches_of(rows, max_tokens=MICRO_TOKENS)


def _further_text(work: Work, written: Written) -> list[Tensor]:
    """Further sequences of the calibration text, which only the repair reads. They are the same in every iteration."""
    calibration = work.recipe.calibration
    if not calibration.repair_samples or work.recipe.repair is None:
        return []
    feed = work.task.calibration(
        work.model, work.tokenizer, source=calibration.source, samples=calibration.repair_samples, length=calibration.length, ids=None,
        seed=work.recipe.seed, dtype=work.recipe.dtype, on_tokens=lambda done, of: None, **_with(written),
    )  # fmt: skip
    return feed(-1)  # no iteration has this number, so none draws the same sequences


def _written(work: Work, writer: Any, what: str, *, samples: int, seed: int) -> Tensor:
    """Text that a model writes, int64 [samples, calibration.length]; `what` names it for people."""
    return selfwritten_windows(
        writer, work.tokenizer, samples=samples, length=work.recipe.calibration.length, seed=seed,
        dtype=work.recipe.dtype, on_tokens=work.counts("write", what=what),
    )  # fmt: skip


def _kept_text(path: Path, work: Work, what: str, *, samples: int, seed: int, begun: bool) -> None:
    """Let the model as it was at the start write a text, and save it; do nothing if the run has that text already."""
    recipe = work.recipe
    settings = {"samples": samples, "length": recipe.calibration.length, "seed": seed}
    if begun:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if read_json(path)["asked"] == settings:
                return
    written = _written(work, dense_again(work, f"{path} is missing") if begun else work.model, what, samples=samples, seed=seed)
    with writing(path):
        write_whole(path, to_json({"asked": settings, "input_ids": written.tolist()}))


def _rows(work: Work, written: Written, *, moving: bool) -> Rows | None:
    """All rows of the training; with `moving` also those that are read only if the shares of a mixture change.

    None if the recipe trains nothing, or if the model has yet to write some of the text, for a plan.
    """
    training, source = work.recipe.training, work.recipe.training.source
    if source is None or _unwritten(source, written):
        return None
    read_rows = partial(
        work.task.rows, work.tokenizer, source, length=training.length, tokens=training.tokens, seed=work.recipe.seed,
        repeat=training.repeat, warn=work.warn, moving=moving, expected=work.expected, **_with(written),
    )  # fmt: skip
    rows: list[Rows] = []
    world.on_main(lambda: rows.append(read_rows()))  # one process tokenises, the others read what it stored
    return rows[0] if rows else read_rows()


def _held_out(work: Work, written: Written) -> dict[str, list[Tensor]]:
    evaluation = work.recipe.evaluation
    if evaluation.source is None or _unwritten(evaluation.source, written):
        return {}
    return work.task.held_out(
        work.tokenizer, source=evaluation.source, window=evaluation.window, max_windows=evaluation.max_windows, **_with(written)
    )


def tell_start(work: Work, *, training_tokens: int) -> None:
    """Tell what the run is about to do: from what to what, by what, on how much text."""
    state, recipe = work.state, work.recipe
    coming = work.stages[state.stage - 1 + state.pruned :]
    source = recipe.calibration.ids or recipe.calibration.source
    start, decoder = sizes_begun(work)
    decoder_target = None if "residual" in recipe.axes else max(0, decoder - start + min(start, work.budget.keep))
    work.tell(Start(
        method=recipe.method, dequantised=work.loaded.dequantised, text=", ".join(domains(source)) if work.reads_text else None, decoder=decoder,
        decoder_target=decoder_target, stages=recipe.stages, params=work.budget.total, target=work.budget.keep, now=work.num_params,
        sparsity=recipe.sparsity or None,
        dense=work.loaded.mask is None, random=recipe.init == "random", calibration_tokens=sum(stage.calibration_tokens for stage in coming),
        training_tokens=training_tokens, trained_tokens=state.progress.tokens, processes=world.size(),
        parallel=recipe.parallel, began=state.began, sizes=families.sizes(work.model), layers_left=state.layers_left,
        device=work.model.device.type, precision="bfloat16" if uses_bfloat16(work.model.device, recipe.dtype) else "float32",
        **work.deadline,
    ))  # fmt: skip
