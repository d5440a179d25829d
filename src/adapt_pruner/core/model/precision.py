"""In which precision matrices are multiplied, and how often weights are cast to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adapt_pruner.errors import RunError


def native_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(probe is not None and bool(probe()) for probe in probes)
    return False


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether matrices are multiplied in bfloat16: with `auto` if the processor does so natively, otherwise as `dtype` says."""
    return native_bfloat16(device) if dtype == "auto" else dtype == "bfloat16"


def computed_in(device: torch.device, dtype: str) -> torch.dtype:
    """The number format of matrix products within `precision`."""
    return torch.bfloat16 if uses_bfloat16(device, dtype) else torch.float32


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which matrices are multiplied in the precision that `uses_bfloat16` says."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(device, dtype))


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point weights, in place; ties stay.

    Unlike `model.to(dtype)` this leaves buffers as they are, among them the frequencies of rotary embeddings, which a pass in mixed
    precision does not round either.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def nonfinite_error(what: str, device: torch.device, dtype: str) -> RunError:
    """The error to raise if `what`, computed by a model, is not a number."""
    narrow = uses_bfloat16(device, dtype)
    format_and_remedy = "bfloat16; set dtype to float32, or get its files again" if narrow else "float32; get its files again"
    return RunError(f"{what}; the model's weights are damaged or overflow in {format_and_remedy}")


def refuse_nonfinite(what: str, device: torch.device, dtype: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor for transformers' `generate` (ids, logits -> logits) that refuses logits of nan or inf."""

    def check(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not logits.max(dim=-1).values.isfinite().all():  # the maximum of a row with a nan is nan
            raise nonfinite_error(what, device, dtype)
        return logits

    return check


@contextmanager
def casting_once(model: nn.Module) -> Iterator[None]:
    """Within this context, passes without gradients cast each weight to bfloat16 only once, in the first `precision`.

    The cast weights take half the weights' float32 size until the context ends, and no weight may change. Autocast keeps a cast
    until its outermost context ends. This context is the outermost one, and it casts nothing itself. Autocast keeps casts only of
    weights that require a gradient, so all weights do meanwhile.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        # A layer that lost attention and MLP has no weights, so nothing is cast.
        with torch.autocast(weights[0].device.type if weights else "cpu", enabled=False):
            try:
                yield
            finally:
                torch.clear_autocast_cache()  # otherwise an enclosing autocast would keep using the present values of the weights
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def linears_cast(model: nn.Module, dtype: str) -> Iterator[None]:
    """Within this context linear layers hold weights cast as by `precision`. No weight may require a gradient or change.

    Use it for many passes, and for backward passes through activations. There autocast would cast again in every pass: half the
    weights' float32 size would come and go, which takes time and fragments memory. A weight that another module reads too, such
    as a tied embedding, stays as it is.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    alone = [
        weight for weight, users in owners.items() if weight.ndim == 2 and all(isinstance(user, nn.Linear) for user in users)
    ]
    narrow = bool(alone) and uses_bfloat16(alone[0].device, dtype)
    here = [weight for weight in alone if weight.is_contiguous()]  # a weight on a shelf is not
    wide = {weight: weight.data for weight in here if narrow and weight.dtype == torch.float32}
    try:
        for weight, float32 in wide.items():
            weight.data = float32.to(torch.bfloat16)
        yield
    finally:
        for weight, float32 in wide.items():
            weight.data = float32
