"""`train`: training on batches that the caller gives, for loops that people write by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from adapt_pruner.core.model.feed import Feed
from adapt_pruner.train.loop import TrainConfig, TrainState, steps
from adapt_pruner.train.objectives import lm


def train(model: nn.Module, batches: Sequence[Tensor], *, optimizer: Optimizer, dtype: str = "auto") -> list[float]:
    """Train the model, in place, by next-token cross-entropy: one optimiser step for each batch.

    Args:
        model: causal LM, float32 weights.
        batches: token ids, int64 [batch, length] each.
        optimizer: over the model's parameters, at its own learning rate. Give it to `cut`, too, so that its moments are cut.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.

    Returns:
        The loss of each step before it was taken, nats per token.

    Raises:
        RunError: a loss or a gradient is not finite.
    """
    how = TrainConfig(objective=lm, schedule=lambda done: 1.0, lr=optimizer.param_groups[0]["lr"], batch_rows=1, dtype=dtype)
    feed, rows = cast(Feed, _Batches(batches)), sum(len(batch) for batch in batches)
    return [step.loss for step in steps(model, feed, optimizer, TrainState(), how, until=rows)]


class _Batches:
    """What the loop asks of a feed: each time it takes rows, it gets a whole batch."""

    wants_losses = False

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._coming = iter(batches)
        self.num_tokens = sum(batch.numel() for batch in batches)

    def take(self, num_rows: int) -> "_Batch":
        return _Batch(next(self._coming))


@dataclass
class _Batch:
    ids: Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, start: int, stop: int) -> tuple[Tensor, None]:
        return self.ids[start:stop], None
