"""`reduce: towers`: width first, then depth, of one tower after the other (MoPE-CLIP).

    tower ──► metric ──► chooser ──► narrower layers ──► layer by layer: the one without which the measure drops least goes ──► next

In a run of several stages a stage ends, and trains, wherever its number of parameters is reached. With one tower and two stages that is
after the width and after the depth.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch

from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.cut import num_left
from adapt_pruner.core.model.kinds import tower_of
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.cutline import cut_line
from adapt_pruner.reduce.units import evidence_of, mask_to, prunable, removing, scores_of, within_widths
from adapt_pruner.score.removal import drop
from adapt_pruner.work import Change, Passes, Reduction, TextUse, Work


@part("reduce", needs={"chosen", "text"}, reads={"axes", "metric", "chooser", "step", "multiple_of", "equal_widths"})
class Towers(Reduction):
    """Narrow the layers of a tower, then drop whole ones, then go to the next tower (MoPE-CLIP)."""

    changes_hidden_states = True

    def __init__(self, *, tower: Literal["both", "text", "vision"] = "both", depth: Annotated[float, "0 to 1"] = 0.5) -> None:
        """
        Args:
            tower: which towers lose units: one, as before fine-tuning for a task, or both, as before pre-training.
            depth: the share of the parameters to remove that whole layers give, as far as these go into it; narrower layers give the rest.

        The towers give parameters in proportion to what their layers have. The layer that goes is the one without which the task's
        measure drops least (`removal.drop`), measured again after each.

        Source: MoPE-CLIP, arXiv:2403.07839: width before depth. Differs: there the widths and the depth are given; here a number of
        parameters and the share of it that is depth.
        """
        self.tower, self.depth = tower, depth
        self._goals: list[list[Any]] = []

    def check(self, work: Work) -> None:
        """Refuse a model without the tower, and axes other than heads and neurons."""
        if not self._towers(work):
            raise UsageError(
                f"reduce towers(tower={self.tower}) is for models of two towers, such as CLIP, and {work.recipe.model} has one stack of "
                "layers; set tower=both, or method to another"
            )
        if strange := [kind for kind in work.recipe.axes if kind not in ("neurons", "kv_heads")]:
            raise UsageError(
                f"reduce towers removes neurons, kv_heads and, by its option depth, layers; leave {', '.join(strange)} out of axes"
            )

    def _towers(self, work: Work) -> list[str]:
        """The towers that lose units, by the prefix of their axes."""
        every = list(work.task.towers)
        return every if self.tower == "both" else [tower for tower in every if tower == f"{self.tower}."]

    def _inside(self, work: Work, tower: str) -> list[Axis]:
        return [axis for axis in prunable(work) if tower_of(axis.name) == tower]

    def _layers(self, work: Work, tower: str) -> Axis:
        return next(axis for axis in work.axes if axis.name == f"{tower}layers")

    def floor(self, work: Work) -> tuple[int, str]:
        """The parameters that are left once each tower has one layer, with one head and one neuron."""
        inside = [axis for tower in self._towers(work) for axis in self._inside(work, tower)]
        depth = [self._layers(work, tower) for tower in self._towers(work)]
        sizes = {axis.name: axis.least for axis in (*inside, *depth)}
        if not self.depth:
            sizes |= {axis.name: axis.size for axis in depth}
        return num_left(
            work.model, work.axes, mask_to([*inside, *depth], sizes)
        ), f"the towers that shrink ({self.tower}) have the least"

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """About: one width and two layers a tower and stage."""
        return 3 * len(self._towers(work)) if reached > target else 0

    def text_use(self, work: Work) -> TextUse:
        """Forward passes, and gradients for the order of neurons."""
        return TextUse(text=True, evidence=evidence_of(work), forward=True)

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """A forward pass for each head, group of neurons and layer."""
        tokens = work.recipe.calibration.samples * work.recipe.calibration.length
        inside = [axis for tower in self._towers(work) for axis in self._inside(work, tower)]
        return {"score": removing(inside, tokens=tokens, towers=len(work.task.towers))}

    def steps(self, work: Work, target: int) -> Iterator[Change]:
        """Yield each cut: goal after goal, as far as the stage's target."""
        if not self._goals:
            self._goals = self._planned(work)
        for tower, kind, goal in self._goals:
            goal = max(goal, target)
            while work.num_params > goal:
                change = self._dropped(work, tower, goal) if kind == "depth" else None
                yield change or self._narrowed(work, tower, goal)
            if goal == target:
                return

    def _planned(self, work: Work) -> list[list[Any]]:
        """Tower, `width` or `depth`, and the parameters that are left after it, in order."""
        towers, goals, left = self._towers(work), list[list[Any]](), float(work.num_params)
        weights = {tower: sum(self._layers(work, tower).costs) for tower in towers}
        excess = work.num_params - work.budget.keep
        for tower in towers:
            share = excess * weights[tower] / sum(weights.values())
            for kind, part_of in (("width", 1 - self.depth), ("depth", self.depth)):
                left -= share * part_of
                goals.append([tower, kind, round(left)])
        goals[-1][-1] = work.budget.keep
        return goals

    def _narrowed(self, work: Work, tower: str, goal: int) -> Change:
        axes, recipe = self._inside(work, tower), work.recipe
        batches = work.batches()
        with work.state.clock("score"):
            scores, loss = scores_of(work, batches, axes, stage=work.state.stage, iteration=work.iteration)
            choose = within_widths(work, parts.bind("chooser", recipe.chooser, step=work.step))
            sizes, _ = choose(scores, axes, Budget(keep=goal, total=work.num_params), debt=Debt.none(axes))
            mask = Mask.of_sizes(axes, scores, sizes)
        if mask.num_removed() == 0:
            raise RunError(
                f"the {tower.removesuffix('.')} tower cannot be narrowed to {goal:,} parameters; raise the budget, or set another depth or tower"
            )
        return Change(mask, loss, {"sizes": sizes, "scores": cut_line(axes, scores, mask)})

    def _dropped(self, work: Work, tower: str, goal: int) -> Change | None:
        """The layer without which the measure drops least goes, of those that go into what has to; None if there is none."""
        depth, excess = self._layers(work, tower), work.num_params - goal
        fitting = [index for index, cost in enumerate(depth.costs) if cost <= excess]
        if depth.size < 2 or not fitting:
            return None
        with work.state.clock("score"):
            tell = work.progress("blocks", stage=work.state.stage, iteration=work.iteration)
            scores = drop(work.model, [depth], work.batches(), task=work.task, dtype=work.recipe.dtype, on_axis=tell)
        worst = min(fitting, key=lambda index: float(scores[depth.name][index]))
        mask = Mask({depth.name: torch.arange(depth.size) != worst})
        return Change(mask, told={"sizes": {depth.name: depth.size - 1}})

    def state(self) -> dict[str, Any]:
        """The goals of the run."""
        return {"goals": self._goals}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the goals."""
        self._goals = state.get("goals", [])
