"""How fast models read: tokens per second of a forward pass, measured in turn so that a busy machine favours none."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapt_pruner.core.calibrate import precision

__all__ = ["forward_speed"]


@torch.no_grad()
def forward_speed(models: Sequence[nn.Module], ids: Tensor, *, dtype: str = "float32", rounds: int = 5) -> list[float]:
    """Median tokens per second of a forward pass over `ids` (logits included), A B A B … after one pass each to warm up.

    Args:
        models: each in the mode it is in.
        ids: int64 [batch, length].
        dtype: precision of the matrix products.
        rounds: timed passes of each model.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for round_idx in range(rounds + 1):
        for taken, model in zip(seconds, models, strict=True):
            device = next(model.parameters()).device
            on_device = ids.to(device)
            began = time.perf_counter()
            with precision(device, dtype):
                model(input_ids=on_device, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_idx:
                taken.append(time.perf_counter() - began)
    return [ids.numel() / statistics.median(taken) for taken in seconds]
