"""A model spread over the processes while it trains (torch's `fully_shard`, FSDP2), and whole again afterwards.

Between trainings every process holds the whole model, since scoring and cutting work on whole weights. `spread` gives
each process its share of weights, gradients and moments, and takes the rest away until training is over.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.moments import is_quantised
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.system import world
from adapt_pruner.errors import UsageError


@contextmanager
def spread(model: nn.Module, optimizer: Optimizer, *, dtype: str) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Yield a sharded twin of `model` and its optimiser; afterwards `model` and `optimizer` hold the trained weights and moments.

    A single process gets `model` and `optimizer` themselves. While the twin is in use, `model`'s own parameters are empty, so
    that each process holds only its share. After an error they stay empty.

    Args:
        model: plain and the same on every process.
        optimizer: over its parameters that train.
        dtype: precision of the matrix products, which is also that of the gathered weights.
    """
    if world.size() == 1:
        yield model, optimizer
        return
    tensors = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # new modules around the same tensors
    shard(twin, dtype=dtype)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    whole, sharded = [plain for plain, _ in pairs], {id(plain): part for plain, part in pairs}
    groups = [{**group, "params": [sharded[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups]
    its_optimizer = AdamW(groups, fused=True)
    for plain, part in pairs:
        plain.data = torch.empty(0, dtype=plain.dtype, device=plain.device)
        state = optimizer.state.pop(plain, None)
        if state is not None:
            its_optimizer.state[part] = {key: _distributed(value, part) for key, value in state.items()}
    yield twin, its_optimizer
    for plain, part in zip(whole, twin.parameters(), strict=True):
        plain.data = _whole(part.data)
        state = its_optimizer.state.pop(part, None)
        if state is not None:
            optimizer.state[plain] = {key: _whole(value) for key, value in state.items()}


def shard(model: Any, *, dtype: str) -> None:
    """Shard `model`, in place, over all processes: each decoder layer is a group, and the rest is one more.

    `model.as_forward(f, …)` then calls f(model, …) with the model gathered as in its own forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device
    narrow = torch.bfloat16 if uses_bfloat16(device, dtype) else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.as_forward = MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "as_forward")


def full_state(model: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and moments as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; whole, on the main process only.

    A quantised moment is two tensors, `exp_avg.codes.NAME` and `exp_avg.scale.NAME`: quantised again, it would change.

    Every process must call it. What is not sharded is not copied.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors = {name: parameter.detach()}
        for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
            tensors |= {f"{of}.{name}": tensor for of, tensor in _tensors(key, value).items()}
        for key, value in tensors.items():
            gathered = _whole(value)
            if world.is_main():
                (weights if key == name else moments)[key] = gathered if gathered is value else gathered.cpu()
    return weights, moments


def load_moments(model: nn.Module, optimizer: Any, moments: Mapping[str, Tensor]) -> None:
    """Put moments, as `full_state` names them, into the optimiser, in place.

    Raises:
        UsageError: they are quantised, and not as the optimiser has them.
    """
    for name, parameter in model.named_parameters():
        if f"step.{name}" not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = moments[f"step.{name}"].to(parameter.device)
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if hasattr(optimizer, "_new_buffer"):
                state[key] = optimizer._new_buffer(parameter, signed)
            else:
                state[key] = torch.empty_like(parameter, memory_format=torch.preserve_format)
            held = _tensors(key, state[key]) if f"{key}.{name}" not in moments else {key: state[key]}
            for of, tensor in held.items():
                stored = moments.get(f"{of}.{name}")
                if stored is None or stored.shape != tensor.shape:
                    raise UsageError(
                        f"the checkpoint's moments of {name} have another number of bits than this run's training.optimizer; set it as "
                        "it was, or start in another folder"
                    )
                tensor.copy_(stored)


def _tensors(key: str, value: Any) -> dict[str, Tensor]:
    return {f"{key}.codes": value.codes, f"{key}.scale": value.scale} if is_quantised(value) else {key: value}


def _distributed(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
