"""What a run needs before its first step: the model, its stages, and the text each of them reads."""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load, pick_device
from adapt_pruner.checkpoint.save import why, write_whole
from adapt_pruner.checkpoint.state import identity
from adapt_pruner.checkpoint.vocabulary import kept_tokens, smaller_tokenizer
from adapt_pruner.core import world
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.precision import uses_bfloat16
from adapt_pruner.core.strict_json import to_json
from adapt_pruner.core.surgery import cut
from adapt_pruner.data.feeds import MICRO_TOKENS, calibration_feed, held_out_windows, too_long
from adapt_pruner.data.overlap import overlaps, same_tokens
from adapt_pruner.data.rows import Rows, stage_spans, training_rows
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.tokens import batches_of, calibration_ids, text_bytes
from adapt_pruner.data.uses import token_uses
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.task_sources import Wanted, find_tasks
from adapt_pruner.evaluate.tasks import set_shots
from adapt_pruner.recipe import Recipe
from adapt_pruner.run.folder import OWN_TEXT, REPAIR_TEXT
from adapt_pruner.run.plan import Stage, plan, reads_text, writes_text

__all__ = ["Listener", "Prepared", "cut_vocabulary", "load_model", "prepare", "progress"]

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Prepared:
    """What a run is about to do and read.

    Attributes:
        stages: the rounds of pruning and training.
        budget: what is to be left, of the parameters at the start.
        calibration: number of the iteration -> its batches, int64 [batch, length]; none where nothing looks at them.
        own: batches of what the model itself wrote, which a repair reads beside those; none where the recipe asks for none.
        rows: the training text; None where nothing is to be trained.
        spans: the row of `rows` that each stage stops before.
        digests: fingerprints of what is read beside the model, by what a person calls it: of the training text all rows
            and their order, of the calibration text the first batches.
        held_out: evaluation windows; empty where nothing is to be evaluated.
        held_out_bytes: of the text they predict.
        teacher: the model to distil from; None where the objective has none.
        tasks: that are scored at the start and the end, on the main process alone.
    """

    stages: list[Stage]
    budget: Budget
    calibration: Callable[[int], list[Tensor]]
    own: list[Tensor]
    rows: Rows | None
    spans: list[int]
    digests: dict[str, str]
    held_out: list[Tensor]
    held_out_bytes: int
    teacher: Any
    tasks: list[Wanted]


def load_model(recipe: Recipe, listen: Listener, trust_remote_code: bool) -> Loaded:
    """The model that the recipe names, on the recipe's device."""
    listen({"event": "load", "model": recipe.model})
    loaded = load(recipe.model, device=pick_device(recipe.device), trust_remote_code=trust_remote_code)
    listen({"event": "loaded", "model": recipe.model, "params": count_parameters(loaded.model)})
    return loaded


def cut_vocabulary(loaded: Loaded, recipe: Recipe, listen: Listener) -> tuple[Loaded, Mask]:
    """Take the tokens away, in place, that the recipe does not keep, with their rows; the tokenizer is a new one.

    Returns:
        The model with its tokenizer, and the mask against what it was.

    Raises:
        UsageError: there is no such text, or the tokenizer cannot be rewritten.
    """
    asked = recipe.vocabulary
    if asked is None or asked.source is None:
        return loaded, Mask()
    axes, tokenizer, source = families.axes(loaded.model), loaded.tokenizer, asked.source
    axis = next((axis for axis in axes if axis.kind == "vocabulary"), None)
    if axis is None:
        raise UsageError(f"models of type {loaded.model.config.model_type!r} have no axis of tokens; leave vocabulary out")
    configs = (loaded.model.config, loaded.model.generation_config)
    named = [getattr(config, field, None) for config in configs for field in axis.indices]
    numbers = [number for field in named for number in (field if isinstance(field, list) else [field]) if number is not None]
    keep = world.on_main(
        lambda: kept_tokens(
            tokenizer,
            token_uses(tokenizer, source, size=axis.size),
            keep=asked.keep,
            min_uses=asked.min_uses,
            named=numbers,
        )
    )
    smaller, mask = smaller_tokenizer(tokenizer, keep), Mask({"vocabulary": keep})
    cut(loaded.model, axes, mask)
    listen({
        "event": "vocabulary", "tokens_before": axis.size, "tokens": int(keep.sum()), "params": count_parameters(loaded.model),
    })  # fmt: skip
    return replace(loaded, tokenizer=smaller), mask


