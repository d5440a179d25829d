"""Run a model's decoder layers one after the other, forwards and backwards, so that a caller can act between two layers."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.cut import first
from adapt_pruner.core.model.modeling_pruned import STACKS, name_in
from adapt_pruner.core.model.precision import casting_once, computed_in, precision
from adapt_pruner.core.model.shelf import InMemory, Stored, at_hand, fetched, is_shelved, on_shelf, unused
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world

HIDDEN_BYTES = 2**29  # of a text between two layers, of a model on a shelf
LOGITS_OF = 128  # tokens whose logits `Sweep` holds at one time on a CPU, where the loss may set the peak of memory


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a causal LM: the `nn.ModuleList` called `layers` (or GPT-2's `h`) in `get_decoder()`."""
    decoder = model.get_decoder()
    return getattr(decoder, name_in(decoder, STACKS))


@dataclass
class Stream:
    """A batch on its way through the decoder layers.

    Attributes:
        hidden: the hidden states that enter the next layer, [batch, length, width].
        keywords: the keyword arguments of each layer (positions, attention masks).
        dtype: precision of the matrix products.
    """

    hidden: Tensor
    keywords: list[dict[str, Any]]
    dtype: str

    @torch.no_grad()
    def through(self, layer: nn.Module, index: int) -> Tensor:
        """The output of layer number `index`; the hidden states stay as they are. For many, call it within `at_hand`."""
        return self.run(layer, index, self.hidden)

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The output of layer number `index` for `hidden`, called with the arguments of this batch."""
        with precision(hidden.device, self.dtype):
            output = layer(hidden, **self.keywords[index])
        return first(output)


@torch.no_grad()
def streams(model: nn.Module, batches: Sequence[Tensor], *, task: Task = CAUSAL_LM, dtype: str) -> list[Stream]:
    """Each batch as it enters the first decoder layer; no layer is run for this.

    Args:
        model: causal LM; left as found.
        batches: token ids, int64 [batch, length].
        task: what the model learns.
        dtype: precision of the matrix products.
    """
    inputs, layers = [], decoder_layers(model)
    with fetched(task.entrance(model)):
        for batch in batches:
            with _standing_in(layers) as (entered, keywords):
                _read(model, batch, task, dtype)
            inputs.append(Stream(entered[0], keywords, dtype))
    return inputs


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Tensor], *, task: Task = CAUSAL_LM, dtype: str) -> Iterator[Tensor]:
    """The summed loss of each batch, float64 on the CPU; weights on a shelf are fetched once for many batches.

    Args:
        model: causal LM; left as found.
        batches: token ids, int64 [batch, length].
        task: what the model learns.
        dtype: precision of the matrix products.
    """
    device = next(model.parameters()).device
    if not is_shelved(model):
        with casting_once(model), precision(device, dtype):
            for batch in batches:
                yield task.loss(model, batch.to(device)).double().cpu()
        return
    head: Any = task.head(model)
    for group in _at_most(batches, HIDDEN_BYTES // (4 * head.weight.shape[-1])):
        flows = streams(model, group, task=task, dtype=dtype)
        for index, layer in enumerate(decoder_layers(model)):
            with at_hand(layer):
                for flow in flows:
                    flow.hidden = flow.through(layer, index)
        with fetched(head, narrow=computed_in(device, dtype)):
            for flow, batch in zip(flows, group, strict=True):
                yield loss_above(model, batch, flow.hidden, task=task, dtype=dtype).double().cpu()


def _at_most(batches: Sequence[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """The batches in order, in groups of at most so many tokens, or of one batch."""
    group: list[Tensor] = []
    for batch in batches:
        if group and sum(other.numel() for other in (*group, batch)) > tokens:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


@torch.no_grad()
def loss_above(model: nn.Module, batch: Tensor, leaving: Tensor, *, task: Task = CAUSAL_LM, dtype: str) -> Tensor:
    """The summed loss of a batch whose hidden states after the last decoder layer are `leaving`; no layer is run.

    Args:
        model: causal LM; left as found.
        batch: token ids, int64 [batch, length].
        leaving: [batch, length, width].
        task: what the model learns.
        dtype: precision of the matrix products.
    """
    device = next(model.parameters()).device
    with unused(task.entrance(model)), _standing_in(decoder_layers(model), leaving), precision(device, dtype):
        return task.loss(model, batch.to(device))


@torch.no_grad()
def read_above(model: nn.Module, batch: Tensor, leaving: Tensor, *, task: Task = CAUSAL_LM, dtype: str) -> Tensor:
    """What enters the head, [batch, length, width], of a batch as in `loss_above`; no layer is run."""
    with unused(task.entrance(model)), _standing_in(decoder_layers(model), leaving):
        return _read(model, batch, task, dtype)


def _read(model: nn.Module, batch: Tensor, task: Task, dtype: str) -> Tensor:
    device = next(model.parameters()).device
    with precision(device, dtype):
        hidden: Tensor = task.read(model, batch.to(device)).last_hidden_state
    return hidden


class _StandIn(nn.Module):
    """Replaces a layer that must not run. It has the layer's attributes (models ask for `attention_type`), not its hooks."""

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
    """Run no layer: each records its input and keywords and returns its input; the last returns `leaving` if given."""
    entered: list[Tensor] = []
    keywords: list[dict[str, Any]] = []
    modules = list(layers)

    names = list(inspect.signature(modules[0].forward).parameters)[1:] if modules else []

    def forward(hidden_states: Tensor, *args: Any, **others: Any) -> Tensor:
        entered.append(hidden_states)
        keywords.append(dict(zip(names, args, strict=False)) | others)
        return hidden_states if leaving is None or len(entered) < len(modules) else leaving

    try:
        for index, layer in enumerate(modules):
            layers[index] = _StandIn(layer, forward)
        yield entered, keywords
    finally:
        for index, layer in enumerate(modules):
            layers[index] = layer


