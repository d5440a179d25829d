"""Showing a model its calibration text once, for as many metrics as want to look.

A metric is a function with one `yield` in it. Before the yield it hooks itself in; the value it yields says what it
needs (`Evidence`); at the yield the text runs through the model; after it the scores are worked out and returned:

    def change(model, axes):
        hook = model.register_forward_hook(...)
        try:
            yield Evidence.FORWARD
        finally:
            hook.remove()
        return {"layers": ...}

`score` drives any number of them over one forward (and, if one of them wants gradients, one backward) per batch, or per
sequence if one of them wants to see the gradient of each.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum

import torch
from torch import Tensor, nn

from adapt_pruner.core import world
from adapt_pruner.core.axes import Axis, Scores
from adapt_pruner.core.loss import next_token_nll
from adapt_pruner.errors import RunError

__all__ = ["Evidence", "Metric", "casting_once", "evidence_needed", "finish", "mean_loss", "precision", "score", "uses_bfloat16"]


class Evidence(Enum):
    """What a metric needs to see: nothing but the weights, a forward pass, gradients of what flows, of the weights too, or of each sequence.

    With STREAM_GRADIENTS a backward pass reaches every hidden state, where hooks see its gradient, and no weight: that takes
    a third less work and no memory for weight gradients. With SAMPLE_GRADIENTS every pass is one sequence, so that a hook on a
    parameter (`Tensor.register_hook`) is called once a sequence, with what that sequence adds to the gradient of L.
    """

    WEIGHTS = 0
    FORWARD = 1
    STREAM_GRADIENTS = 2
    GRADIENTS = 3
    SAMPLE_GRADIENTS = 4


Metric = Callable[[nn.Module, Sequence[Axis]], Generator[Evidence, None, Scores]]


def native_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(probe is not None and bool(probe()) for probe in probes)
    return False


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether matrices are multiplied in bfloat16: `auto` where it is native, else as `float32` or `bfloat16` says."""
    return native_bfloat16(device) if dtype == "auto" else dtype == "bfloat16"


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which matrices are multiplied in the precision that `uses_bfloat16` says."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(device, dtype))


