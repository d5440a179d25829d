"""Running a model's decoder layers one after the other, so that something can be done between two of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.calibrate import precision

__all__ = ["Stream", "streams"]


@dataclass
class Stream:
    """A batch on its way through the decoder layers.

    Attributes:
        hidden: the hidden states that enter the next layer, [batch, length, width].
        keywords: what each layer is called with beside them (positions, attention masks).
        dtype: precision of the matrix products.
    """

    hidden: Tensor
    keywords: list[dict[str, Any]]
    dtype: str

    @torch.no_grad()
    def through(self, layer: nn.Module, index: int) -> Tensor:
        """What layer number `index` makes of the hidden states, which stay as they are."""
        with precision(self.hidden.device, self.dtype):
            output = layer(self.hidden, **self.keywords[index])
        left: Tensor = output[0] if isinstance(output, tuple) else output
        return left


@torch.no_grad()
def streams(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Tensor], *, dtype: str = "auto") -> list[Stream]:
    """Each batch as it enters the first of a model's decoder layers; no layer is run for that.

    Args:
        model: causal LM; left as found.
        layers: its decoder layers.
        batches: token ids, int64 [batch, length].
        dtype: precision of the matrix products.
    """
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        with _recording(layers) as (entered, keywords), precision(device, dtype):
            model.get_decoder()(input_ids=batch.to(device), use_cache=False)  # type: ignore[operator]
        found.append(Stream(entered[0], keywords, dtype))
    return found


@contextmanager
def _recording(layers: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """While it lasts, every layer returns its input and notes it and the keywords that it was called with."""
    entered: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def stand_in(hidden_states: Tensor, **others: Any) -> Tensor:
        entered.append(hidden_states)
        keywords.append(others)
        return hidden_states

    before: list[Callable[..., Any] | None] = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = stand_in
        yield entered, keywords
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
