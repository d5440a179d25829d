"""What a run takes at its peaks, and whether this machine has that much memory."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adapt_pruner.core.events.words import typed
from adapt_pruner.core.system.memory import usable_bytes
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.recipe.prune_recipe import to_prune
from adapt_pruner.run.estimate import Setup, process_bytes, pruning_memory, shapes, training_memory
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Work

__all__ = ["beyond", "check_memory", "free_bytes", "memory", "most_bytes", "too_large", "ways_to_prune"]

_GIB = 2**30


def memory(work: Work, how: Setup) -> dict[str, dict[str, int]]:
    """Phase -> what of it holds memory -> bytes of one process at its peak, by the formulas of `estimate`.

    Args:
        work: the run, with its stages; the model may lie on the meta device.
        how: how it trains, and where.
    """
    recipe, dense, use = work.recipe, shapes(work.model), work.reduction.text_use(work)
    trains, asked = bool(recipe.training.tokens), recipe.calibration
    scoring = partial(
        pruning_memory, dense, how, samples=asked.samples, length=asked.length,
        moments=trains and recipe.moments == "carry" and recipe.stages > 1 and recipe.training.lora is None,
        reads=use.forward or recipe.evaluation.source is not None,
    )  # fmt: skip
    passes = [scoring(evidence=use.evidence)]
    if use.streams:  # fits to every second row of a batch
        passes.append(scoring(evidence=Evidence.STREAM_GRADIENTS, halved=True))
    found = {"pruning": max(passes, key=lambda parts: sum(parts.values()))}
    if trains:
        while_cutting = "training" in parts.needs("reduce", recipe.reduce)
        found["training"] = training_memory(dense if while_cutting else dense.cut_to(work.stages[0].params), how)
    return found


def most_bytes(work: Work, how: Setup) -> int:
    """Bytes that a process of the run occupies at its peak."""
    return max(process_bytes(parts, how.device) for parts in memory(work, how).values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that this process may use in all: what is free and what it holds; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return usable_bytes()


def check_memory(work: Work, how: Setup, *, free: int | None) -> None:
    """Refuse a run that takes more memory than is free.

    Raises:
        UsageError: it does; the message names a way that fits.
    """
    if trouble := too_large(work, how, free=free):
        raise UsageError(trouble)


def too_large(work: Work, how: Setup, *, free: int | None) -> str:
    """A sentence if a run takes more memory than is free, with a way that fits; else an empty one."""
    recipe, trains = work.recipe, bool(work.recipe.training.tokens)
    return beyond(
        recipe.model, "train" if trains else "prune", needed=most_bytes(work, how), free=free,
        ways=itertools.chain(_ways_to_train(work, how) if trains else (), ways_to_prune(work.model, recipe, how)),
    )  # fmt: skip


def beyond(name: str, verb: str, *, needed: int, free: int | None, ways: Iterable[tuple[str, int]]) -> str:
    """A sentence if something needs more memory than is free, with the remedy; else an empty one.

    Args:
        name: the model.
        verb: what is done with it.
        needed: bytes.
        free: bytes; None if that is not known.
        ways: what may be done instead, for people, with the bytes that it needs; the first that fits is named.
    """
    if free is None or needed <= free:
        return ""
    instead = next((f"this fits here, in {size / _GIB:.1f} GiB: {words}" for words, size in ways if size <= free), "")
    return f"{name} needs {needed / _GIB:.1f} GiB of memory to {verb}, but only {free / _GIB:.1f} GiB are free; " + (
        instead or f"nothing that makes it smaller fits here: take a machine with {math.ceil(needed / _GIB)} GiB"
    )


def _ways_to_train(work: Work, how: Setup) -> Iterator[tuple[str, int]]:
    """Settings with which the same training takes less memory, with the bytes that it then needs."""
    again, small = "training.gradient_checkpointing=true", f"training.micro_batch_tokens={how.length}"
    yield f"--set {again}", most_bytes(work, replace(how, checkpointing=True))
    yield f"--set {again} --set {small}", most_bytes(work, replace(how, checkpointing=True, micro_tokens=how.length))


def ways_to_prune(model: Any, recipe: Recipe, how: Setup) -> Iterator[tuple[str, int]]:
    """Commands that prune a model to a recipe's size without training, the best first, with the bytes that each needs."""
    common = {"model": recipe.model, "device": recipe.device, "dtype": recipe.dtype}
    size = {"budget": recipe.budget, "sparsity": recipe.sparsity, "latency": recipe.latency}
    options = {"budget": "--params", "sparsity": "--sparsity", "latency": "--latency"}
    given = {key: value for key, value in size.items() if value}
    typed_size = [word for key, value in given.items() for word in (options[key], value)]
    for method in ("magnitude-sparse",) if recipe.sparsity else (None, "magnitude-all"):
        pruning = to_prune({**common, **given, "method": method})
        words = typed("prune", recipe.model, "-o", "DIR", *typed_size, *(["--method", method] if method else []))
        yield f"`{words}`", most_bytes(Work.of(model, pruning), replace(how, teacher=None))
