"""How fast models read and write; they are measured in turn, so that a busy machine favours none."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.core.model.precision import casting_once, precision

_ROUNDS = 5  # timed passes of each model


@torch.no_grad()
def forward_speed(models: Sequence[Any], ids: Tensor, *, dtype: str = "float32") -> list[float]:
    """Median tokens per second of a forward pass over `ids`, logits included.

    The models take turns (A B A B …), after one pass each to warm up, in which weights are cast to bfloat16.

    Args:
        models: of transformers; each stays in its present mode.
        ids: int64 [batch, length]. All models read the same ids; those beyond the smallest vocabulary become its last one.
        dtype: precision of the matrix products.
    """
    ids = ids.clamp(max=min(model.config.get_text_config().vocab_size for model in models) - 1)
    seconds: list[list[float]] = [[] for _ in models]
    with ExitStack() as casting:
        for model in models:
            casting.enter_context(casting_once(model))
        for round_idx in range(_ROUNDS + 1):
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


@torch.inference_mode()
def reading_and_writing(model: Any, ids: Tensor, count: int) -> tuple[float, float]:
    """Seconds to read `ids`, with logits only after the last token of each row, and seconds to write `count` more tokens per row.

    Each written token is the one with the highest logit; they are written one at a time, with the cache.

    Args:
        model: causal LM in eval mode.
        ids: int64 [batch, length].
        count: tokens to write; may be 0.
    """
    device = next(model.parameters()).device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    ids = ids.to(device)
    start = now()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    middle = now()
    for _ in range(count):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return middle - start, now() - middle