@contextmanager
def casting_once(model: nn.Module) -> Iterator[None]:
    """While it lasts, passes without gradients bring each weight to bfloat16 once, in the first `precision`, not in every one.

    Until the end they take half the weights' float32 size more, and no weight may change. Autocast keeps what it made of a weight until its outermost
    context ends, which is this one and casts nothing itself, and only where the weight wants a gradient, so all do meanwhile.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        # A layer that lost attention and MLP has no weights, and nothing that is cast.
        with torch.autocast(weights[0].device.type if weights else "cpu", enabled=False):
            try:
                yield
            finally:
                torch.clear_autocast_cache()  # an autocast around this one would go on with the weights as they are now
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _as_found(model: nn.Module, trained: set[str]) -> Iterator[None]:
    """In eval mode, with gradients for the parameters named only; afterwards everything is as it was."""
    training = {module: module.training for module in model.modules()}
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    cpu_rng = torch.get_rng_state()
    try:
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode
        torch.set_rng_state(cpu_rng)


def evidence_needed(model: nn.Module, axes: Sequence[Axis], metrics: Sequence[Metric]) -> Evidence:
    """The most that any of `metrics` needs to see, found by asking each and letting it go."""
    axes, needs = _scored(axes), []
    with _as_found(model, _on(axes)):
        for metric in metrics:
            asked = metric(model, axes)
            needs.append(next(asked))
            asked.close()
    return max(needs, key=lambda evidence: evidence.value, default=Evidence.WEIGHTS)


def _on(axes: Sequence[Axis]) -> set[str]:
    """The names of the parameters that lie on an axis."""
    return {piece.parameter for axis in axes for piece in axis.slices}


def _scored(axes: Sequence[Axis]) -> Sequence[Axis]:
    """Without tokens, whose worth is their use in a text."""
    return [axis for axis in axes if not axis.gate.output]


def score(
    model: nn.Module,
    axes: Sequence[Axis],
    batches: Sequence[Tensor],
    *,
    metrics: Sequence[Metric],
    dtype: str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Scores, float]:
    """Run `batches` through the model once and return what all `metrics` make of it.

    The gradients that metrics see are those of L, the mean next-token cross-entropy over all predicted tokens of all
    batches (nats per token), summed over the batches before any metric reads them. Only parameters that lie on an
    axis get gradients.

    Args:
        model: causal LM; left as found (weights, gradients, train or eval mode, random state).
        axes: the axes to score, and `layers` for the metrics that look at whole layers.
        batches: token ids, int64 [batch, length].
        metrics: functions as described at the top of this file; their results are merged.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_batch: told (done, of) after each pass.

    Returns:
        The merged scores, and L (NaN when no metric needed a pass).

    Several processes each look at a share of the batches; sums are taken over all, and every one gets the same scores.

    Raises:
        RunError: L is not finite.
    """
    device = next(model.parameters()).device
    axes = _scored(axes)
    on_axes = _on(axes)
    running = [metric(model, axes) for metric in metrics]
    total = float("nan")
    try:
        with _as_found(model, on_axes):
            need = max((next(metric) for metric in running), key=lambda evidence: evidence.value, default=Evidence.WEIGHTS)
            if need is not Evidence.WEIGHTS:
                num_predicted = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
                mine = world.share(batches)
                if need is Evidence.SAMPLE_GRADIENTS:
                    mine = [sequence for batch in mine for sequence in batch.split(1)]
                wants_gradient = need.value >= Evidence.STREAM_GRADIENTS.value
                nll = torch.zeros((), dtype=torch.float64)
                only = _streams_only(model) if need is Evidence.STREAM_GRADIENTS else nullcontext()
                # With gradients, casts that all passes share would hold the narrow gradients of all weights at the end of each.
                once = nullcontext() if wants_gradient else casting_once(model)
                with only, once:
                    for done, batch in enumerate(mine, start=1):
                        with torch.set_grad_enabled(wants_gradient), precision(device, dtype):
                            loss = next_token_nll(model, batch.to(device))
                        if wants_gradient:
                            (loss / num_predicted).backward()
                        nll += loss.detach().double().cpu()
                        if on_batch is not None:
                            on_batch(done, len(mine))
                if need.value >= Evidence.GRADIENTS.value:
                    _sum_gradients(model, on_axes)
                world.sum_in_place(nll)
                total = float(nll) / num_predicted
                if not torch.isfinite(torch.tensor(total)):
                    raise RunError(
                        f"the loss on the calibration text is {total}; the model's weights are damaged or overflow in {dtype}"
                    )
            merged: Scores = {}
            for metric in running:
                merged |= finish(metric)
    finally:
        for metric in running:
            metric.close()
    return world.agreed(merged), total


@contextmanager
def _streams_only(model: nn.Module) -> Iterator[None]:
    """While it lasts, gradients are those of what flows from the embeddings on, and no weight gets one; for inside `_as_found`."""
    model.requires_grad_(False)
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(output.is_leaf))
    try:
        yield
    finally:
        handle.remove()


def _sum_gradients(model: nn.Module, names: set[str]) -> None:
    """Sum, in place, the gradients of the named parameters over all processes; one that saw no batch adds zeros."""
    if world.size() > 1:
        parameters = [parameter for name, parameter in model.named_parameters() if name in names]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        world.sum_in_place(*(parameter.grad for parameter in parameters if parameter.grad is not None))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Tensor], *, dtype: str = "auto") -> float:
    """Mean next-token cross-entropy over all predicted tokens of `batches`, nats per token; the model is left as found."""
    device = next(model.parameters()).device
    num_predicted = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    with _as_found(model, set()), casting_once(model), precision(device, dtype):
        for batch in world.share(batches):
            total += next_token_nll(model, batch.to(device)).double().cpu()
    world.sum_in_place(total)
    return float(total) / num_predicted


def finish(metric: Generator[Evidence, None, Scores]) -> Scores:
    """What a metric returns once it has seen the text."""
    try:
        next(metric)
    except StopIteration as finished:
        scores: Scores = finished.value
        return scores
    raise AssertionError("a metric yields once")
