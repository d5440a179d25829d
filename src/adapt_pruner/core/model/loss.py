"""Losses computed from logits a few tokens at a time, so that the full logits are never held."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_pruner.core.model.shelf import fetched

MAX_LOGITS = 2**26  # logits that exist at one time: 128 MB in bfloat16, with their float32 in pieces
CACHED_ROWS = 64  # tokens whose float32 logits are processed at one time on a CPU, so that they fit its cache

LogitLoss = Callable[[Tensor, slice, bool], Tensor]
"""(float32 logits [n, vocab] of some tokens, which tokens, whether a gradient is wanted) -> the sum of the tokens' losses.

If a gradient is wanted, it overwrites the logits with d loss / d logits.
"""


def through_head(hidden: Tensor, head: nn.Module, loss: LogitLoss, *, chunk: int | None = None) -> Tensor:
    """The sum of `loss` over the logits head(hidden), with its gradient, without ever holding the logits of all tokens.

    The gradient is computed along with the value, chunk by chunk, so the backward pass only scales it. Beyond inputs and
    gradients it needs memory for chunk · vocab elements, in the precision of the matrix products.

    Args:
        hidden: [n, width]; n may be 0.
        head: a linear layer, width -> vocab.
        loss: see `LogitLoss`.
        chunk: tokens whose logits exist at one time; by default as many as make 2^26 logits.

    Returns:
        float32 scalar, differentiable once in `hidden` and the head's weight and bias.
    """
    learns = torch.is_grad_enabled()  # read here because inside the function needs_input_grad only repeats requires_grad
    with fetched(head):
        total: Tensor = _ThroughHead.apply(hidden, head.weight, head.bias, loss, chunk, learns)  # type: ignore[no-untyped-call]
    return total


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: LogitLoss, chunk: int | None, learns: bool
    ) -> Tensor:
        device = hidden.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        of_hidden, of_weight, of_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        wants = of_hidden or of_weight or of_bias
        chunk = chunk or max(CACHED_ROWS, MAX_LOGITS // weight.shape[0])
        rows_at_once = CACHED_ROWS if device == "cpu" else chunk

        # If autocast may already hold a cast of the weight (`precision.casting_once`), let autocast do the cast.
        left_to_autocast = mixed and not wants and weight.requires_grad and weight.is_leaf and weight.dtype == torch.float32
        narrow, shift = weight, bias
        if not left_to_autocast:
            narrow, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=hidden.device, dtype=wide)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        nothing = hidden.shape[0] == 0  # then gradients are zeros, not None, because processes add up their gradients
        grad_weight = torch.zeros_like(weight) if of_weight and nothing else None
        grad_bias = torch.zeros_like(bias) if of_bias and nothing and bias is not None else None
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                end = min(hidden.shape[0], start + chunk)
                entering = hidden[start:end].to(dtype)
                with torch.autocast(device, enabled=left_to_autocast):
                    logits = F.linear(entering, narrow, shift)
                for first in range(start, end, rows_at_once):
                    rows = slice(first, min(end, first + rows_at_once))
                    piece = logits[rows.start - start : rows.stop - start]
                    worked = piece.to(wide)
                    total += loss(worked, rows, wants)
                    if wants and worked is not piece:
                        piece.copy_(worked)
                if grad_hidden is not None:
                    grad_hidden[start:end] = logits @ narrow
                if of_weight:
                    grad_weight = _added(grad_weight, logits.t() @ entering, like=weight)
                if of_bias and bias is not None:
                    grad_bias = _added(grad_bias, logits.sum(0), like=bias)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient.mul_(outer[0]) for gradient in ctx.gradients]
        ctx.gradients = (None, None, None)
        return (*scaled, None, None, None)


def _added(total: Tensor | None, term: Tensor, *, like: Tensor) -> Tensor:
    return term.to(like.dtype) if total is None else total.add_(term)


def nll_of_logits(targets: Tensor) -> LogitLoss:
    """-log softmax(logits)[target], in nats.

    Args:
        targets: int64 [n], for all tokens.
    """

    def loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        target = targets[rows, None]
        log_p = log_softmax_(logits)
        nll = -log_p.gather(1, target).sum()
        if gradient:
            log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=log_p.dtype))
        return nll

    return loss


def log_softmax_(logits: Tensor) -> Tensor:
    """The log-softmax over the last dimension, in place; returns the same tensor.

    On a CPU, losses of many logits wait for memory. torch's log-softmax reads a row once while it lies in the cache, and its
    logsumexp goes over all logits several times.
    """
    if logits.device.type == "cpu":
        return torch.log_softmax(logits, -1, out=logits)
    return logits.copy_(torch.log_softmax(logits, -1))


class LogitMap(NamedTuple):
    """How a model's logits follow from the z that its head gives: c · tanh(a z / c), or a z where there is no c.

    Attributes:
        scale: a.
        cap: c.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """The logits, in place of z."""
        if self.scale != 1:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)


def logit_map(model: Any) -> LogitMap:
    """How the logits of a model follow from its head: Granite divides and Cohere multiplies them, Gemma caps them."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LogitMap(float(scale), getattr(config, "final_logit_softcapping", None))


def of_head(loss: LogitLoss, logits_of: LogitMap) -> LogitLoss:
    """Turn a loss of the model's logits into a loss of the head's output; see `LogitMap`."""
    scale, cap = logits_of
    if scale == 1 and cap is None:
        return loss

    def of_what_the_head_gives(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        logits_of.apply_(logits)
        slope = 1 - (logits / cap).square() if gradient and cap is not None else None
        total = loss(logits, rows, gradient)
        if gradient and scale != 1:
            logits.mul_(scale)
        if slope is not None:
            logits.mul_(slope)
        return total

    return of_what_the_head_gives
