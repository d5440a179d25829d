"""Run a model over its calibration text once, for any number of metrics.

A metric is a function with a `yield` in it. Before the yield it attaches its hooks. The value that it yields says what it needs
(`Evidence`). During the yield the text runs through the model. After it the metric computes the scores and returns them:

    def change(model, axes):
        with attached(layer.register_forward_hook(...) for layer in decoder_layers(model)):
            yield Evidence.FORWARD
        return {"layers": ...}

A metric that needs gradients of weights yields again and again. Each time it gets the name of a parameter whose complete gradient
is in its `grad`; the gradient is freed afterwards. None says that there are no more:

    def steepness(model, axes):
        sums = {}
        while (name := (yield Evidence.GRADIENTS)) is not None:
            sums[name] = model.get_parameter(name).grad.abs().sum()
        return {"layers": ...}

`score` drives all metrics with one forward pass per batch, and one backward pass if a metric wants gradients. If a metric wants
the gradient of each sequence, the passes are per sequence. If metrics want only forward passes and gradients of weights,
gradients exist for a few layers at a time (`layerwise.Sweep`).

The hooks of a metric see each batch once in the modules inside decoder layers. Modules outside the layers may be called more
often, and not with the stream that leaves the layers. If a metric wants gradients of weights, its hooks see each batch twice:
make two metrics of it.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from itertools import product
from pathlib import Path
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.layers import LOGITS_OF, Sweep, decoder_layers, losses, streams
from adapt_pruner.core.model.precision import linears_cast, nonfinite_error, precision
from adapt_pruner.core.model.shelf import at_hand, is_shelved
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.errors import RunError


class Evidence(Enum):
    """What a metric needs: weights alone, a forward pass, gradients of hidden states, also of weights, or of each sequence.

    With STREAM_GRADIENTS the backward pass reaches every hidden state, where hooks see its gradient, but no weight. That is a
    third less work and takes no memory for gradients of weights. With SAMPLE_GRADIENTS every pass is one sequence. A hook on a
    parameter (`Tensor.register_hook`) is then called once per sequence, with what that sequence adds to the gradient of L.
    """

    WEIGHTS = 0
    FORWARD = 1
    STREAM_GRADIENTS = 2
    GRADIENTS = 3
    SAMPLE_GRADIENTS = 4


Metric = Callable[[nn.Module, Sequence[Axis]], Generator[Evidence, Any, Scores]]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context no module drops anything; afterwards each is in the mode in which it was."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def as_found(model: nn.Module, trained: set[str]) -> Iterator[None]:
    """Eval mode, with gradients for the named parameters only; afterwards everything is as it was."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    cpu_rng = torch.get_rng_state()
    try:
        with eval_mode(model):
            for name, parameter in model.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(name in trained)
            yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        torch.set_rng_state(cpu_rng)


def evidence_needed(model: nn.Module, axes: Sequence[Axis], metrics: Sequence[Metric]) -> Evidence:
    """The most that any of `metrics` needs to see, found by starting each and closing it again."""
    axes, needs = _scored(axes), []
    with as_found(model, _on(axes)):
        for metric in metrics:
            running = metric(model, axes)
            needs.append(next(running))
            running.close()
    return max(needs, key=lambda evidence: evidence.value, default=Evidence.WEIGHTS)


def _on(axes: Sequence[Axis]) -> set[str]:
    """The names of the parameters that lie on an axis."""
    return {piece.parameter for axis in axes for piece in axis.slices}


def _scored(axes: Sequence[Axis]) -> Sequence[Axis]:
    """The axes without the vocabulary: what a token is worth is how often a text uses it."""
    return [axis for axis in axes if axis.gate.kind != "logits"]


