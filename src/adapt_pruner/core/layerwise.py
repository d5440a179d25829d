"""Running a model's decoder layers one after the other, forwards and backwards, so that something can be done between two of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core import world
from adapt_pruner.core.axes import Axis
from adapt_pruner.core.precision import casting_once, precision
from adapt_pruner.core.surgery import first
from adapt_pruner.core.task import CAUSAL_LM, Task

__all__ = ["LOGITS_OF", "Stream", "Sweep", "decoder_layers", "kept", "layers_at_once", "loss_above", "streams"]

LOGITS_OF = 128  # tokens whose logits `Sweep` holds at one time on a CPU, whose peak may be in its loss


def decoder_layers(model: Any, axes: Iterable[Axis] = ()) -> Any:
    """The decoder layers of a model, an `nn.ModuleList`: the one at the gate of its axis `layers`.

    Args:
        model: causal LM.
        axes: its axes; where `layers` is not among them, they are what transformers calls `get_decoder().layers`.
    """
    for axis in axes:
        if axis.name == "layers":
            return model.get_submodule(axis.gate.module)
    return model.get_decoder().layers


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
        """What layer number `index` makes of the hidden states, which stay as they are; for many, within `casting_once`."""
        return self.run(layer, index, self.hidden)

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What layer number `index` makes of `hidden`, called as for this batch."""
        with precision(hidden.device, self.dtype):
            output = layer(hidden, **self.keywords[index])
        return first(output)


@torch.no_grad()
def streams(
    model: nn.Module, batches: Sequence[Tensor], *, axes: Iterable[Axis] = (), task: Task = CAUSAL_LM, dtype: str = "auto"
) -> list[Stream]:
    """Each batch as it enters the first of a model's decoder layers; no layer is run for that.

    Args:
        model: causal LM; left as found.
        batches: token ids, int64 [batch, length].
        axes: see `decoder_layers`.
        task: what the model learns.
        dtype: precision of the matrix products.
    """
    inputs, layers = [], decoder_layers(model, axes)
    for batch in batches:
        with _standing_in(layers) as (entered, keywords):
            _read(model, batch, task, dtype)
        inputs.append(Stream(entered[0], keywords, dtype))
    return inputs


@torch.no_grad()
def loss_above(model: nn.Module, batch: Tensor, leaving: Tensor, *, task: Task = CAUSAL_LM, dtype: str = "auto") -> Tensor:
    """The summed loss of a batch whose hidden states leave the last of the model's decoder layers as `leaving`; no layer is run.

    Args:
        model: causal LM; left as found.
        batch: token ids, int64 [batch, length].
        leaving: [batch, length, width].
        task: what the model learns.
        dtype: precision of the matrix products.
    """
    device = next(model.parameters()).device
    with _standing_in(decoder_layers(model), leaving), precision(device, dtype):
        return task.loss(model, batch.to(device))


def _read(model: nn.Module, batch: Tensor, task: Task, dtype: str) -> None:
    device = next(model.parameters()).device
    with precision(device, dtype):
        task.read(model, batch.to(device))


