"""The training loop between two cuts: one stage of a learning-rate curve that spans all stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from adapt_pruner.core.calibrate import precision
from adapt_pruner.errors import RunError

__all__ = ["Progress", "Step", "make_optimizer", "stage_tokens", "train"]

_MICRO_TOKENS = 1024  # tokens in one forward and backward; a larger batch is accumulated


@dataclass
class Progress:
    """Where training stands, over all stages: with the model and the optimiser, everything the next step depends on."""

    tokens: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is told to listeners."""

    step: int
    tokens: int
    loss: float
    lr: float
    gradient_norm: float


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> AdamW:
    """AdamW as in the authors' scripts: betas (0.9, 0.999), eps 1e-8; decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
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
    blocks: Tensor,
    *,
    optimizer: AdamW,
    objective: Callable[..., Tensor],
    schedule: Callable[[float], float],
    lr: float,
    total_tokens: int,
    batch_tokens: int,
    progress: Progress,
    clip: float = 1.0,
    dtype: str = "auto",
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Train all weights, in place, for one pass over `blocks`, moving `progress` along.

    The rate of a step is lr · schedule(tokens at its middle / total_tokens). Weights and moments stay float32; matrix
    products run in `dtype` (see `core.calibrate.precision`). Gradients are clipped to a global norm of `clip`.

    Args:
        model: causal LM, float32 weights.
        blocks: int32 or int64 [num_blocks, length]; one pass, in this order. A stage may have none.
        optimizer: over the model's parameters; `cut` keeps it in step with the model.
        objective: a function of `train.objectives`.
        schedule: share of the run done → share of `lr`.
        total_tokens: of all stages.
        batch_tokens: tokens of one optimiser step; rounded down to whole blocks, at least one.
        on_step: told of every step.

    Raises:
        RunError: the loss or the gradient is not finite; the weights are those of the last good step.
    """
    if not len(blocks):
        return
    device = next(model.parameters()).device
    length = blocks.shape[1]
    micro = max(1, _MICRO_TOKENS // length)
    was_training = model.training
    model.train()
    try:
        for batch in blocks.split(max(1, batch_tokens // length)):
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=device)
            for part in batch.long().split(micro):
                share = part.shape[0] / batch.shape[0]
                with precision(device, dtype):
                    loss += share * objective(model, part.to(device), share=share)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                optimizer.zero_grad(set_to_none=True)
                raise RunError(
                    f"the training loss became {float(loss)} (gradient norm {float(norm)}) at step {progress.steps + 1}; "
                    f"lower training.lr (now {lr:g}) or check the training text"
                )
            # The rate in the middle of the step: neither the first nor the last step of a run is at an end of the curve.
            rate = lr * schedule(min(1.0, (progress.tokens + batch.numel() / 2) / total_tokens))
            progress.tokens += batch.numel()
            progress.steps += 1
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            if on_step is not None:
                on_step(Step(progress.steps, progress.tokens, float(loss), rate, float(norm)))
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
