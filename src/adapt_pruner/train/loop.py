"""The training loop between two cuts: one stage of a learning-rate curve that spans all stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from adapt_pruner.core import world
from adapt_pruner.core.precision import precision
from adapt_pruner.errors import RunError

__all__ = ["MICRO_TOKENS", "Objective", "Progress", "Reads", "Step", "make_optimizer", "stage_tokens", "train"]

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}  # tokens in one forward and backward; a larger batch is accumulated
_SMOOTHING = 0.9  # of the loss that the divergence guard watches

Objective = Callable[..., Tensor]
"""(model, ids, predicted) -> the sum of a loss over the predicted tokens, differentiable."""


class Reads(Protocol):
    """Training text: rows in a fixed order (see `data.rows`)."""

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Ids int64 [n, width] of some rows, and which tokens count."""

    def num_tokens(self, start: int, stop: int) -> int:
        """Tokens in those rows, padding left out."""


@dataclass
class Progress:
    """Where training stands, over all stages: with model and optimiser, everything that decides the next step.

    The random state is not part of it: each step seeds its own from the run's seed, its number and the process.
    """

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    smoothed: float | None = None  # the loss of this stage, and the lowest it has been; for the divergence guard
    lowest: float = math.inf

    def begin_stage(self) -> None:
        """Forget, in place, how the loss of the stage before went."""
        self.smoothed, self.lowest = None, math.inf


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is told to listeners."""

    step: int
    tokens: int
    loss: float
    lr: float
    gradient_norm: float


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> AdamW:
    """AdamW as in the authors' scripts: betas (0.9, 0.999), eps 1e-8; decay on matrices only, frozen parameters left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def stage_tokens(total: int, *, stages: int, shards: str) -> list[int]:
    """Tokens of each of T stages: `linear` 2k / (T(T+1)) of the total, `constant` 1 / T, `cosine` differences of 1 - cos(kπ / 2T).

    The last stage takes what rounding leaves.

    Source: Adapt-Pruner, arXiv:2502.03460, the released `seperate_strategy`.
    """
    t = stages
    shares: dict[str, Callable[[int], float]] = {
        "linear": lambda k: 2 * k / (t * (t + 1)),
        "constant": lambda k: 1 / t,
        "cosine": lambda k: math.cos((k - 1) * math.pi / (2 * t)) - math.cos(k * math.pi / (2 * t)),
    }
    tokens = [int(total * shares[shards](k)) for k in range(1, t + 1)]
    return tokens[:-1] + [total - sum(tokens[:-1])]