def prepare(
    loaded: Loaded,
    recipe: Recipe,
    *,
    listen: Listener,
    trust_remote_code: bool = False,
    dense: int,
    start: int,
    keep: int | None = None,
    begun: bool = False,
    folder: Path | None = None,
    clock: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
    write: bool = True,
) -> Prepared:
    """Check that the recipe fits model, machine and processes and that its texts are there, before any work is done.

    Args:
        loaded: the model as it is now.
        recipe: what is asked for.
        listen: told of warnings.
        trust_remote_code: for a teacher.
        dense: parameters of the model that the run began with.
        start: parameters it had when its vocabulary was cut.
        keep: the parameters that the recipe's latency comes to, where it names one.
        begun: whether the run has begun, and the model is not what it was then.
        folder: of the run; text that the model writes itself is kept there.
        clock: counts what passes meanwhile to a phase, see `Position.clock`; text is written for scoring or for the repair.
        write: whether the model writes the text that it is to be calibrated on; a plan does without.

    Raises:
        UsageError: something does not fit, or is not there.
    """

    def warn(message: str) -> None:
        listen({"event": "warning", "message": message})

    planned, budget = plan(loaded.model, recipe, dense=dense, start=start, keep=keep)
    _check_machine(loaded.model, recipe)
    tasks: list[Wanted] = []
    world.on_main(lambda: tasks.extend(_tasks(recipe, listen)))
    with clock("score") if writes_text(recipe) else nullcontext():
        calibration = _calibration(loaded, recipe, folder, listen, begun=begun, write=write)
    with clock("repair"):
        own = _own_text(loaded, recipe, folder, listen, begun=begun) if write else []
    rows = _rows(loaded, recipe, warn)
    spans = [] if rows is None else [span.stop for span in stage_spans(rows, [stage.tokens for stage in planned])]
    held_out = _held_out(loaded, recipe)
    begins_with = calibration(0)
    sources = {
        "calibration": recipe.calibration.source if recipe.calibration.ids is None and reads_text(loaded.model, recipe) else None,
        "training": recipe.training.source,
        "evaluation": recipe.evaluation.source,
        "vocabulary": None if recipe.vocabulary is None else recipe.vocabulary.source,
    }
    if world.is_main() and not begun:
        ids, measured = recipe.calibration.ids, recipe.evaluation.source
        shared = same_tokens(ids, begins_with, str(measured), held_out) if ids and reads_text(loaded.model, recipe) else None
        for sentence in (*overlaps(sources), shared, *too_long(loaded.model.config, _lengths(loaded.model, recipe))):
            if sentence:
                warn(sentence)
    digests = {
        "calibration text": _digest([*begins_with, *own]),
        "training text": "" if rows is None else rows.digest(),
        "teacher": "" if recipe.training.teacher is None else identity(recipe.training.teacher),
    }
    return Prepared(
        planned, budget, calibration, own, rows, spans, digests, held_out, text_bytes(loaded.tokenizer, held_out),
        _teacher(loaded, recipe, trust_remote_code, begun=begun), tasks,
    )  # fmt: skip


def _tasks(recipe: Recipe, listen: Listener) -> list[Wanted]:
    asked = recipe.evaluation
    if asked.tasks is None:
        return []
    listen({"event": "find", "tasks": asked.tasks})
    wanted = find_tasks(asked.tasks, task_dir=asked.task_dir)
    set_shots(wanted, None)
    return wanted


def _lengths(model: Any, recipe: Recipe) -> dict[str, int]:
    """How long the sequences are that the recipe asks for, by setting; those of fixed ids are what they are."""
    lengths = {}
    if recipe.calibration.ids is None and reads_text(model, recipe):
        lengths["calibration.length"] = recipe.calibration.length
    if recipe.training.source is not None:
        lengths["training.length"] = recipe.training.length
    if recipe.evaluation.source is not None:
        lengths["evaluation.window"] = recipe.evaluation.window
    return lengths


def _check_machine(model: Any, recipe: Recipe) -> None:
    """Refuse what this machine or these processes cannot do.

    Raises:
        UsageError: a batch does not fit the processes, or a package or GPU is missing.
    """
    asked = recipe.training
    if asked.source is None:
        return
    rows = asked.batch_tokens // asked.length
    if rows % world.size():
        raise UsageError(
            f"a batch of {asked.batch_tokens:,} tokens is {rows} rows of {asked.length}, which {world.size()} processes cannot "
            f"share evenly; set training.batch_tokens to a multiple of {asked.length * world.size():,}"
        )
    if asked.liger and (recipe.rotate is not None or families.is_sliced(model.config)):
        raise UsageError("training.liger has no kernel for the norms of a sliced model; set training.liger=false")
    lacking = [layer for layer in model.config.per_layer_config if getattr(layer, "skip", ())]
    if asked.liger and (lacking or {"attentions", "mlps"} & set(recipe.axes)):
        raise UsageError("training.liger has no kernel for a layer without its attention or MLP; set training.liger=false")
    if asked.liger and next(model.parameters()).device.type != "cuda":
        raise UsageError("training.liger needs a CUDA device and this run has none; set training.liger=false")
    for package, wanted, extra in (("liger_kernel", asked.liger, "liger"), ("peft", asked.lora is not None, "lora")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"training.{extra} needs a package; pip install 'adapt-pruner[{extra}]'")


def progress(listen: Listener, phase: str, **where: int) -> Callable[[int, int], None]:
    """What tells a listener how far a phase is, called with (done, of)."""
    return lambda done, of: listen({"event": "progress", "phase": phase, "done": done, "of": of, **where})