@torch.enable_grad()
def score(
    model: nn.Module,
    axes: Sequence[Axis],
    batches: Sequence[Tensor],
    *,
    metrics: Sequence[Metric],
    task: Task = CAUSAL_LM,
    dtype: str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Scores, float]:
    """Run `batches` through the model once and return the scores of all `metrics`.

    Metrics see the gradients of L, the mean loss over all predictions of all batches (next-token cross-entropy, nats per token,
    unless `task` is another). Gradients are summed over the batches before any metric reads them. Only parameters on an axis get
    gradients. If metrics need no more than these and forward passes, the gradients of only a few layers exist at a time, beside
    the hidden states between groups of layers (see `layerwise.Sweep`).

    Args:
        model: causal LM; left as found (weights, gradients, train or eval mode, random state).
        axes: the axes to score, and `layers` for the metrics that look at whole layers.
        batches: token ids, int64 [batch, length].
        metrics: functions as described at the top of this file; their results are merged.
        task: what the model learns.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_batch: told (done, of), in batches, as the work goes on.

    Returns:
        The merged scores, and L (NaN when no metric needed a pass).

    Each of several processes reads a share of the batches. Sums run over all processes, and every process gets the same scores.

    Raises:
        RunError: L or a score is not finite.
    """
    axes = _scored(axes)
    running = [metric(model, axes) for metric in metrics]
    total, finished = float("nan"), {}
    try:
        with as_found(model, _on(axes)):
            needs = [next(metric) for metric in running]
            need = max(needs, key=lambda evidence: evidence.value, default=Evidence.WEIGHTS)
            of_weights = [metric for metric, seen in zip(running, needs, strict=True) if seen.value >= Evidence.GRADIENTS.value]
            mine = world.share(batches)
            gradients: Iterable[list[str]] = ()
            if need is Evidence.SAMPLE_GRADIENTS:
                mine = [sequence for batch in mine for sequence in batch.split(1)]
            if need is not Evidence.WEIGHTS:
                predicted = task.num_predicted(batches)
                streams_too = Evidence.STREAM_GRADIENTS in needs
                by_layer = need is Evidence.GRADIENTS and not streams_too and len(task.towers) == 1
                if (is_shelved(model) and need is Evidence.STREAM_GRADIENTS) or by_layer:
                    tell = _in_batches(on_batch, len(mine))
                    sweep = Sweep(model, mine, task=task, dtype=dtype, tell=tell, further=streams_too)
                    sweep.forward()
                    # The backward sweep runs each layer again. Metrics that watch activations finish first, to see the text once.
                    finished = {metric: finish(metric) for metric in running if metric not in of_weights and not streams_too}
                    nll, gradients = sweep.loss(over=predicted), sweep.backward()
                else:
                    nll = _passes(model, mine, need, over=predicted, task=task, dtype=dtype, on_batch=on_batch)
                    gradients = [[name for name, weight in model.named_parameters() if weight.requires_grad]]
                world.sum_in_place(nll)
                total = float(nll) / predicted
                if not math.isfinite(total):
                    raise nonfinite_error(f"the loss on the calibration text is {total}", next(model.parameters()).device, dtype)
            for names in gradients if of_weights or need is Evidence.STREAM_GRADIENTS else ():
                _sum_gradients(model, names)
                for metric, name in product(of_weights, names):
                    _show(metric, name)
            merged: Scores = {}
            for metric in running:
                merged |= finished[metric] if metric in finished else finish(metric)
    finally:
        for metric in running:
            metric.close()
    return world.agreed(merged), total


def _show(metric: Generator[Evidence, Any, Scores], name: str) -> None:
    try:
        metric.send(name)
    except StopIteration:
        raise TypeError(
            "a metric that asks for gradients of weights yields again for each of them, until it gets None; this one returned before"
        ) from None


