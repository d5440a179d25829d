"""The experts of a decoder layer: which tensors hold them, which router chooses among them, how many must stay.

    layers.I.experts    an expert: its entry of every tensor of `experts`, its row of the router, its bias where the router adds one

transformers keeps all experts of a layer in tensors whose first dimension counts them. If the router first chooses groups of experts,
every group keeps the same number, so a unit is one expert of each group. A token needs as many experts as the router chooses for it,
so these must stay. Shared experts, through which every token goes, are no units.
"""

import math
from typing import Any

from torch import nn

from adapt_pruner.core.model.axes import Axis, Gate, Slice
from adapt_pruner.core.model.budget import unit_cost
from adapt_pruner.core.model.modeling_pruned import MLPS

_FIELDS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")
_LEAST_OF_A_GROUP = 2  # routers with groups rank a group by its two best experts


def experts(model: Any, stack: str, index: int, layer: nn.Module) -> list[Axis]:
    """The axis of the experts of a layer of `stack`; none if it has no experts, or other tensors than this file knows."""
    name = next((name for name in MLPS if hasattr(getattr(layer, name, None), "experts")), "")
    if not name:
        return []
    block: Any = getattr(layer, name)
    config, at = model.config, f"{stack}.{index}.{name}"
    fused = [(f"{at}.experts.{leaf}", tensor) for leaf, tensor in block.experts.named_parameters()]
    field = next((field for field in _FIELDS if field in vars(config)), "")
    chosen = next((int(getattr(config, field)) for field in _CHOSEN if getattr(config, field, None)), 0)
    number = {tensor.shape[0] for _, tensor in fused}
    if len(number) != 1 or not (field and chosen):
        return []
    entries = number.pop()
    others = [(leaf, module) for leaf, module in block.named_modules() if not leaf.startswith(("experts", "shared"))]
    routers = [
        leaf for leaf, module in others if leaf and getattr(module, "weight", None) is not None and len(module.weight) == entries
    ]
    if not routers:
        return []
    router = f"{at}.{routers[0]}"
    parameters, buffers, added = [Slice(tensor_name, 0) for tensor_name, _ in fused], list[Slice](), list[str]()
    for leaf, module in others:
        owner = f"{at}.{leaf}" if leaf else at
        for slices, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
            for tensor_name, tensor in tensors.items():
                if tensor is not None and entries in tensor.shape:
                    slices.append(Slice(f"{owner}.{tensor_name}", tensor.shape.index(entries)))
                    if slices is buffers or owner != router:  # weight and bias of the router itself make its logits
                        added.append(slices[-1].parameter)
    groups = getattr(config, "n_group", None) or 1
    of_group = math.ceil(chosen / (getattr(config, "topk_group", None) or 1)) if groups > 1 else chosen
    counting = {"": model, at: block, f"{at}.experts": block.experts, router: block.get_submodule(routers[0])}
    return [
        Axis(
            f"layers.{index}.experts",
            entries // groups,
            groups * unit_cost(model, parameters),
            Gate(router, kind="routed", also=tuple(added)),
            tuple(parameters),
            fields=((field, 1),),
            counts=tuple(
                (f"{owner}.{leaf}".lstrip("."), 1)
                for owner, module in counting.items()
                for leaf in _FIELDS
                if getattr(module, leaf, None) == entries
            ),
            buffers=tuple(buffers),
            groups=groups,
            enclosing=(f"layers.{index}.mlps",),
            fewest=max(of_group, _LEAST_OF_A_GROUP) if hasattr(config, "n_group") else of_group,
            per_token=chosen,
        )
    ]
