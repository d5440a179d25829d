"""Measure how fast this machine reads, scores and trains a model, and whether it fits; less than a minute for small models."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from adapt_pruner.checkpoint.load import load_shapes, locate, pick_device
from adapt_pruner.core.events import Listener
from adapt_pruner.core.events.run import Probe
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.system.memory import keeping_freed
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.recipe import Recipe
from adapt_pruner.run.estimate import Setup, Shapes, process_bytes, pruning_memory, shapes, training_memory
from adapt_pruner.run.plan import beyond, free_bytes, ways_to_prune
from adapt_pruner.run.rules import BATCH_TOKENS, CALIBRATION_ROW, TRAINING_ROW, Machine, Model
from adapt_pruner.run.start import begin, sizes_begun
from adapt_pruner.run.threads import ENOUGH, fit_threads, in_words, random_rows, score_rows, seconds_of
from adapt_pruner.train.kernels import kernels
from adapt_pruner.train.loop import make_optimizer
from adapt_pruner.train.objectives import lm
from adapt_pruner.work import Work

__all__ = ["probed"]

_TOKENS = 512  # of a pass that reads or scores
_SAMPLES = 64  # rows that an iteration scores, at most
_MOST = 30.0  # seconds of a pass over the whole batch; if it would take longer, the row has to do


def probed(recipe: Recipe, *, listen: Listener, trust_remote_code: bool = False) -> tuple[Machine, Model, Work]:
    """Measure this machine with the model of a recipe.

    If minutes end the run, this process may use fewer threads from now on (see `run.threads`). Otherwise it uses all that torch
    does, so that a run that goes on later gives the same weights.

    Args:
        recipe: only its model, budget, device, axes and number format count.
        listen: told of events.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        Speeds and memory, the model's sizes, and the work with the model, whose weights are unchanged.

    Raises:
        UsageError: the model cannot be loaded, or is smaller than the budget.
    """
    began = time.perf_counter()
    if locate(recipe.model)[1] is None and recipe.vocabulary is None:  # otherwise the sizes are known once it is read
        foreseen = pick_device(recipe.device)
        unread = load_shapes(recipe.model, trust_remote_code=trust_remote_code)
        whole = shapes(unread)
        target = Budget.parse(recipe.budget, dense=whole.params, decoder=whole.decoder, outside=whole.params - whole.decoder).keep
        needed = _memory(whole, _cut_to(whole, target), foreseen, recipe.dtype)[1]
        ways = ways_to_prune(unread, recipe, _setup(foreseen, recipe.dtype))
        if trouble := beyond(recipe.model, "train", needed=needed, free=free_bytes(foreseen), ways=ways):
            raise UsageError(trouble)
    work = begin(recipe, listen, trust_remote_code=trust_remote_code)
    load = time.perf_counter() - began
    listen(Probe())
    model, config = work.model, work.model.config
    device, dense = next(model.parameters()).device, shapes(work.model)
    narrow, longest = uses_bfloat16(device, recipe.dtype), getattr(config, "max_position_embeddings", None)
    start, decoder = sizes_begun(work)  # a vocabulary that shrinks has done so
    budget = Budget.parse(recipe.budget, dense=work.dense_params, decoder=decoder, outside=start - decoder)
    floor, when = work.reduction.floor(work)
    budget.check_reachable(floor, when=when)
    needs = _memory(dense, _cut_to(dense, budget.keep), device, recipe.dtype)
    measured = Model(
        recipe.model, dense.params, dense.decoder, min(budget.keep, dense.params), longest, (needs[0], needs[1]), teacher=needs[2] - needs[0],
        instead=tuple(ways_to_prune(model, recipe, _setup(device, recipe.dtype))),
        sparse=work.loaded.weight_mask is not None, chats=bool(getattr(work.tokenizer, "chat_template", None)),
    )  # fmt: skip
    free = free_bytes(device)
    batch = random_rows(model, _TOKENS // CALIBRATION_ROW, CALIBRATION_ROW)
    words = torch.cuda.get_device_name(device) if device.type != "cpu" else fit_threads(work) if recipe.minutes else in_words()
    read = _tokens_a_second(lambda rows: perplexity(model, rows.split(1), dtype=recipe.dtype), batch, device)
    scored = _tokens_a_second(partial(score_rows, work), batch, device)
    whole_needs = _memory(dense, dense, device, recipe.dtype)  # the probe trains the dense model
    fits = free is None or whole_needs[1] <= free
    again = free is not None and whole_needs[0] > free
    trained = _trained(work, device, narrow=narrow, checkpointing=again) * (4 / 3 if again else 1) if fits else scored
    machine = Machine(read, scored, trained, load, f"{words}, {'bfloat16' if narrow else 'float32'}", free)
    return machine, measured, work


def _cut_to(dense: Shapes, params: int) -> Shapes:
    """The shapes with at most so many parameters; a target that removes the whole decoder is refused elsewhere."""
    return dense.cut_to(max(dense.params - dense.decoder, min(dense.params, params)))


def _memory(dense: Shapes, pruned: Shapes, device: torch.device, dtype: str) -> list[int]:
    """Bytes that the run takes at its peak: plain, with gradient checkpointing, and plain with the dense model as teacher.

    All training comes after the cuts. If little stays of the model, pruning takes more than training.
    """
    how = _setup(device, dtype)
    ways = (how, replace(how, checkpointing=True), replace(how, teacher=dense))
    pruning = partial(pruning_memory, dense, samples=_SAMPLES, length=CALIBRATION_ROW, moments=False, reads=True)
    return [max(process_bytes(parts, how.device) for parts in (training_memory(pruned, each), pruning(each))) for each in ways]


def _setup(device: torch.device, dtype: str) -> Setup:
    kind = "cpu" if device.type == "cpu" else "cuda"
    return Setup(kind, uses_bfloat16(device, dtype), TRAINING_ROW, batch_tokens=BATCH_TOKENS)


def _trained(work: Work, device: torch.device, *, narrow: bool, checkpointing: bool) -> float:
    """Tokens per second of a training step, or of one row if that is slow; the learning rate is 0, so no weight changes."""
    model = work.model
    ids = random_rows(model, BATCH_TOKENS // TRAINING_ROW, TRAINING_ROW).to(device)
    optimizer = make_optimizer(model, lr=0.0, weight_decay=0.0)

    def step(rows: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            loss = lm(model, rows, None)
        (loss / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    try:
        with keeping_freed(), kernels(model, gradient_checkpointing=checkpointing, compiled=False, liger=False):  # as in training
            return _tokens_a_second(step, ids, device)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def _tokens_a_second(do: Callable[[torch.Tensor], object], batch: torch.Tensor, device: torch.device) -> float:
    """Speed of a pass over a batch, or over its first row if the batch would take long.

    The first pass of a process takes longest, and a part of each pass takes as long for one row as for many.
    """
    for _ in range(2):
        one = _seconds(lambda: do(batch[:1]), device)
        if one > ENOUGH:
            break
    return batch[0].numel() / one if one * len(batch) > _MOST else batch.numel() / _seconds(lambda: do(batch), device)


def _seconds(do: Callable[[], object], device: torch.device) -> float:
    def whole() -> None:
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return seconds_of(whole)
