"""Perplexity: how surprised a model is by a text."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapt_pruner import families
from adapt_pruner.core import world
from adapt_pruner.core.precision import casting_once, precision, spoiled
from adapt_pruner.core.strict_json import perplexity_of
from adapt_pruner.core.task import CAUSAL_LM

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """exp(nll), with nll the mean over `tokens` predicted tokens in nats; `seconds` of wall clock for all `windows`.

    `tokens_per_second` leaves out each process' first window, which also pays for making ready (kernels for a pruned model's many
    widths, caches); None where no process has two. `bits_per_byte` is the sum of the same losses, in bits, over the bytes of the text: unlike the others it compares between
    tokenizers. None where the bytes are not known.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float
    tokens_per_second: float | None = None
    bits_per_byte: float | None = None


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    dtype: str = "float32",
    num_bytes: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Sum of next-token losses over non-overlapping windows / number of predicted tokens; nothing is carried between windows.

    Args:
        model: causal LM, of a known family or not; its mode is left as found.
        windows: int64 [1, length] each; a window predicts its tokens 1 … length - 1.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        num_bytes: of the text that the predicted tokens stand for (see `data.tokens.text_bytes`).
        on_window: told (done, of).

    Returns:
        The figures; `perplexity` is infinite where exp overflows.

    Raises:
        RunError: the loss is not a number.
    """
    device = next(model.parameters()).device
    was_training = model.training
    began = time.perf_counter()
    warm = began
    total, count = torch.zeros((), dtype=torch.float64), _predicted(windows)
    mine = world.share(windows)
    losses = CAUSAL_LM.loss if families.is_known(model.config) else _nll_of_its_logits
    try:
        model.eval()
        with casting_once(model):
            for done, ids in enumerate(mine, start=1):
                with precision(device, dtype):
                    total += losses(model, ids.to(device)).double().cpu()
                if done == 1:
                    warm = time.perf_counter()
                if on_window is not None:
                    on_window(done, len(mine))
    finally:
        model.train(was_training)
    after, spent = _predicted(mine[1:]), time.perf_counter() - warm
    rate = torch.tensor(after / spent if after else 0.0, dtype=torch.float64)
    world.sum_in_place(total, rate)
    nll = float(total) / count
    if math.isnan(nll):
        raise spoiled(f"the loss on the text is {nll}", device, dtype)
    bits = float(total) / math.log(2) / num_bytes if num_bytes else None
    seconds = time.perf_counter() - began
    return Perplexity(perplexity_of(nll), nll, count, len(windows), seconds, float(rate) or None, bits)


def _predicted(windows: Sequence[Tensor]) -> int:
    return sum(ids.numel() - ids.shape[0] for ids in windows)


def _nll_of_its_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """`core.task.CAUSAL_LM.loss` by the logits that the model itself gives, whatever it makes them of; all of them are held."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")