def _passes(
    model: nn.Module,
    batches: Sequence[Tensor],
    need: Evidence,
    *,
    over: int,
    task: Task,
    dtype: str,
    on_batch: Callable[[int, int], None] | None,
) -> Tensor:
    """Run each batch through the whole model and, if gradients are needed, back; returns the sum of the loss, float64.

    The gradients are those of this sum divided by `over`.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    if need is Evidence.FORWARD:
        for done, loss in enumerate(losses(model, batches, task=task, dtype=dtype), start=1):
            total += loss
            if on_batch is not None:
                on_batch(done, len(batches))
        return total
    only = _streams_only(model, task.entrance(model), dtype) if need is Evidence.STREAM_GRADIENTS else nullcontext()
    chunk = LOGITS_OF if device.type == "cpu" else None
    with only:
        for done, batch in enumerate(batches, start=1):
            with precision(device, dtype):
                loss = task.loss(model, batch.to(device), chunk=chunk)
            (loss / over).backward()
            total += loss.detach().double().cpu()
            if on_batch is not None:
                on_batch(done, len(batches))
    return total


def _in_batches(on_batch: Callable[[int, int], None] | None, number: int) -> Callable[[float], None]:
    """A function that is told the share of the work done, and tells `on_batch` whenever another batch of `number` is done."""
    told = 0

    def tell(share: float) -> None:
        nonlocal told
        done = int(share * number + 1e-6)
        if on_batch is not None and done > told:
            told = done
            on_batch(done, number)

    return tell


@contextmanager
def _streams_only(model: nn.Module, entrance: nn.Module, dtype: str) -> Iterator[None]:
    """While the context lasts, hidden states from `entrance` on get gradients and no weight does; for use inside `as_found`."""
    model.requires_grad_(False)
    with (
        linears_cast(model, dtype),
        attached([entrance.register_forward_hook(lambda module, args, output: output.requires_grad_(output.is_leaf))]),
    ):
        yield


def _sum_gradients(model: nn.Module, names: Sequence[str]) -> None:
    """Sum, in place, the gradients of the named parameters over all processes; one that saw no batch adds zeros."""
    if world.size() > 1:
        parameters = [model.get_parameter(name) for name in names]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        world.sum_in_place(*(parameter.grad for parameter in parameters if parameter.grad is not None))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Tensor], *, task: Task = CAUSAL_LM, dtype: str) -> float:
    """The mean loss over all predictions of `batches`, of a causal LM in nats per token; the model is left as found."""
    predicted = task.num_predicted(batches)
    total = torch.zeros((), dtype=torch.float64)
    with as_found(model, set()):
        for loss in losses(model, world.share(batches), task=task, dtype=dtype):
            total += loss
    world.sum_in_place(total)
    return float(total) / predicted


@torch.no_grad()
def score_sequentially(
    model: nn.Module,
    axes: Sequence[Axis],
    sizes: Mapping[str, int],
    batches: Sequence[Tensor],
    *,
    metric: Metric,
    known: Scores,
    task: Task = CAUSAL_LM,
    dtype: str,
) -> Scores:
    """Score units layer by layer, each layer on the output of the already pruned layers below it.

    Every layer runs twice over the text: first whole, while the metric looks, then with the units shut that its scores leave out.

    Args:
        model: causal LM; left as found.
        axes: its axes, `layers` among them.
        sizes: axis name -> units to keep; the axes inside a layer that are named here are scored.
        batches: token ids, int64 [batch, length].
        metric: a metric of activations, without gradients; it is called once per layer.
        known: axis name -> scores of layers, attentions, MLPs and the stream, if `sizes` lets them lose units. These units are
            shut throughout.
        task: what the model learns.
        dtype: precision of the matrix products.

    Returns:
        axis name -> float32 [entries], as the metric gives them.
    """
    others = [axis for axis in axes if axis.name in sizes and axis.gate.kind in ("channels", "whole")]
    with gated(model, axes, Mask.of_sizes(others, known, sizes)):
        layers = decoder_layers(model)
        flows = streams(model, world.share(batches), task=task, dtype=dtype)
        scores: Scores = {}
        for index, layer in enumerate(layers):
            inside = [axis for axis in axes if axis.layer == index and axis.gate.is_linear and axis.name in sizes]
            looking = metric(model, inside)
            try:
                next(looking)
                with at_hand(layer):
                    for flow in flows:
                        flow.through(layer, index)
                scores |= finish(looking)
            finally:
                looking.close()
            with gated(model, axes, Mask.of_sizes(inside, scores, sizes)), at_hand(layer):
                for flow in flows:
                    flow.hidden = flow.through(layer, index)
        return world.agreed(scores)


def finish(metric: Generator[Evidence, None, Scores]) -> Scores:
    """What a metric returns once it has seen the text.

    Raises:
        RunError: a score is not finite.
    """
    try:
        next(metric)
    except StopIteration as finished:
        assert isinstance(metric, GeneratorType)
        return checked(finished.value, part=f"{Path(metric.gi_code.co_filename).stem}.{metric.__name__}")
    raise AssertionError("a metric yields once, or until there are no more gradients")


def checked(scores: Scores, *, part: str) -> Scores:
    """The scores that a part gave, if all are finite.

    Raises:
        RunError: one is not; the sentence names the part.
    """
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise RunError(
                f"{part} gives NaN or infinity as score of {name}; the part, the model or its calibration text is at fault: set "
                "dtype=float32, repair the weights, or name another part"
            )
    return scores
