"""`reduce: greedy_gates`: scores learnt with hard gates that always meet the budget, then a scale for each unit (GRASPrune).

p = σ(z)       score of a unit; z is learnt
m              1 for the units of highest p that fit into the budget, else 0; chosen anew in every update
forward        units times m; backward as if they were multiplied by p
at last        m stays as it is, and a scale for each unit that stays is learnt, which is multiplied into the weights
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim import Adam

from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.system.parts import part
from adapt_pruner.reduce.learnt_units import LearntUnits, add_gradients, held, put_back, step
from adapt_pruner.reduce.policy_gradient import start_of
from adapt_pruner.reduce.repair.factors import scale_units
from adapt_pruner.reduce.units import scores_of
from adapt_pruner.work import Work

_INSIDE = 0.02  # σ is flat near 0 and 1, so no score begins nearer to them


@part(
    "reduce",
    needs={"chosen", "text", "all its time"},
    reads={"axes", "metric", "chooser", "repair", "multiple_of", "equal_widths"},
)
class GreedyGates(LearntUnits):
    """Learn which units stay by gradient through hard gates that meet the budget, and a scale for each that stays (GRASPrune)."""

    name = "greedy_gates"

    def __init__(
        self,
        *,
        updates: Annotated[int, "1 or more"] = 256,
        scale_updates: Annotated[int, "0 or more"] = 64,
        sequences: Annotated[int, "1 or more"] = 8,
        lr: Annotated[float, "above 0"] = 0.02,
        scale_lr: Annotated[float, "above 0"] = 0.01,
    ) -> None:
        """
        Args:
            updates: number of updates of the scores.
            scale_updates: number of updates of the scales, after those; 0 leaves the scales at 1.
            sequences: calibration sequences of an update, at most those of a draw; the next update reads the next ones.
            lr: Adam's rate for z.
            scale_lr: Adam's rate for the scales.

        The loss is the task's, of a causal LM cross-entropy. Weights are frozen. Units rank by p, not by p per parameter.

        With the defaults the scores see 2,048 sequences and the scales 512.

        Source: arXiv:2604.19398, from its abstract and notes on it: greedy projection in every update, straight-through gradients,
        four epochs on 512 sequences of 512 tokens, one epoch of scales at a rate of 0.01. Not known, and ours: where scores start (as
        in `policy_gradient`, from the recipe's metric), and their rate. Differs: every draw of calibration text is another.
        """
        super().__init__()
        self.score_updates, self.updates, self.sequences = updates, updates + scale_updates, sequences
        self.lr, self.scale_lr = lr, scale_lr
        self._scales: dict[str, Tensor] = {}
        self._adams: dict[str, Adam] = {}

    def _begin(self, work: Work, axes: Sequence[Axis], keep: float, **where: int) -> None:
        """Scores by those of the metric, scales 1."""
        scores, _ = scores_of(work, work.batches(), **where)
        self._values = {axis.name: start_of(scores[axis.name], keep).clamp(_INSIDE, 1 - _INSIDE).logit() for axis in axes}
        self._scales = {axis.name: torch.ones(axis.entries) for axis in axes}
        self._learnable()

    def _learnable(self) -> None:
        """Let z and the scales take gradients, each with an optimiser."""
        for numbers in (*self._values.values(), *self._scales.values()):
            numbers.requires_grad_()
        self._adams = {"z": Adam(self._values.values(), lr=self.lr), "scales": Adam(self._scales.values(), lr=self.scale_lr)}

    def _shares(self) -> Mapping[str, Tensor]:
        """p."""
        return {name: z.detach().sigmoid() for name, z in self._values.items()}

    def _update(self, work: Work, axes: Sequence[Axis], keep: float, batches: Sequence[Tensor]) -> list[float]:
        """Update the scores, or the scales once these are done."""
        mask, device = self._mask(work, axes, keep), work.model.device
        learnt = "z" if self._done < self.score_updates else "scales"
        gates: dict[str, Tensor] = {}
        for name, z in self._values.items():
            hard = mask[name].float()
            if learnt == "z":
                p = z.sigmoid()
                gates[name] = (hard + (p - p.detach())).to(device)  # p - p is exactly 0
            else:
                gates[name] = (hard * self._scales[name]).to(device)
        loss = add_gradients(work, gates, batches)
        step(self._values if learnt == "z" else self._scales, self._adams[learnt])
        self._done += 1
        return [loss]

    def _fold(self, work: Work, axes: Sequence[Axis], mask: Mask) -> None:
        """Multiply the scales into the weights."""
        for axis in axes:
            scale_units(work.model, axis, self._scales[axis.name].detach())

    def state(self) -> dict[str, Any]:
        """The stage, the number of updates made, and z and the scales with their moments."""
        if not self._stage:
            return {}
        return {
            "stage": self._stage, "done": self._done,
            "z": held(self._values, self._adams["z"]), "scales": held(self._scales, self._adams["scales"]),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "z" in state:
            self._stage, self._done = state["stage"], state["done"]
            self._values, self._scales = (
                {name: torch.empty(len(numbers["value"])) for name, numbers in state[key].items()} for key in ("z", "scales")
            )
            self._learnable()
            put_back(self._values, self._adams["z"], state["z"])
            put_back(self._scales, self._adams["scales"], state["scales"])