def layers_at_once(depth: int, *, hidden: float, layer: float) -> int:
    """k, the layers of a group in `Sweep` that minimise depth / k · hidden + k · layer.

    Args:
        depth: number of layers.
        hidden: bytes of the hidden states of the whole text between two layers.
        layer: bytes for one layer of the group: the gradients of its weights, and its `activation_bytes`.
    """
    return max(1, min(depth, round(math.sqrt(depth * hidden / layer)))) if layer else depth


def activation_bytes(tokens: int, in_and_out: float) -> float:
    """Bytes that autograd keeps for a layer, roughly: the float32 inputs and outputs of each of its weight matrices.

    Args:
        tokens: tokens of a batch.
        in_and_out: the sum of rows and columns over all its weight matrices.
    """
    return 4 * tokens * in_and_out


class Sweep:
    """Gradients of a text's loss with respect to the weights, a few layers at a time, so that not all gradients exist together.

    Forwards, the text goes through one layer after the other, and the input of the first layer of each group of k is kept.
    Backwards, each group runs again from that input, batch by batch, and autograd keeps what it needs for these layers only.
    Memory holds the gradients of k layers instead of all L, and the hidden states between L / k groups (see `layers_at_once`). With
    weights on disk these hidden states lie there, too, and k is 1.
    The cost is one more forward pass. The gradients equal those of whole backward passes to the last bit, because sums are taken
    in the same order; if a batch on a CPU has more than `LOGITS_OF` tokens, they are equal up to rounding.

    Call `forward`, then `loss`, then `backward`. Parameters that require a gradient get one. Hooks on and in decoder layers are
    called once per batch in `forward` and again in `backward`. Hooks elsewhere are called when a `Sweep` is made, in `loss` and
    in `backward`.

    Args:
        model: causal LM in which every decoder layer is called once, with weights of its own.
        batches: token ids, int64 [batch, length]; may be none.
        task: what the model learns.
        dtype: precision of the matrix products.
        tell: called with the share of the work that is done.
        further: whether the gradient goes down to the input of the first layer, even if no weight there requires one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        *,
        task: Task = CAUSAL_LM,
        dtype: str,
        tell: Callable[[float], None] = lambda share: None,
        further: bool = False,
    ) -> None:
        self._model, self._batches, self._task, self._dtype, self._tell = model, batches, task, dtype, tell
        self._to_the_bottom = further
        self._stack = decoder_layers(model)
        self._layers = list(self._stack)
        self._device = next(model.parameters()).device
        self._flows = streams(model, batches, task=task, dtype=dtype)
        self._wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        weights = [weight for layer in self._layers for weight in layer.parameters()]
        gradients = sum(weight.nbytes for weight in weights if weight.requires_grad)
        away = on_shelf(*self._layers)
        self._keep = away[0].shelf.laid if away else InMemory
        fetched_at_once = sum(weight.nbytes for weight in away)
        in_and_out = sum(sum(weight.shape) for weight in weights if weight.ndim == 2)
        activations = activation_bytes(max((batch.numel() for batch in batches), default=0), in_and_out)
        hidden = 0 if away and away[0].shelf.on_disk else sum(flow.hidden.nbytes for flow in self._flows)
        depth = len(self._layers)
        # Processes may have different amounts of text, but must use the same groups: gradients are summed group by group.
        self._at_once = world.agreed(
            layers_at_once(depth, hidden=hidden, layer=(gradients + fetched_at_once + activations) / depth)
        )
        self._entered: dict[int, list[Stored]] = {}
        self._gradients: list[Tensor] = []
        self._done, self._of = 0, (4 * depth + 3) * len(batches)  # a layer takes three times as long backwards as forwards

    def _worked(self, layers: int) -> None:
        self._done += layers
        if self._of:  # a process may have no text
            self._tell(self._done / self._of)

    def forward(self) -> None:
        """Bring every batch to the end of the last layer."""
        for index, layer in enumerate(self._layers):
            if index % self._at_once == 0:
                self._entered[index] = [self._keep(flow.hidden) for flow in self._flows]
            with at_hand(layer):
                for flow in self._flows:
                    flow.hidden = flow.through(layer, index)
                    self._worked(1)

    def loss(self, *, over: int) -> Tensor:
        """The sum of the loss over all predictions, float64; the gradients are those of 1 / `over` of it."""
        total = torch.zeros((), dtype=torch.float64)
        chunk = LOGITS_OF if self._device.type == "cpu" else None
        narrow = computed_in(self._device, self._dtype)
        with fetched(self._task.head(self._model), narrow=narrow):
            for flow, batch in zip(self._flows, self._batches, strict=True):
                leaving = flow.hidden.detach().requires_grad_()
                alone = unused(self._task.entrance(self._model))
                with alone, _standing_in(self._stack, leaving), precision(self._device, self._dtype):
                    loss = self._task.loss(self._model, batch.to(self._device), chunk=chunk)
                (loss / over).backward()
                total += loss.detach().double().cpu()
                assert leaving.grad is not None
                self._gradients.append(leaving.grad)
                flow.hidden = flow.hidden.new_empty(0)
                self._worked(3)
        return total

    def backward(self) -> Iterator[list[str]]:
        """Go down through the groups, and to the embeddings if a weight outside the layers requires a gradient.

        Yields:
            The names of parameters whose gradients are complete now. These gradients are dropped when the next names are asked
            for.
        """
        inside = {start: self._names(start) for start in self._entered}
        outside = [name for name in self._wanted if not any(name in names for names in inside.values())]
        for start in reversed(self._entered):
            below = self._to_the_bottom or bool(outside) or any(names for first, names in inside.items() if first < start)
            if inside[start] or below:
                with fetched(*(layer for _, layer in self._group(start))):
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
        weights = {weight for _, layer in self._group(start) for weight in layer.parameters()}
        return [name for name, weight in self._wanted.items() if weight in weights]

    def _through_group(self, start: int, *, further: bool) -> None:
        entered, group = self._entered[start], self._group(start)
        try:
            with torch.autocast(self._device.type, enabled=False):  # keeps weights cast inside it until it ends
                for number, flow in enumerate(self._flows):
                    hidden = entering = entered[number].read().to(self._device).detach().requires_grad_(further)
                    entered[number] = InMemory(entering.new_empty(0))
                    for index, layer in group:
                        hidden = flow.run(layer, index, hidden)
                    hidden.backward(self._gradients[number])
                    if further:
                        assert entering.grad is not None
                        self._gradients[number] = entering.grad
                    self._worked(3 * len(group))
        finally:
            torch.clear_autocast_cache()  # otherwise an enclosing autocast would keep using the cast weights
