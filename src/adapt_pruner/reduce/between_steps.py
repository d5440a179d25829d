"""`reduce: between_steps`: remove units between optimiser steps, chosen by the gradients of these steps (EfficientLLM).

    backward ─► scores of all units by the step's gradients ─► the optimiser's step ─► cut what is due ─► the next step

The number of parameters falls linearly with the rows read. It reaches the stage's budget after a share of the stage's training;
the rest of the stage trains as usual.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch

from adapt_pruner.core.events.run import Searched
from adapt_pruner.core.model.axes import Mask, Scores
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.cut import num_left
from adapt_pruner.core.model.kinds import WHOLE
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.units import (
    Units,
    evidence_of,
    metrics_of,
    prunable,
    repair_parameters,
    repaired,
    scored,
    within_widths,
)
from adapt_pruner.score.calibrate import Evidence, finish
from adapt_pruner.work import Change, Passes, TextUse, Work, check_training


@part(
    "reduce",
    needs={"chosen", "training"},
    reads={"axes", "metric", "distance", "chooser", "repair", "multiple_of", "equal_widths", "debt"},
)
class BetweenSteps(Units):
    """Remove the least valuable units between optimiser steps, scored by the gradients of these steps (EfficientLLM)."""

    goes_by_layer = False

    fills_zeros = True

    def __init__(
        self,
        *,
        every: Annotated[int, "1 or more"] = 1,
        batches: Annotated[int, "1 or more"] = 1,
        share: Annotated[float, "0 to 1"] = 0.5,
    ) -> None:
        """
        Args:
            every: steps between two removals.
            batches: N: the scores of the last N steps before a removal are added up; at most `every`.
            share: share of the stage's rows during which the model shrinks.

        The recipe's metric scores units by the clipped gradients that the optimiser is about to use, so no extra pass is needed.
        The recipe's chooser then removes, in one shot, as many parameters as are due. A repair, if the recipe has one, reads
        calibration text before each cut. The optimiser's moments are cut along with the weights.

        Source: arXiv:2502.06663 and the figures of its repository; the training code is not public. Differs: removals are counted
        in parameters, not as one group per step. The chooser ranks units of all kinds together; in the method `efficientllm` it
        does so by score per parameter. How the paper compares kinds is not known.
        """
        super().__init__()
        self.every, self.batches, self.share = every, batches, share
        self._began: dict[str, int] = {}
        self._sums: Scores = {}

    def check(self, work: Work) -> None:
        """Refuse a recipe whose metric or training does not work with cuts between steps."""
        super().check(work)
        recipe = work.recipe
        if self.batches > self.every:
            raise UsageError(
                f"reduce between_steps adds up the scores of {self.batches} steps and cuts after every {self.every}; raise every, or "
                "lower batches"
            )
        check_training(work, "between_steps")
        if whole := [kind for kind in recipe.axes if kind in WHOLE]:
            raise UsageError(
                f"reduce between_steps works with gradients of units, and axes names {', '.join(whole)}; leave that out of axes"
            )
        if evidence_of(work, metrics_of(work, seed=0)) not in (Evidence.WEIGHTS, Evidence.GRADIENTS) or recipe.distance:
            raise UsageError(
                "reduce between_steps uses only scores from gradients of weights; set metric=weights.taylor and distance=null, "
                "with a chooser that needs no distance, such as rank.per_parameter"
            )

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """Estimate of the number of cuts: one after every `every` optimiser steps."""
        training = work.recipe.training
        steps = training.tokens / work.recipe.stages / training.step_tokens * self.share
        return max(1, round(steps / self.every)) if reached > target else 0

    def text_use(self, work: Work) -> TextUse:
        """Calibration text, if there is a repair to read it."""
        repairs = work.recipe.repair is not None
        return TextUse(text=repairs, evidence=Evidence.WEIGHTS, forward=repairs)

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """Only the repair."""
        return {name: passes for name, passes in super().phases(work, target).items() if name == "repair"}

    def steps(self, work: Work, target: int) -> Iterator[Change | Searched]:
        """Train, and yield a cut whenever one is due, until the model has at most `target` parameters."""
        state, recipe = work.state, work.recipe
        if work.num_params <= target:
            return
        assert work.training is not None
        if self._began.get("stage") != state.stage:
            self._began = {
                "stage": state.stage,
                "params": work.num_params,
                "rows": state.progress.rows,
                "steps": state.progress.steps,
            }
            self._sums = {}
        span = work.span(self.share, first=self._began["rows"])
        self._debt = self._carried(work)
        for step in work.training(until=span.stop):
            into = (step.step - self._began["steps"] - 1) % self.every  # place of this step between two removals, from 0
            last = span.steps_left(state.progress.rows) <= 1
            if into >= self.every - self.batches or last:
                self._add(work)
            step.take()
            if into < self.every - 1 and not last:
                continue
            read = span.share_read(state.progress.rows)
            due = target if last else round(self._began["params"] - (self._began["params"] - target) * read)
            scores, self._sums = self._sums, {}
            if work.num_params <= due:
                continue
            sizes, mask, debt = _chosen(work, scores, due=due, target=target, debt=self._debt)
            if mask.num_removed() == 0:
                continue  # less than a unit is due
            if recipe.repair is not None:  # without a repair no text is read
                repaired(work, mask, work.batches(), stage=state.stage, iteration=work.iteration)
                work.train_new_parameters()
            state.progress.forget_losses()  # a smaller model has a higher loss, which is no divergence
            self._debt = debt.after(mask)
            yield Change(mask, step.loss, {"sizes": sizes})
        self._began = {}

    def _add(self, work: Work) -> None:
        """Add the scores from the gradients of this step to the sums, in place."""
        axes = scored(work)
        for metric in metrics_of(work, seed=work.recipe.seed + work.iteration):
            running = metric(work.model, axes)
            if next(running) is Evidence.GRADIENTS:
                for name in [name for name, weight in work.model.named_parameters() if weight.grad is not None]:
                    running.send(name)
            for name, values in finish(running).items():
                self._sums[name] = values + self._sums[name] if name in self._sums else values

    def state(self) -> dict[str, Any]:
        """Where the stage's removals began, the running sums of scores, and the chooser's debt."""
        sums = {name: values.tolist() for name, values in self._sums.items()}
        return super().state() | {"began": dict(self._began), "sums": sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        super().restore(state)
        if "began" in state:
            self._began = dict(state["began"])
            self._sums = {name: torch.tensor(values) for name, values in state["sums"].items()}

    def fit(self, work: Work) -> None:
        """Restart the stage's removals, because the recipe or a text changed."""
        super().fit(work)
        self._began, self._sums = {}, {}


