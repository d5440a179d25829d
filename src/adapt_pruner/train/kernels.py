"""The same computation in less time or memory while a model trains: lean norms, recomputed activations, compilation, Liger."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.shelf import Shelved, in_memory


@contextmanager
def kernels(model: Any, *, gradient_checkpointing: bool, compiled: bool, liger: bool) -> Iterator[None]:
    """While the context lasts, `model` trains with these options; Liger's kernels stay afterwards.

    Args:
        model: causal LM, as it trains.
        gradient_checkpointing: keep only each decoder layer's input, and compute the rest again in the backward pass.
        compiled: run the decoder through torch.compile; code that was compiled for other shapes is forgotten.
        liger: the fused kernels of liger-kernel.
    """
    decoder = model.get_decoder()
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        torch._dynamo.reset()
        decoder.compile(dynamic=False)
    lean = {}
    for module in () if compiled or liger else decoder.modules():
        if (recognised := _rms_norm(module)) is not None:
            lean[module] = recognised
    for module, (offset, eps) in lean.items():
        module.forward = MethodType(partial(_lean_forward, offset=offset, eps=eps), module)
    try:
        yield
    finally:
        for module in lean:
            del module.forward
        decoder._compiled_call_impl = None
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()


@contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While the context lasts, the weights of `model` are in memory as `dtype`; afterwards as float32, or on their shelf."""
    others = [weight for weight in model.parameters() if not isinstance(weight, Shelved)]
    with in_memory(model, dtype):
        for weight in others:
            weight.data = weight.data.to(dtype)
        yield
        for weight in others:
            weight.data = weight.data.to(torch.float32)


def _rms_norm(module: nn.Module) -> tuple[float, float] | None:
    """The offset and eps of a module that is x · (offset + w) / √(mean(x²) + eps) and nothing more, found by trying.

    The offset is 0, or 1 (Gemma). All processes must call this at the same time.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or eps is None or len(list(module.parameters())) != 1:
        return None
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        tried = torch.linspace(-2, 3, 2 * whole.shape[0], device=whole.device).view(2, -1)
        normed = tried * torch.rsqrt(tried.square().mean(-1, keepdim=True) + eps)
        output = torch.func.functional_call(module, {"weight": whole}, (tried,))
        for offset in (0.0, 1.0):
            if torch.allclose(output, (offset + whole) * normed, atol=1e-5, rtol=1e-5):
                return offset, eps
    return None


def _lean_forward(self: Any, hidden_states: Tensor, *, offset: float, eps: float) -> Tensor:
    normed: Tensor = _LeanRMSNorm.apply(hidden_states, self.weight, offset, eps)  # type: ignore[no-untyped-call]
    return normed


class _LeanRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps only its input and one number per token for the backward pass, and not the normed values.

    If products are in bfloat16 and the input is not, the output is cast once, here, instead of by each linear layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
        device = x.device.type
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = x.float() if x.dtype.itemsize < 4 else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale).mul_(weight + offset if offset else weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient = outer[0].to(scale.dtype)
        normed = x * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * (weight + ctx.offset if ctx.offset else weight)
        along = (gradient * normed).mean(-1, keepdim=True)
        of_x = (gradient - normed.mul_(along)).mul_(scale).to(x.dtype)
        return of_x, of_weight, None, None