def _calibration(
    loaded: Loaded, recipe: Recipe, folder: Path | None, listen: Listener, *, begun: bool, write: bool
) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches; to none where nothing looks at them."""
    if not reads_text(loaded.model, recipe) or (writes_text(recipe) and not write):
        return lambda iteration: []
    asked, tell = recipe.calibration.model_dump(exclude={"own"}), progress(listen, "write")
    if writes_text(recipe) and folder is not None:
        path = folder / OWN_TEXT
        asked["ids"] = str(path)
        world.on_main(
            lambda: _kept_text(path, loaded, recipe, samples=asked["samples"], seed=recipe.seed, begun=begun, tell=tell)
        )
    return calibration_feed(loaded.model, loaded.tokenizer, **asked, seed=recipe.seed, dtype=recipe.dtype, on_batch=tell)


def _own_text(loaded: Loaded, recipe: Recipe, folder: Path | None, listen: Listener, *, begun: bool) -> list[Tensor]:
    """What the model writes for a repair; kept in the run's folder, where there is one, since later it is another model."""
    samples, seed = recipe.calibration.own, recipe.seed + 1  # not what `source: self` gives
    if not samples or recipe.repair is None:
        return []
    tell = progress(listen, "write")
    if folder is None:
        ids = selfwritten_windows(
            loaded.model, loaded.tokenizer, samples=samples, length=recipe.calibration.length, seed=seed,
            dtype=recipe.dtype, on_batch=tell,
        )  # fmt: skip
        rows: Sequence[Tensor] = ids.split(1)
    else:
        path = folder / REPAIR_TEXT
        world.on_main(lambda: _kept_text(path, loaded, recipe, samples=samples, seed=seed, begun=begun, tell=tell))
        rows = calibration_ids(str(path), vocab_size=loaded.model.config.vocab_size)
    return batches_of(rows, max_tokens=MICRO_TOKENS)


def _kept_text(
    path: Path, loaded: Loaded, recipe: Recipe, *, samples: int, seed: int, begun: bool, tell: Callable[[int, int], None]
) -> None:
    """Keep the text that the model as it was at the start writes, unless a run that has begun already has."""
    asked = {"samples": samples, "length": recipe.calibration.length, "seed": seed}
    if begun:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_text(encoding="utf-8"))["asked"] == asked:
                return
    writer = loaded.model
    if begun and recipe.vocabulary is not None:
        raise UsageError(
            f"{path} is not there, and the model that wrote it cannot be made again, since its vocabulary was cut; begin anew in another folder"
        )
    if begun:  # it has been cut since
        writer = load(recipe.model, device=next(loaded.model.parameters()).device).model
    written = selfwritten_windows(writer, loaded.tokenizer, **asked, dtype=recipe.dtype, on_batch=tell)
    try:
        write_whole(path, to_json({"asked": asked, "input_ids": written.tolist()}))
    except OSError as error:
        raise RunError(f"{path} could not be written: {why(error)}") from error


def _digest(batches: list[Tensor]) -> str:
    return hashlib.sha256(to_json([batch.tolist() for batch in batches]).encode()).hexdigest()


def _rows(loaded: Loaded, recipe: Recipe, warn: Callable[[str], None]) -> Rows | None:
    asked, source = recipe.training, recipe.training.source
    if source is None:
        return None

    def read() -> Rows:
        return training_rows(
            loaded.tokenizer,
            source,
            length=asked.length,
            tokens=asked.tokens,
            seed=recipe.seed,
            repeat=asked.repeat,
            warn=warn,
        )

    rows: list[Rows] = []
    world.on_main(lambda: rows.append(read()))  # one process tokenises, the others read what it stored
    return rows[0] if rows else read()


def _held_out(loaded: Loaded, recipe: Recipe) -> list[Tensor]:
    asked = recipe.evaluation
    if asked.source is None:
        return []
    return held_out_windows(loaded.tokenizer, source=asked.source, window=asked.window, max_windows=asked.max_windows)


def _teacher(loaded: Loaded, recipe: Recipe, trust_remote_code: bool, *, begun: bool) -> Any:
    """The model to distil from, frozen, in the precision of matrix products; None where the objective has none.

    Raises:
        UsageError: it has another vocabulary.
    """
    if not recipe.training.objective.startswith("objectives.distil") or recipe.training.source is None:
        return None
    device = next(loaded.model.parameters()).device
    name = recipe.training.teacher or recipe.model
    if recipe.training.teacher is None and not begun:
        teacher = copy.deepcopy(loaded.model)
    else:
        other = load(name, device=device, trust_remote_code=trust_remote_code)
        if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UsageError(
                f"teacher {name} has another tokenizer ({len(other.tokenizer):,} tokens) than {recipe.model} "
                f"({len(loaded.tokenizer):,}); distillation compares token by token, so name a teacher of the same vocabulary"
            )
        teacher = other.model
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, loaded.model)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher {name} has {sizes[0]:,} logits, {recipe.model} {sizes[1]:,}; name a teacher of the same vocabulary"
        )
    narrow = torch.bfloat16 if uses_bfloat16(device, recipe.dtype) else torch.float32
    return teacher.to(narrow).eval().requires_grad_(False)