def train(
    model: nn.Module,
    rows: Reads,
    *,
    until: int,
    optimizer: AdamW,
    objective: Objective,
    schedule: Callable[[float], float],
    lr: float,
    total_tokens: int,
    batch_rows: int,
    progress: Progress,
    micro_tokens: int | None = None,
    clip: float = 1.0,
    max_rise: float = math.inf,
    dtype: str = "auto",
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Train, in place, on the rows from `progress.rows` to `until`, moving `progress` along.

    A step takes `batch_rows` rows, spread over the processes, and minimises the mean of the objective over all their
    predicted tokens. Its rate is lr · schedule(tokens at its middle / total_tokens). Weights and moments stay float32;
    matrix products run in `dtype` (see `core.precision.precision`). Gradients are clipped to a global norm of `clip`.

    Args:
        model: causal LM, float32 weights; plain on every process, or as `train.spread` shards it.
        rows: the training text.
        until: number of the row to stop before; nothing happens where it has been reached.
        optimizer: over the model's parameters that train.
        objective: a function of `train.objectives`.
        schedule: share of the run done → share of `lr`.
        total_tokens: of all stages.
        batch_rows: rows of one optimiser step, of all processes together; the last of a stage may have fewer.
        micro_tokens: tokens in one forward and backward of a process; by default 2,048 on a CPU, 16,384 on a GPU.
        max_rise: nats by which the smoothed loss may exceed its lowest in this stage.
        seed: of dropout, where there is any.
        on_step: told of every step when it is done.

    Raises:
        RunError: the loss or the gradient is not finite, or the loss has exploded; the weights are those of the last step.
    """
    device = next(model.parameters()).device
    was_training, random_state = model.training, torch.get_rng_state()
    model.train()
    try:
        while progress.rows < until:
            stop = min(until, progress.rows + batch_rows)
            torch.manual_seed((seed * 1_000_003 + progress.steps) * 4099 + world.rank())
            optimizer.zero_grad(set_to_none=True)
            batch = _Batch(rows, progress.rows, stop, device=device, micro_tokens=micro_tokens)
            loss = _accumulate(model, batch, objective, device=device, dtype=dtype)
            norm = _full(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
            _guard(float(loss), float(norm), progress, max_rise=max_rise, lr=lr)
            tokens = rows.num_tokens(progress.rows, stop)
            # The rate in the middle of the step: neither the first nor the last step of a run is at an end of the curve.
            rate = lr * schedule(min(1.0, (progress.tokens + tokens / 2) / total_tokens))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            progress.tokens, progress.steps, progress.rows = progress.tokens + tokens, progress.steps + 1, stop
            if on_step is not None:
                optimizer.zero_grad(set_to_none=True)
                on_step(Step(progress.steps, progress.tokens, float(loss), rate, float(norm)))
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
        torch.set_rng_state(random_state)


class _Batch:
    """This process's part of the rows of a step, in parts of at most `micro_tokens`.

    Every process makes the same number of passes, since sharded models meet in each: one that has fewer rows looks at
    one again and predicts nothing of it.
    """

    def __init__(self, rows: Reads, start: int, stop: int, *, device: torch.device, micro_tokens: int | None) -> None:
        each = -(-(stop - start) // world.size())
        first = start + world.rank() * each
        looked_at = min(stop - 1, first)
        ids, predicted = rows.batch(looked_at, min(stop, looked_at + each))
        if first >= stop:
            predicted = torch.zeros_like(ids, dtype=torch.bool)
        self.parts: list[tuple[Tensor, Tensor | None]] = []
        micro = max(1, (micro_tokens or MICRO_TOKENS["cpu" if device.type == "cpu" else "cuda"]) // ids.shape[1])
        if world.size() > 1:  # chat rows differ in width from process to process
            widest = torch.tensor([-micro])
            torch.distributed.all_reduce(widest, op=torch.distributed.ReduceOp.MAX)
            micro = -int(widest)
        for part in range(-(-each // micro)):
            chosen = slice(part * micro, (part + 1) * micro)
            if chosen.start < ids.shape[0]:
                counts = None if predicted is None else predicted[chosen].to(device)
                self.parts.append((ids[chosen].to(device), counts))
            else:
                self.parts.append((ids[:1].to(device), torch.zeros_like(ids[:1], dtype=torch.bool, device=device)))
        count = torch.tensor(sum(_num_predicted(*part) for part in self.parts), dtype=torch.float64)
        world.sum_in_place(count)
        self.num_predicted = max(1.0, float(count))


def _num_predicted(ids: Tensor, predicted: Tensor | None) -> int:
    return ids.shape[0] * (ids.shape[1] - 1) if predicted is None else int(predicted[:, 1:].sum())


def _accumulate(model: Any, batch: _Batch, objective: Objective, *, device: torch.device, dtype: str) -> Tensor:
    """Add, in place, the gradient of the batch's mean loss over all processes; returns that loss."""
    loss = torch.zeros((), dtype=torch.float64)
    sharded = hasattr(model, "as_forward")  # then reduce-scatter takes the mean over the processes
    scale = (world.size() if sharded else 1) / batch.num_predicted
    with precision(device, dtype):  # around all parts, so that weights are brought to bfloat16 once a step
        for ids, predicted in batch.parts:
            part = model.as_forward(objective, ids, predicted) if sharded else objective(model, ids, predicted)
            loss += part.detach().double().cpu()
            with torch.autocast(device.type, enabled=False):
                (part * scale).backward()
    if not sharded:
        world.sum_in_place(*(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
    world.sum_in_place(loss)
    return loss / batch.num_predicted


def _full(norm: Any) -> Tensor:
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full


def _guard(loss: float, norm: float, progress: Progress, *, max_rise: float, lr: float) -> None:
    """Stop before the step that a bad gradient would spoil."""
    at = (
        f"at step {progress.steps + 1}; lower training.lr (now {lr:g}), in another folder or, with --force-recipe, from a checkpoint "
        "of before it went wrong (remove those after it), or check the training text"
    )
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunError(f"the training loss became {loss} (gradient norm {norm}) {at}")
    smoothed = loss if progress.smoothed is None else _SMOOTHING * progress.smoothed + (1 - _SMOOTHING) * loss
    if smoothed > progress.lowest + max_rise:
        raise RunError(
            f"the training loss has exploded: {smoothed:.2f} (smoothed) is more than training.max_rise {max_rise:g} "
            f"above {progress.lowest:.2f}, the lowest of this stage, {at}"
        )
    progress.smoothed, progress.lowest = smoothed, min(progress.lowest, smoothed)
