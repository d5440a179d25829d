"""AdamW with moments of 32, 8 or 4 bits, for weights in float32 or bfloat16, with the formats and the arithmetic of torchao."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim.adam import _AdamBase, single_param_adam
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from adapt_pruner.core.system import world

PIECE = 2**20
"""Numbers of a parameter that are updated at a time."""
_FEWEST = 4096  # numbers of a tensor whose moments are quantised
_FORMATS = {8: (OptimState8bit, 256), 4: (OptimState4bit, 128)}  # bits -> class, and numbers that share a scale


def _local(tensor: Any) -> Tensor:
    """This process's share of a sharded tensor, without its gradient; another tensor as it is."""
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return local


class LowBitAdamW(_AdamBase):  # type: ignore[misc]
    """AdamW (eps 1e-8) whose moments may be quantised in blocks; weights in bfloat16 are rounded at random, up or down.

    A tensor of fewer than 4,096 numbers, or of no whole number of blocks, has moments in float32. So has a sharded one if the share
    of any process has no whole number of blocks; otherwise each process has the moments of its share.

    Differs from torchao's classes: they update a tensor at once, by code compiled for its shape. After a cut every layer may have
    shapes of its own, and each takes seconds to compile. Here a tensor is updated in pieces of 2^20 numbers, so that little memory
    is needed beside it. With `compiled` the same code serves all whole pieces; the rest of a tensor is never compiled. Moments
    that are not quantised are float32, also of weights in bfloat16, in which a running mean of squares would stand still.

    Source: arXiv:2110.02861 (8 bits, dynamic exponents), arXiv:2309.01507 (4 bits).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], bits: int, compiled: bool = False
    ) -> None:
        block: float
        self._format: Any
        self._format, block = _FORMATS.get(bits, (None, math.inf))
        super().__init__(groups, lr, betas, 1e-8, 0.0, False, block_size=block, bf16_stochastic_round=True, is_adamw=True)
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # of torch's compiler, to the authors of torchao
        self._of_piece = torch.compile(single_param_adam, fullgraph=True, dynamic=False) if compiled else single_param_adam

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        local, shares = _local(p), [p.numel()]
        if hasattr(p, "to_local"):  # the shares of all processes, so that all decide alike
            rows, each = p.shape[0], -(-p.shape[0] // world.size())
            shares = [max(0, min(each, rows - rank * each)) * (p.numel() // max(1, rows)) for rank in range(world.size())]
        if self._format is None or p.numel() < _FEWEST or any(share % self.block_size or not share for share in shares):
            return torch.zeros_like(local, dtype=torch.float32, memory_format=torch.contiguous_format)
        zeros: Tensor = self._format.zeros(local.shape, signed, self.block_size, p.device, dtype=torch.float32)
        return zeros

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step, in place, of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            moments = {"exp_avg": self._new_buffer(parameter, True), "exp_avg_sq": self._new_buffer(parameter, False)}
            state.update(step=torch.tensor(0.0), **moments)
        state["step"] += 1
        assert parameter.grad is not None
        whole = (
            _local(parameter).view(-1),
            _local(parameter.grad).reshape(-1),
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
        )
        for start in range(0, whole[0].numel(), PIECE):
            weights, gradient, mean, square = (tensor[start : start + PIECE] for tensor in whole)
            update = self._of_piece if weights.numel() == PIECE else single_param_adam
            update(
                weights, gradient, state["step"], mean, square, None, group["lr"], *group["betas"], group["weight_decay"],
                group["eps"], self.is_adamw, weights.dtype == torch.bfloat16,
            )  # fmt: skip