def _chosen(work: Work, scores: Scores, *, due: int, target: int, debt: Debt) -> tuple[dict[str, int], Mask, Debt]:
    """The sizes, the mask and the debt that leave at most `due` parameters, or as few as the chooser can reach.

    On the way to `target` the chooser takes a step as large as what is due. So a dear unit at the front of its line goes, even if
    more goes with it than is due; the next removals wait for the rest. The last removal meets the target.

    A chooser adds up the costs of units, so it counts a weight shared by a channel and a neuron twice and removes too little.
    It is asked for more until the true number of parameters is low enough.
    """
    recipe, axes, added = work.recipe, prunable(work), repair_parameters(work)
    total, last = work.num_params + added, due <= target
    whole = total if last else sum(debt.start[axis.name] * axis.cost for axis in axes)
    least = min((axis.cost for axis in axes), default=1)
    excess, more, before = total - due, least, 0
    while True:
        step, keep = (1.0, max(0, total - excess)) if last else (min(1.0, excess / whole), target)
        choose = within_widths(work, parts.bind("chooser", recipe.chooser, step=step, amplitude=recipe.amplitude))
        sizes, after = choose(scores, axes, Budget(keep=keep, total=total), debt=debt)
        mask = Mask.of_sizes(axes, scores, sizes)
        left = num_left(work.model, work.axes, mask) + added
        if left <= due or excess >= whole:
            return sizes, mask, after
        more, before = 2 * more if mask.num_removed() == before else least, mask.num_removed()
        excess += max(left - due, more)
