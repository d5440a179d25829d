"""Perplexity: how much a text surprises a model."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner import families
from adapt_pruner.core.model.layers import losses
from adapt_pruner.core.model.precision import casting_once, nonfinite_error, precision
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.strict_json import perplexity_of


@dataclass(frozen=True)
class Perplexity:
    """exp(nll), where nll is the mean loss over `tokens` predicted tokens, in nats; all `windows` took `seconds`.

    `tokens_per_second` leaves out each process's first window, which includes preparation (kernels for a pruned model's many
    widths, caches); None if no process has two. `bits_per_byte` is the sum of the same losses, in bits, over the bytes of the
    text; None if the bytes are not known. Unlike the other figures it compares between tokenizers. `judged` has a task's own
    figures, each a mean over all predictions. `by_text` has the nll on each text, if there are several.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seconds: float
    tokens_per_second: float | None = None
    bits_per_byte: float | None = None
    judged: Mapping[str, float] = field(default_factory=dict)
    by_text: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data; `judged` and `by_text` only if they are not empty."""
        return {name: value for name, value in asdict(self).items() if name not in ("judged", "by_text") or value}


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    task: Task = CAUSAL_LM,
    dtype: str = "float32",
    num_bytes: int | None = None,
    texts: Sequence[str] = (),
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Sum of the losses over non-overlapping windows, divided by the number of predictions; nothing is carried between windows.

    Args:
        model: causal LM, of a known family or not; its mode is left as found.
        windows: int64 [1, length] each, or whatever a batch of the task is; a causal LM's window predicts its tokens 1 … length - 1.
        task: what is predicted, and with what loss.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        num_bytes: bytes of text behind the predicted tokens (see `data.tokens.text_bytes`).
        texts: name of the text of each window, for the figures by text; empty if all windows are from one text.
        on_window: called with (done, of).

    Returns:
        The figures; `perplexity` is infinite if exp overflows.

    Raises:
        RunError: the loss is not a number.
    """
    device = next(model.parameters()).device
    was_training = model.training
    began = time.perf_counter()
    warm = began
    total, count = torch.zeros((), dtype=torch.float64), task.num_predicted(windows)
    mine, names = world.share(windows), world.share(texts if len(set(texts)) > 1 else [""] * len(windows))
    each = (losses if families.is_known(model.config) else _by_its_logits)(model, mine, task=task, dtype=dtype)
    right: dict[str, float] = defaultdict(float)
    nats: dict[str, float] = defaultdict(float)
    predicted: dict[str, float] = defaultdict(float)
    try:
        model.eval()
        for done, (ids, name, loss) in enumerate(zip(mine, names, each, strict=True), start=1):
            total += loss
            nats[name] += float(loss)
            predicted[name] += task.num_predicted([ids])
            with precision(device, dtype):
                for figure, value in task.judged(model, ids.to(device)).items():
                    right[figure] += float(value)
            if done == 1:
                warm = time.perf_counter()
            if on_window is not None:
                on_window(done, len(mine))
    finally:
        model.train(was_training)
    after, spent = task.num_predicted(mine[1:]), time.perf_counter() - warm
    rate = torch.tensor(after / spent if after else 0.0, dtype=torch.float64)
    judged = {name: torch.tensor(right[name], dtype=torch.float64) for name in world.agreed(list(right))}
    by_text = {name: torch.tensor([nats[name], predicted[name]], dtype=torch.float64) for name in sorted(set(texts))}
    world.sum_in_place(total, rate, *judged.values(), *by_text.values())
    nll = float(total) / count
    if math.isnan(nll):
        raise nonfinite_error(f"the loss on the text is {nll}", device, dtype)
    bits = float(total) / math.log(2) / num_bytes if num_bytes else None
    seconds = time.perf_counter() - began
    return Perplexity(
        perplexity_of(nll),
        nll,
        count,
        len(windows),
        seconds,
        float(rate) or None,
        bits,
        {name: float(value) / count for name, value in judged.items()},
        {name: float(losses / number) for name, (losses, number) in by_text.items()} if len(by_text) > 1 else {},
    )


@torch.no_grad()
def _by_its_logits(model: nn.Module, windows: Sequence[Tensor], *, task: Task, dtype: str) -> Iterator[Tensor]:
    """Like `losses`, from the model's own logits, however it computes them; all logits of a window are held at once."""
    device = next(model.parameters()).device
    with casting_once(model), precision(device, dtype):
        for window in windows:
            ids = window.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            yield nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double().cpu()
