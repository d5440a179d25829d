"""`reduce: policy_gradient`, Bypass back-propagation: learn how likely each unit is to stay, from forward passes alone.

    s[u]        probability that unit u stays; it starts from the scores of `metric`
    m ~ s       K masks on the same text, each a forward pass with its loss L_k
    s ← s - lr · g, then each kind of unit is brought back to its share of the budget

At the end the units with the highest s stay, and one cut is made.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.system.parts import part
from adapt_pruner.reduce.learnt_units import KINDS, LearntUnits
from adapt_pruner.reduce.units import metrics_of, prunable, scores_of
from adapt_pruner.score.calibrate import score_sequentially
from adapt_pruner.work import Work

_EPS = 1e-7


@part(
    "reduce",
    needs={"chosen", "text", "all its time"},
    reads={"axes", "metric", "chooser", "repair", "multiple_of", "equal_widths", "sequential_scoring"},
)
class PolicyGradient(LearntUnits):
    """Learn which units stay by policy gradient over random masks, without back-propagation (Bypass)."""

    name = "policy_gradient"

    def __init__(
        self,
        *,
        updates: Annotated[int, "1 or more"] = 1500,
        masks: Annotated[int, "2 or more"] = 2,
        sequences: Annotated[int, "1 or more"] = 8,
        lr: Annotated[float, "above 0"] = 0.006,
        window: Annotated[float, "1 or more"] = 5.0,
        exact: bool = False,
    ) -> None:
        """
        Args:
            updates: number of updates of s.
            masks: K, masks drawn for each update.
            sequences: calibration sequences of an update, at most those of a draw; the next update reads the next ones.
            lr: step size at the start; it falls to 0 along a cosine.
            window: w of the moving baseline, b ← (1 - 1/w) · b + mean_k L_k / w; an update first moves b, then uses it.
            exact: take the exact score function, (m - s) / (s (1 - s)); else, as in the released code, (m - s) / √(s (1 - s)).

        Each update, with ε = 1e-7:

            g = Σ_k (L_k - b) · (m_k - s) / √((s + ε)(1 - s + ε)) / (K - 1)

        A mask whose loss is not finite is left out. Neurons and KV heads keep the same share of their units, the share that
        meets the budget. After an update, s of each kind, over all layers, is shifted down and clamped to [0, 1], so that its
        mean is at most that share; bisection finds the shift.

        Source: arXiv:2406.10576 and facts from its released code. Differs: the budget is counted in parameters. Heads give up
        their share rounded down, and neurons pay the rest to within one unit. Every axis keeps at least one unit at the end. The
        text is that of `calibration`, and the repair is the recipe's.
        """
        super().__init__()
        self.updates, self.masks, self.sequences = updates, masks, sequences
        self.lr, self.window, self.exact = lr, window, exact
        self.passes, self._baseline = masks, math.nan

    def _begin(self, work: Work, axes: Sequence[Axis], keep: float, **where: int) -> None:
        """Probabilities by the scores of the metric."""
        scores = _scores(work, axes, keep, **where)
        self._values = {axis.name: start_of(scores[axis.name], keep) for axis in axes}
        self._baseline = math.nan

    def _how(self, axes: Sequence[Axis], keep: float) -> dict[str, Any]:
        """If neurons can pay the rest, heads lose just the share that is due."""
        both = {axis.kind for axis in axes} == set(KINDS)
        return {"structure": "AL-MM", "heads": max(0.0, 1 - keep)} if both else super()._how(axes, keep)

    def _update(self, work: Work, axes: Sequence[Axis], keep: float, batches: Sequence[Tensor]) -> list[float]:
        """Update s once, in place; returns the losses of the masks."""
        generator = torch.Generator().manual_seed((work.recipe.seed * 1_000_003 + work.state.stage) * 100_003 + self._done)
        stay = self._values
        drawn = [{name: torch.bernoulli(share, generator=generator) for name, share in stay.items()} for _ in range(self.masks)]
        losses = [work.loss(gates, batches) for gates in drawn]
        seen = [(loss, gates) for loss, gates in zip(losses, drawn, strict=True) if math.isfinite(loss)]
        if seen:
            mean = sum(loss for loss, _ in seen) / len(seen)
            self._baseline = mean if math.isnan(self._baseline) else self._baseline
            self._baseline += (mean - self._baseline) / self.window
        rate = self.lr * (1 + math.cos(math.pi * self._done / self.updates)) / 2
        for name, share in stay.items():
            variance = (share + _EPS) * (1 - share + _EPS)
            scale = variance if self.exact else variance.sqrt()
            slope = sum(((loss - self._baseline) * (gates[name] - share) for loss, gates in seen), torch.zeros_like(share))
            stay[name] = share - rate * slope / scale / (self.masks - 1)
        for kind in {axis.kind for axis in axes}:
            names = [axis.name for axis in axes if axis.kind == kind]
            pool = projected(torch.cat([stay[name] for name in names]), keep)
            stay |= dict(zip(names, pool.split([stay[name].numel() for name in names]), strict=True))
        self._done += 1
        return losses

    def state(self) -> dict[str, Any]:
        """The stage, the number of updates made, the baseline, and s."""
        if not self._stage:
            return {}
        return {
            "stage": self._stage, "done": self._done, "baseline": None if math.isnan(self._baseline) else self._baseline,
            "stay": {name: share.tolist() for name, share in self._values.items()},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "stay" in state:
            self._stage, self._done = state["stage"], state["done"]
            self._baseline = math.nan if state["baseline"] is None else state["baseline"]
            self._values = {name: torch.tensor(share) for name, share in state["stay"].items()}


def start_of(scores: Tensor, keep: float) -> Tensor:
    """`sigmap` of the released code: the sigmoid of the scores standardised over their axis, shifted to the mean `keep`, clamped.

    Args:
        scores: float32 [entries] of one axis.
        keep: share of the units that is to stay.
    """
    spread = scores.std() if scores.numel() > 1 else torch.zeros(())
    share = torch.sigmoid((scores - scores.mean()) / spread) if spread > 0 else torch.full_like(scores, 0.5)
    return (share - share.mean() + keep).clamp(0, 1)


def projected(stay: Tensor, keep: float) -> Tensor:
    """clamp(s - v, 0, 1) with the least v ≥ 0 at which the mean is at most `keep`, by bisection."""
    if float(stay.clamp(0, 1).mean()) <= keep:
        return stay.clamp(0, 1)
    low, high = 0.0, float(stay.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((stay - middle).clamp(0, 1).mean()) > keep else (low, middle)
    return (stay - high).clamp(0, 1)


def _scores(work: Work, axes: Sequence[Axis], keep: float, **where: int) -> Scores:
    """Scores of the recipe's metric; with `sequential_scoring`, each layer reads the output of layers cut to their share."""
    recipe, batches = work.recipe, work.batches()
    scores, _ = scores_of(work, batches, **where)
    if recipe.sequential_scoring:
        sizes = {axis.name: axis.size for axis in prunable(work)} | {axis.name: max(1, round(axis.size * keep)) for axis in axes}
        metric = metrics_of(work, seed=recipe.seed + where["iteration"])[0]
        scores |= score_sequentially(
            work.model, work.axes, sizes, batches, metric=metric, known=scores, task=work.task, dtype=recipe.dtype
        )
    return scores
