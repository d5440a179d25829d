"""`reduce: policy_gradient`, Bypass back-propagation: learn how likely each unit is to stay, from forward passes alone.

    s[u]        probability that unit u stays; it starts from the scores of `metric`
    m ~ s       K masks on the same text, each a forward pass with its loss L_k
    s ← s - lr · g, then each kind of unit is brought back to its share of the budget

At the end the units with the highest s stay, and one cut is made.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from adapt_pruner.core.events.run import Searched
from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.kinds import USUAL
from adapt_pruner.core.system.parts import part
from adapt_pruner.data.tokens import batches_of
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.rank import standardised
from adapt_pruner.reduce.units import (
    Units,
    metrics_of,
    prunable,
    refuse_limits,
    repair_parameters,
    repaired,
    scores_of,
    with_forward,
    within_widths,
)
from adapt_pruner.score.calibrate import score_sequentially
from adapt_pruner.work import Change, Passes, TextUse, Work

__all__ = ["PolicyGradient", "projected", "start_of"]

_EPS = 1e-7


@part(
    "reduce",
    needs={"chosen", "text", "all its time"},
    reads={"axes", "metric", "distance", "chooser", "repair", "multiple_of", "equal_widths", "sequential_scoring"},
)
class PolicyGradient(Units):
    """Learn which units stay by policy gradient over random masks, without back-propagation (Bypass)."""

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
            updates: number of updates of s; the authors take 15,000.
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
        self._stage, self._done, self._baseline = 0, 0, math.nan
        self._stay: dict[str, Tensor] = {}

    def check(self, work: Work) -> None:
        """Refuse axes other than neurons and KV heads."""
        others = [kind for kind in work.recipe.axes if kind not in USUAL]
        if others:
            raise UsageError(
                f"reduce policy_gradient draws neurons and kv_heads, and axes names {', '.join(others)}; leave that out of axes"
            )
        super().check(work)
        refuse_limits(work, "reduce policy_gradient learns how many units each layer keeps")

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """Draws of calibration text: one for the start, and those that the updates read."""
        per_draw = max(1, work.recipe.calibration.samples // self.sequences)
        return 1 + -(-self.updates // per_draw) if reached > target else 0

    def text_use(self, work: Work) -> TextUse:
        """What the metric reads, and forward passes."""
        return with_forward(super().text_use(work))

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """Scoring once, the updates, and the repair; the time of the updates is known only once some are done."""
        phases = {
            name: replace(passes, times=1) for name, passes in super().phases(work, target).items() if name in ("score", "repair")
        }
        last = {"repair": phases.pop("repair")} if "repair" in phases else {}
        return {**phases, "search": Passes(flops=None, times=self.updates), **last}

    def steps(self, work: Work, target: int) -> Iterator[Change | Searched]:
        """Learn s and report after every draw of text; then yield one cut."""
        now, axes = work.num_params, [axis for axis in prunable(work) if axis.size > axis.least]  # a lone KV head cannot go
        if now <= target:
            return
        where = {"stage": work.state.stage, "iteration": work.iteration}
        excess = now + repair_parameters(work) - target
        keep = 1 - excess / sum(axis.size * axis.cost for axis in axes)
        with work.state.clock("score"):
            if self._stage != work.state.stage or self._stay.keys() != {axis.name for axis in axes}:
                scores = _scores(work, axes, keep, **where)
                self._stay = {axis.name: start_of(scores[axis.name], keep) for axis in axes}
                self._stage, self._done, self._baseline = work.state.stage, 0, math.nan
            batches = yield from self._learn(work, axes, keep)
        budget = Budget(keep=target, total=now + repair_parameters(work))
        # If neurons can pay the rest, heads lose just the share that is due.
        both = {axis.kind for axis in axes} == set(USUAL)
        structure = {"structure": "AL-MM", "heads": max(0.0, 1 - keep)} if both else {"structure": "AL-AM"}
        choose = within_widths(work, partial(standardised, step=1.0, by="feature", **structure))
        sizes, _ = choose(self._stay, axes, budget, debt=Debt.none(axes))
        mask = Mask.of_sizes(axes, self._stay, sizes)
        loss = work.loss({}, batches)
        repaired(work, mask, work.batches(), **where)
        self._stage = 0
        yield Change(mask, loss, {"sizes": sizes})

    def _learn(self, work: Work, axes: Sequence[Axis], keep: float) -> Generator[Searched, None, list[Tensor]]:
        """Make the updates that are left, in place; returns the first sequences of the last draw."""
        rows: list[Tensor] = []
        work.begins("search", stage=work.state.stage)
        per_draw = max(1, sum(len(batch) for batch in work.data.calibration(work.iteration)) // self.sequences)
        losses: list[float] = []
        while self._done < self.updates:
            draw, place = divmod(self._done, per_draw)
            if not rows or place == 0:
                rows = [row for batch in work.batches(ahead=draw) for row in batch.split(1)]
            batches = _together(rows[place * self.sequences : (place + 1) * self.sequences])
            losses += self._update(work, axes, keep, batches)
            if self._done % per_draw == 0 or self._done == self.updates:
                whole = [loss for loss in losses if math.isfinite(loss)]
                if not whole:
                    raise RunError(
                        f"no mask of {len(losses)} has a finite loss on the calibration text; set dtype=float32, or keep more of the model"
                    )
                yield Searched(
                    stage=work.state.stage, done=self._done, of=self.updates, evaluations=self._done * self.masks,
                    best=min(whole), mean=sum(whole) / len(whole), sizes={axis.name: float(self._stay[axis.name].sum()) for axis in axes},
                )  # fmt: skip
                losses = []
        return _together(rows[: self.sequences]) if rows else work.batches()[:1]

    def _update(self, work: Work, axes: Sequence[Axis], keep: float, batches: Sequence[Tensor]) -> list[float]:
        """Update s once, in place; returns the losses of the masks."""
        generator = torch.Generator().manual_seed((work.recipe.seed * 1_000_003 + work.state.stage) * 100_003 + self._done)
        stay = self._stay
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
            "stay": {name: share.tolist() for name, share in self._stay.items()},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "stay" in state:
            self._stage, self._done = state["stage"], state["done"]
            self._baseline = math.nan if state["baseline"] is None else state["baseline"]
            self._stay = {name: torch.tensor(share) for name, share in state["stay"].items()}

    def fit(self, work: Work) -> None:
        """Restart the stage's search, because the recipe or a text changed."""
        self._stage = 0


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


def _together(rows: Sequence[Tensor]) -> list[Tensor]:
    """The sequences of an update in as few batches as their lengths allow; the user's own token ids may differ in length."""
    return batches_of(rows, max_tokens=sum(row.numel() for row in rows))
