"""An optimiser's state follows its parameters through a cut; state that nobody here understands is refused."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adapt_pruner.core.model.shelf import numbers_of

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}  # of the gradient, in torch's optimisers


def is_quantised(value: Any) -> bool:
    """Whether a moment is one of torchao's, which holds codes and a scale for each block of them."""
    return all(hasattr(value, name) for name in ("codes", "scale", "signed"))


def check_state(optimizer: Optimizer) -> None:
    """Refuse an optimiser whose state cannot follow a cut.

    What follows: numbers, floating-point tensors of the parameter's shape, and torchao's moments of 8 and 4 bits. Integers of that
    shape are codes whose scales lie elsewhere, as bitsandbytes has them.

    Raises:
        ValueError: there is something else.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or (is_quantised(value) and hasattr(optimizer, "_new_buffer")):
                continue
            if is_quantised(value) or not value.is_floating_point() or value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} holds {key!r}, {value.dtype} {list(value.shape)}, for a parameter {list(parameter.shape)}, and how "
                    "that follows a cut is not known; empty the state before the cut with optimizer.state.clear(), or train with an optimiser of "
                    "torch, or AdamW8bit or AdamW4bit of torchao"
                )


def follow(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, take: Callable[[Tensor], Tensor]) -> None:
    """Point the optimiser, in place, from `old` to `new`, and let `take` cut its state as it cut the parameter.

    A quantised moment is cut as float32 and quantised again, if the new size allows it.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: _cut(optimizer, value, new, take) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


def _cut(optimizer: Any, value: Any, new: nn.Parameter, take: Callable[[Tensor], Tensor]) -> Tensor:
    if not is_quantised(value):
        return take(value)
    moment: Tensor = optimizer._new_buffer(new, value.signed)
    moment.copy_(take(value.dequantize()))
    return moment


def multiply(optimizer: Optimizer, parameter: nn.Parameter, factor: float) -> None:
    """Follow, in place, a parameter that was multiplied by a positive factor: its gradient g is now g / factor."""
    for key, moment in optimizer.state.get(parameter, {}).items():
        if key in _POWERS:
            with numbers_of(moment):
                (moment.scale if is_quantised(moment) else moment).mul_(factor ** -_POWERS[key])


def forget(optimizer: Optimizer, gone: set[nn.Parameter]) -> None:
    """Drop, in place, the parameters in `gone` from the optimiser."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)
