"""Running a model's decoder layers one after the other, so that something can be done between two of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core import world
from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.calibrate import Metric, casting_once, finish, precision
from adapt_pruner.core.surgery import gated

__all__ = ["Stream", "decoder_layers", "score_behind", "streams"]


def decoder_layers(model: nn.Module, axes: Sequence[Axis]) -> Sequence[nn.Module]:
    """The decoder layers of a model, from its axes."""
    depth = next(axis for axis in axes if axis.name == "layers")
    layers: Sequence[nn.Module] = model.get_submodule(depth.gate.module)  # type: ignore[assignment]
    return layers


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
        """What layer number `index` makes of the hidden states, which stay as they are; for many, within `calibrate.casting_once`."""
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


@torch.no_grad()
def score_behind(
    model: nn.Module,
    axes: Sequence[Axis],
    sizes: Mapping[str, int],
    batches: Sequence[Tensor],
    *,
    metric: Metric,
    known: Scores,
    dtype: str = "auto",
) -> Scores:
    """Score units layer by layer, each layer on what comes out of those below it once these have lost what they are to lose.

    Every layer runs twice over the text: whole, while the metric looks, and with the units shut that its scores leave out.

    Args:
        model: causal LM; left as found.
        axes: its axes, `layers` among them.
        sizes: axis name -> units to keep; units of the axes inside a layer that are named here are scored.
        batches: token ids, int64 [batch, length].
        metric: what a unit is worth by what flows through the model, without gradients; it is called once a layer.
        known: axis name -> scores of whole layers, attentions, MLPs and of the stream, where `sizes` has those lose units, which are
            shut while layers above are measured.
        dtype: precision of the matrix products.

    Returns:
        axis name -> float32 [entries], as the metric gives them.
    """
    others = [axis for axis in axes if axis.name in sizes and not axis.gate.is_linear and not axis.gate.output]
    with gated(model, axes, Mask.of_sizes(others, known, sizes)):
        return _score_behind(model, axes, sizes, batches, metric=metric, dtype=dtype)


def _score_behind(
    model: nn.Module, axes: Sequence[Axis], sizes: Mapping[str, int], batches: Sequence[Tensor], *, metric: Metric, dtype: str
) -> Scores:
    layers = decoder_layers(model, axes)
    flows = streams(model, layers, world.share(batches), dtype=dtype)
    scores: Scores = {}
    for index, layer in enumerate(layers):
        inside = [axis for axis in axes if axis.layer == index and axis.gate.is_linear and axis.name in sizes]
        looking = metric(model, inside)
        try:
            next(looking)
            with casting_once(layer):
                for flow in flows:
                    flow.through(layer, index)
            scores |= finish(looking)
        finally:
            looking.close()
        with gated(model, axes, Mask.of_sizes(inside, scores, sizes)), casting_once(layer):
            for flow in flows:
                flow.hidden = flow.through(layer, index)
    return world.agreed(scores)
