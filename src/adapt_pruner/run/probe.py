"""Measure how fast this machine reads, scores and trains a model, with as many threads as it leaves this process cores.

The threads of a pass wait for each other many times. If other work, or a limit on this process, leaves them fewer cores than there
are threads, each time lasts until the system has run them all in turn. Then fewer threads are faster.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.core.events import Listener
from adapt_pruner.core.events.run import Probe
from adapt_pruner.core.events.words import counted
from adapt_pruner.core.model.precision import precision
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.memory import free_bytes, keeping_freed
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.recipe import Recipe
from adapt_pruner.run.estimate import Speed, operations, shapes
from adapt_pruner.run.plan import most_bytes, setup_of, too_large
from adapt_pruner.run.start import begin, placed, plan
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.weights import taylor
from adapt_pruner.train.kernels import kernels
from adapt_pruner.train.loop import make_optimizer
from adapt_pruner.train.objectives import lm
from adapt_pruner.work import Work

_TOKENS = 128  # of the pass that is timed to fit the threads
_BUSY = 0.75  # cores that this process gets per thread; below, fewer threads may be faster
_GAIN = 2.0  # times that fewer threads have to be faster: on an idle machine a short pass gains less
_ENOUGH = 10.0  # seconds of a pass over one row; a slower one is not repeated
_MOST = 30.0  # seconds of a pass over the whole batch; if it would take longer, the row has to do
_PROBED_TOKENS, _PROBED_ROW = 512, 128  # of a pass that reads or scores


def probed(recipe: Recipe, *, listen: Listener, trust_remote_code: bool = False) -> tuple[Speed, Work]:
    """Measure this machine with the model of a recipe.

    If minutes end the run, this process may use fewer threads from now on. Otherwise it uses all that torch does, so that a run
    that goes on later gives the same weights.

    Args:
        recipe: the run; its way to prune may change afterwards, and it may use gradient checkpointing.
        listen: told of events.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        Speeds and free memory, and the planned work with the model, whose weights are unchanged.

    Raises:
        UsageError: the model cannot be loaded, does not fit into memory, or is smaller than the budget.
    """
    began = time.perf_counter()
    place, trouble = placed(recipe, trust_remote_code=trust_remote_code, again=True)
    if trouble:
        raise UsageError(trouble)
    work = begin(recipe, listen, trust_remote_code=trust_remote_code, place=place)
    load = time.perf_counter() - began
    work.stages, work.budget = plan(work)
    model, device, free = work.model, work.model.device, free_bytes(work.model.device)
    how = replace(setup_of(work), checkpointing=True)
    if trouble := too_large(work, how, free=free):
        raise UsageError(trouble)
    listen(Probe())
    dense = replace(work, stages=[replace(work.stages[0], params=work.num_params)])  # which the probe trains
    whole = work.loaded.offload == "none" and how.stored == 4 and not how.lora  # as the probe trains
    fits = whole and (free is None or most_bytes(dense, how) <= free)
    how = replace(how, checkpointing=free is not None and most_bytes(dense, replace(how, checkpointing=False)) > free)
    words = fit_threads(work) if recipe.minutes else _in_words()
    if device.type != "cpu":
        words = torch.cuda.get_device_name(device)
    words += f", {'bfloat16' if how.narrow else 'float32'}"
    if world.size() > 1:
        words = f"{world.size()} processes, each with {words}"
    of, row = shapes(model), replace(how, length=_PROBED_ROW)
    batch = _random_rows(model, _PROBED_TOKENS // _PROBED_ROW, _PROBED_ROW)
    with world.apart():  # a process is as fast as it is beside the others
        read = _tokens_a_second(lambda rows: perplexity(model, rows.split(1), dtype=recipe.dtype), batch) * operations(
            of, row, kind="read"
        )
        scored = trained = _tokens_a_second(partial(_score_rows, work), batch) * operations(of, row, kind="score")
        if fits:
            trained = _trained(work, checkpointing=how.checkpointing) * operations(of, replace(how, lora=0), kind="train")
    others = {"score": scored, "repair": scored, "train": trained}
    return world.agreed(Speed(read, words, memory=free, others=others, load=load)), work


def scoring_speed(work: Work) -> Speed:
    """The speed of this machine with a run's model, measured on one batch of random tokens that is scored."""
    work.tell(Probe())
    length = work.recipe.calibration.length
    if len(work.task.towers) > 1:
        batch = work.data.calibration(1)[0]
    else:
        batch = _random_rows(work.model, max(1, _PROBED_TOKENS // length), length)
    for _ in range(2):  # the first pass of a process is slow
        span = _seconds(partial(_score_rows, work, batch))
    flops = len(batch) * length * operations(shapes(work.model), replace(setup_of(work), length=length), kind="score") / span
    return Speed(flops, f"this machine reaches {flops / 1e12:.3g} TFLOP/s with this model")


def _trained(work: Work, *, checkpointing: bool) -> float:
    """Tokens per second of a training step, or of one row if that is slow; the learning rate is 0, so no weight changes."""
    model, training, device = work.model, work.recipe.training, work.model.device
    ids = _random_rows(model, training.batch_rows, training.length).to(device)
    optimizer = make_optimizer(model, lr=0.0, weight_decay=0.0, bits=training.moment_bits, torchao=training.needs_torchao)

    def step(rows: Tensor) -> None:
        with precision(device, work.recipe.dtype):
            loss = lm(model, rows, None)
        (loss / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    try:
        with keeping_freed(), kernels(model, gradient_checkpointing=checkpointing, compiled=False, liger=False):  # as in training
            return _tokens_a_second(step, ids)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def _tokens_a_second(do: Callable[[Tensor], object], batch: Tensor) -> float:
    """Speed of a pass over a batch, or over its first row if the batch would take long.

    The first pass of a process takes longest, and a part of each pass takes as long for one row as for many.
    """
    for _ in range(2):
        of_row = _seconds(lambda: do(batch[:1]))
        if of_row > _ENOUGH:
            break
    if of_row * len(batch) > _MOST:
        return batch[0].numel() / of_row
    return batch.numel() / _seconds(lambda: do(batch))


def _random_rows(model: Any, count: int, length: int) -> Tensor:
    """Random tokens to time a pass with, int64 [count, length] on the CPU; the same each time."""
    return torch.randint(model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def _score_rows(work: Work, rows: Tensor) -> None:
    """Score a run's model on these rows by first-order Taylor."""
    axes = [axis for axis in work.axes if axis.layer is not None or axis.kind in work.recipe.axes]
    task: Task = work.task if len(work.task.towers) > 1 else CAUSAL_LM  # random tokens suit any task of one stack
    score(work.model, axes, [rows], metrics=[taylor], task=task, dtype=work.recipe.dtype)


def _seconds(do: Callable[[], object]) -> float:
    """How long a call takes, with what it has a GPU do."""
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(time.perf_counter() - began, 1e-6)


def fit_threads(work: Work) -> str:
    """Use fewer threads from now on if the run's model is then scored in half of the time; only on a CPU, in a single process.

    Returns:
        How many threads are used, in words.
    """
    if torch.get_num_threads() == 1 or work.model.device.type != "cpu" or world.size() > 1 or len(work.task.towers) > 1:
        return _in_words()
    return _fitted(partial(_score_rows, work, _random_rows(work.model, 1, _TOKENS)))


def _fitted(do: Callable[[], object]) -> str:
    threads = torch.get_num_threads()
    for _ in range(2):  # the first of a process takes longest
        began = time.process_time()
        took = _seconds(do)
        cores = (time.process_time() - began) / took
        if took > _ENOUGH:
            break
    if cores >= _BUSY * threads:
        return _in_words()
    fewer = min(threads - 1, max(1, round(cores)))
    torch.set_num_threads(fewer)
    faster = _seconds(do)
    torch.set_num_threads(threads)
    if min(took, _seconds(do)) < _GAIN * faster:  # asked again, since other work may have ended meanwhile
        return _in_words()
    torch.set_num_threads(fewer)
    return f"{fewer} of {threads} threads, which is faster at present"


def _in_words() -> str:
    return counted(torch.get_num_threads(), "thread")


@contextmanager
def kept_threads() -> Iterator[None]:
    """After this context as many threads are used as before it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