class _StandIn(nn.Module):
    """Takes a layer's place without running it; has its attributes (models ask for `attention_type`) and none of its hooks."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.forward = layer, forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


@contextmanager
def _standing_in(layers: Any, leaving: Tensor | None = None) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """While it lasts no layer is run: each notes its input and keywords and returns its input, the last one `leaving`, if given."""
    entered: list[Tensor] = []
    keywords: list[dict[str, Any]] = []
    its = list(layers)

    def forward(hidden_states: Tensor, **others: Any) -> Tensor:
        entered.append(hidden_states)
        keywords.append(others)
        return hidden_states if leaving is None or len(entered) < len(its) else leaving

    try:
        for index, layer in enumerate(its):
            layers[index] = _StandIn(layer, forward)
        yield entered, keywords
    finally:
        for index, layer in enumerate(its):
            layers[index] = layer


def layers_at_once(depth: int, *, hidden: float, layer: float) -> int:
    """k, the layers of a group in `Sweep`: where depth / k · hidden + k · layer is least.

    Args:
        depth: number of layers.
        hidden: bytes of the hidden states of the whole text between two layers.
        layer: bytes that a layer of the group takes: gradients of its weights, and `kept` by autograd of a batch.
    """
    return max(1, min(depth, round(math.sqrt(depth * hidden / layer)))) if layer else depth


def kept(tokens: int, in_and_out: float) -> float:
    """Bytes that autograd keeps of a layer, roughly: in float32, what enters and what leaves each of its weight matrices.

    Args:
        tokens: of a batch.
        in_and_out: rows and columns of all its weight matrices.
    """
    return 4 * tokens * in_and_out


class Sweep:
    """Gradients of a text's loss by the weights, of a few layers at a time: those of all never exist together.

    Forwards the text goes through one layer after the other, and what enters the first layer of each group of k is kept.
    Backwards each group runs again, batch by batch, from what entered it, with what autograd needs of these layers only. The
    gradients are those of whole backward passes to the last bit, as sums are taken in the same order (to rounding where a batch on a
    CPU has logits in several pieces of `LOGITS_OF` tokens); instead of the gradients of all
    L layers there are those of k and the hidden states between L / k groups (see `layers_at_once`), for one more forward pass.

    `forward`, then `loss`, then `backward`. Parameters that want a gradient get one. Hooks on a decoder layer and in it are
    called once a batch in `forward`, and again in `backward`; those elsewhere in making a `Sweep`, in `loss` and in `backward`.

    Args:
        model: causal LM in which every decoder layer is called once, with weights of its own.
        batches: token ids, int64 [batch, length]; may be none.
        axes: see `decoder_layers`.
        task: what the model learns.
        dtype: precision of the matrix products.
        tell: told the share of the work that is done.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        *,
        axes: Iterable[Axis] = (),
        task: Task = CAUSAL_LM,
        dtype: str,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._model, self._batches, self._task, self._dtype, self._tell = model, batches, task, dtype, tell
        self._stack = decoder_layers(model, axes)
        self._layers = list(self._stack)
        self._device = next(model.parameters()).device
        self._flows = streams(model, batches, axes=axes, task=task, dtype=dtype)
        self._wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        weights = [weight for layer in self._layers for weight in layer.parameters()]
        gradients = sum(weight.nbytes for weight in weights if weight.requires_grad)
        in_and_out = sum(sum(weight.shape) for weight in weights if weight.ndim == 2)
        activations = kept(max((batch.numel() for batch in batches), default=0), in_and_out)
        hidden = sum(flow.hidden.nbytes for flow in self._flows)
        depth = len(self._layers)
        # Shares of the text may differ, and gradients are summed over all processes group by group.
        self._at_once = world.agreed(layers_at_once(depth, hidden=hidden, layer=(gradients + activations) / depth))
        self._entered: dict[int, list[Tensor]] = {}
        self._gradients: list[Tensor] = []
        self._done, self._of = 0, (4 * depth + 3) * len(batches)  # a layer backwards takes three times what it takes forwards

    def _worked(self, layers: int) -> None:
        self._done += layers
        self._tell(self._done / self._of)

    def forward(self) -> None:
        """Bring every batch to the end of the last layer."""
        for index, layer in enumerate(self._layers):
            if index % self._at_once == 0:
                self._entered[index] = [flow.hidden for flow in self._flows]
            with casting_once(layer):
                for flow in self._flows:
                    flow.hidden = flow.through(layer, index)
                    self._worked(1)

    def loss(self, *, over: int) -> Tensor:
        """The sum of the loss over all that is predicted, float64; gradients are those of 1 / `over` of it."""
        total = torch.zeros((), dtype=torch.float64)
        chunk = LOGITS_OF if self._device.type == "cpu" else None
        for flow, batch in zip(self._flows, self._batches, strict=True):
            leaving = flow.hidden.detach().requires_grad_()
            with _standing_in(self._stack, leaving), precision(self._device, self._dtype):
                loss = self._task.loss(self._model, batch.to(self._device), chunk=chunk)
            (loss / over).backward()
            total += loss.detach().double().cpu()
            assert leaving.grad is not None
            self._gradients.append(leaving.grad)
            flow.hidden = flow.hidden.new_empty(0)
            self._worked(3)
        return total

    def backward(self) -> Iterator[list[str]]:
        """Go down through the groups, to the embeddings if one of the weights outside the layers wants a gradient.

        Yields:
            The names of the parameters whose gradients are whole now; when asked for the next these are let go.
        """
        inside = {start: self._names(start) for start in self._entered}
        outside = [name for name in self._wanted if not any(name in names for names in inside.values())]
        for start in reversed(self._entered):
            below = bool(outside) or any(names for first, names in inside.items() if first < start)
            if inside[start] or below:
                self._through_group(start, further=below)
                yield from self._whole(inside[start])
            else:
                self._worked(3 * len(self._group(start)) * len(self._flows))
        if outside:
            for number, batch in enumerate(self._batches):
                with _standing_in(self._stack) as (entered, _):
                    _read(self._model, batch, self._task, self._dtype)
                if entered[0].requires_grad:
                    entered[0].backward(self._gradients[number])
            yield from self._whole(outside)

    def _whole(self, names: list[str]) -> Iterator[list[str]]:
        if names:
            yield names
            for name in names:
                self._wanted[name].grad = None

    def _group(self, start: int) -> list[tuple[int, nn.Module]]:
        return list(enumerate(self._layers))[start : start + self._at_once]

    def _names(self, start: int) -> list[str]:
        its = {weight for _, layer in self._group(start) for weight in layer.parameters()}
        return [name for name, weight in self._wanted.items() if weight in its]

    def _through_group(self, start: int, *, further: bool) -> None:
        entered, group = self._entered[start], self._group(start)
        try:
            with torch.autocast(self._device.type, enabled=False):  # weights cast within it stay cast until its end
                for number, flow in enumerate(self._flows):
                    hidden = entering = entered[number].detach().requires_grad_(further)
                    entered[number] = entering.new_empty(0)
                    for index, layer in group:
                        hidden = flow.run(layer, index, hidden)
                    hidden.backward(self._gradients[number])
                    if further:
                        assert entering.grad is not None
                        self._gradients[number] = entering.grad
                    self._worked(3 * len(group))
        finally:
            torch.clear_autocast_cache()  # an autocast around this one would go on with it
