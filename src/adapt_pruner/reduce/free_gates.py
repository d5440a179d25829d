"""`reduce: free_gates`: an amplitude for each unit, learnt until as many as have to go are 0 (DDP).

    a = max(z, 0)    amplitude; it multiplies the unit, and may be above 1
    s                how far the unit stays, from 0 at z = 0 to 1 at z = 2μ; the threshold μ falls
    L                cross-entropy + 2 KL(ungated model ‖ gated model) + a Lagrangian that holds the share that stays to the budget

z descends and the multipliers ascend; nothing is drawn at random. At the end the units of largest z stay, as many as meet the
budget, and their amplitudes are multiplied into the weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim import Adam

from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.reduce.learnt_units import LearntUnits, add_gradients, held, put_back, step
from adapt_pruner.reduce.repair.factors import scale_units
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Passes, TextUse, Work

_DIVERGENCE = 2.0
_FIRST, _LAST = 0.5, 0.05  # μ
_ASCENT = (0.02, 0.4, 0.02)  # rates of the multipliers
_WARMUP = 0.1  # share of the updates in which the rate of z rises


def retained(z: Tensor, threshold: float) -> Tensor:
    """s = clamp(1.2 σ(2.4 (z - μ) / μ) - 0.1, 0, 1): 0 at z = 0, a half at z = μ, 1 at z = 2μ. Its gradient passes the clamp."""
    soft = 1.2 * torch.sigmoid(2.4 * (z - threshold) / threshold) - 0.1
    return soft + (soft.clamp(0, 1) - soft).detach()


@part("reduce", needs={"chosen", "text", "all its time"}, reads={"axes", "chooser", "repair", "multiple_of", "equal_widths"})
class FreeGates(LearntUnits):
    """Learn an amplitude for each unit by gradient, until as many as have to go are 0; nothing is random (DDP)."""

    name = "free_gates"

    def __init__(
        self,
        *,
        updates: Annotated[int, "1 or more"] = 1000,
        sequences: Annotated[int, "1 or more"] = 8,
        lr: Annotated[float, "above 0"] = 0.02,
        ascent: Annotated[float, "above 0"] = 1.0,
    ) -> None:
        """
        Args:
            updates: T, number of updates.
            sequences: calibration sequences of an update, at most those of a draw; the next update reads the next ones.
            lr: Adam's peak rate for z; it rises over the first tenth and falls to 0 along a cosine.
            ascent: the rates of the multipliers, as a multiple of the paper's; more where there are fewer updates.

        In update t, with ρ the share of the parameters of these axes that the budget keeps, and means over units weighted by their
        parameters:

            μ = 0.5 + (0.05 - 0.5) √(t / T)
            L = loss + 2 KL + λ1 (mean s - ρ) + λ2 (mean s - ρ)² + λ3 mean s (1 - s)

        z starts at 1, the multipliers at 0. They ascend by their terms, at rates of 0.02, 0.4 and 0.02.

        Source: arXiv:2603.08065, from notes on it (the released code has 0.1 for 0.05; 1,000 updates read 30 M tokens). Not known, and
        ours: that the forward pass has the amplitude alone and s only counts, plain ascent of the multipliers, and that the gradient of
        s passes the clamp, since at z = 1 nothing would draw units down else. Differs: shares are counted in parameters; units are
        neurons and KV heads with their query heads.
        """
        super().__init__()
        self.updates, self.sequences, self.lr, self.ascent = updates, sequences, lr, ascent
        self._multipliers = [0.0, 0.0, 0.0]
        self._adam: Adam | None = None

    def text_use(self, work: Work) -> TextUse:
        """Gradients of hidden states; no scores."""
        return TextUse(text=True, evidence=Evidence.STREAM_GRADIENTS, forward=True)

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """The updates and the repair."""
        return {name: passes for name, passes in super().phases(work, target).items() if name != "score"}

    def _begin(self, work: Work, axes: Sequence[Axis], keep: float, **where: int) -> None:
        """All amplitudes 1, all multipliers 0."""
        self._values = {axis.name: torch.ones(axis.entries) for axis in axes}
        self._multipliers = [0.0, 0.0, 0.0]
        self._learnable()

    def _learnable(self) -> None:
        for z in self._values.values():
            z.requires_grad_()
        self._adam = Adam(self._values.values(), lr=self.lr)

    def _shares(self) -> Mapping[str, Tensor]:
        """s by the threshold as it is."""
        return {name: retained(z.detach(), self._threshold) for name, z in self._values.items()}

    @property
    def _threshold(self) -> float:
        return _FIRST + (_LAST - _FIRST) * math.sqrt(self._done / self.updates)

    def _update(self, work: Work, axes: Sequence[Axis], keep: float, batches: Sequence[Tensor]) -> list[float]:
        """Update z and the multipliers."""
        assert self._adam is not None
        device = work.model.device
        gates = {name: z.relu().to(device) for name, z in self._values.items()}
        loss = add_gradients(work, gates, batches, divergence=_DIVERGENCE)
        terms = self._terms(axes, keep)
        with_multipliers = sum((rate * term for rate, term in zip(self._multipliers, terms, strict=True)), torch.zeros(()))
        if world.is_main():  # the gradients of all processes are added up
            with_multipliers.backward()
        ahead = self._done / self.updates
        share = min(1.0, (self._done + 1) / max(1.0, _WARMUP * self.updates))
        self._adam.param_groups[0]["lr"] = self.lr * share * (1 + math.cos(math.pi * ahead)) / 2
        step(self._values, self._adam)
        self._multipliers = [
            multiplier + self.ascent * rate * float(term.detach())
            for multiplier, rate, term in zip(self._multipliers, _ASCENT, terms, strict=True)
        ]
        self._done += 1
        return [loss]

    def _terms(self, axes: Sequence[Axis], keep: float) -> list[Tensor]:
        """What the multipliers multiply: mean s - ρ, its square, and mean s (1 - s)."""
        whole = sum(axis.size * axis.cost for axis in axes)
        stays = {axis.name: retained(self._values[axis.name], self._threshold) for axis in axes}
        off = torch.stack([stays[axis.name].sum() * (axis.cost / whole) for axis in axes]).sum() - keep
        open_ = torch.stack([(stays[axis.name] * (1 - stays[axis.name])).sum() * (axis.cost / whole) for axis in axes]).sum()
        return [off, off.square(), open_]

    def _fold(self, work: Work, axes: Sequence[Axis], mask: Mask) -> None:
        """Multiply the amplitudes into the weights."""
        for axis in axes:
            scale_units(work.model, axis, self._values[axis.name].detach().relu())

    def state(self) -> dict[str, Any]:
        """The stage, the number of updates made, the multipliers, and z with its moments."""
        if not self._stage or self._adam is None:
            return {}
        return {
            "stage": self._stage, "done": self._done, "multipliers": list(self._multipliers), "z": held(self._values, self._adam),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "multipliers" in state:
            self._stage, self._done, self._multipliers = state["stage"], state["done"], list(state["multipliers"])
            self._values = {name: torch.empty(len(numbers["value"])) for name, numbers in state["z"].items()}
            self._learnable()
            assert self._adam is not None
            put_back(self._values, self._adam, state["z"])
