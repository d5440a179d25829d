"""The lean norms that training runs with compute what the stock ones do, and nothing else is taken for one."""

import pytest
import torch
from torch import Tensor, nn

from adapt_pruner.train.kernels import _rms_norm, kernels
from adapt_pruner.train.objectives import lm
from conftest import tiny_model

LAYOUTS = {("llama", "llama"): 7, ("llama", "qwen3"): 13, ("gemma3", "gemma3-grouped"): 19}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_lean_norms_change_nothing(layout: tuple[str, str]) -> None:
    """Loss and gradients under lean norms equal those of the stock ones, w (Llama) or 1 + w (Gemma) times the normed input."""
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    model, twin = tiny_model(layout), tiny_model(layout)
    with kernels(model, gradient_checkpointing=False, compiled=False, liger=False):
        served = [module for module in model.modules() if "forward" in vars(module)]
        loss = lm(model, ids)
        loss.backward()
    assert len(served) == LAYOUTS[layout], "every norm is served"
    assert not any("forward" in vars(module) for module in model.modules())
    expected = lm(twin, ids)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            scale = float(theirs.grad.abs().max())
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale), name


class Other(nn.Module):
    def __init__(self, offset: float, centred: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.offset, self.centred = nn.Parameter(torch.rand(8)), 1e-6, offset, centred

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def test_what_is_no_rms_norm_is_left_alone() -> None:
    assert _rms_norm(Other(0.0, centred=False)) == (0.0, 1e-6)
    assert _rms_norm(Other(1.0, centred=False)) == (1.0, 1e-6)
    assert _rms_norm(Other(0.5, centred=False)) is None
    assert _rms_norm(Other(0.0, centred=True)) is None
    assert _rms_norm(nn.LayerNorm(8, bias=False)) is None
