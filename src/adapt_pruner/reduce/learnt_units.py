"""What reductions share that learn from calibration text which units stay, with all weights as they are, and then make one cut.

    values    a number for each neuron and KV head, learnt in updates on a few sequences of the text each
    at last   the units with the highest values stay, as many as meet the budget, and one cut is made

How values begin and what an update does is the reduction's own: `policy_gradient`, `greedy_gates`, `free_gates`.
"""

import math
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam

from adapt_pruner.core.events.run import Searched
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.precision import linears_cast, precision
from adapt_pruner.core.system import world
from adapt_pruner.data.tokens import batches_of
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.rank import standardised
from adapt_pruner.reduce.units import (
    Units,
    prunable,
    refuse_limits,
    repair_parameters,
    repaired,
    with_forward,
    within_widths,
)
from adapt_pruner.score.calibrate import as_found
from adapt_pruner.train.objectives import kl_of_logits
from adapt_pruner.work import Change, Passes, TextUse, Work

KINDS = ("neurons", "kv_heads")


class LearntUnits(Units):
    """Learn a value for each neuron and KV head in `updates`, and then cut to the units with the highest values.

    Attributes:
        name: of the reduction in a recipe.
        updates: number of updates in all.
        sequences: calibration sequences of an update, at most those of a draw; the next update reads the next ones.
        passes: forward passes of an update, for the log.
    """

    goes_by_layer = False

    name: ClassVar[str]
    updates: int
    sequences: int
    passes: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._stage, self._done = 0, 0
        self._values: dict[str, Tensor] = {}

    @abstractmethod
    def _begin(self, work: Work, axes: Sequence[Axis], keep: float, **where: int) -> None:
        """Set the values, and all else that is learnt, to their start; `keep` is the share of these axes that the budget keeps."""

    @abstractmethod
    def _update(self, work: Work, axes: Sequence[Axis], keep: float, batches: Sequence[Tensor]) -> list[float]:
        """Make update number `_done`, in place, and count it; returns the losses of its passes."""

    def _shares(self) -> Mapping[str, Tensor]:
        """How far each unit is expected to stay, 0 to 1, for the log."""
        return self._values

    def _how(self, axes: Sequence[Axis], keep: float) -> dict[str, Any]:
        """How units rank by their values, as options of `rank.standardised`."""
        return {"structure": "AL-AM"}

    def _fold(self, work: Work, axes: Sequence[Axis], mask: Mask) -> None:
        """Bring what was learnt beside the values into the weights of the units that stay, in place."""

    def check(self, work: Work) -> None:
        """Refuse axes other than neurons and KV heads, and limits of the chooser."""
        others = [kind for kind in work.recipe.axes if kind not in KINDS]
        if others:
            raise UsageError(
                f"reduce {self.name} draws neurons and kv_heads, and axes names {', '.join(others)}; leave that out of axes"
            )
        super().check(work)
        refuse_limits(work, f"reduce {self.name} learns how many units each layer keeps")

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
        """Learn the values and report after every draw of text; then yield one cut."""
        now, axes = work.num_params, [axis for axis in prunable(work) if axis.size > axis.least]  # a lone KV head cannot go
        if now <= target:
            return
        where = {"stage": work.state.stage, "iteration": work.iteration}
        excess = now + repair_parameters(work) - target
        keep = 1 - excess / sum(axis.size * axis.cost for axis in axes)
        with work.state.clock("score"):
            if self._stage != work.state.stage or self._values.keys() != {axis.name for axis in axes}:
                self._begin(work, axes, keep, **where)
                self._stage, self._done = work.state.stage, 0
            batches = yield from self._learn(work, axes, keep)
        mask = self._mask(work, axes, keep)
        loss = work.loss({}, batches)
        self._fold(work, axes, mask)
        repaired(work, mask, work.batches(), **where)
        self._stage = 0
        yield Change(mask, loss, {"sizes": {axis.name: int(mask[axis.name].sum()) for axis in axes}})

    def _mask(self, work: Work, axes: Sequence[Axis], keep: float) -> Mask:
        """The units with the highest values, as many as meet the stage's budget."""
        total = work.num_params + repair_parameters(work)
        target = work.stages[work.state.stage - 1].params
        choose = within_widths(work, partial(standardised, step=1.0, by="feature", **self._how(axes, keep)))
        values = {name: numbers.detach() for name, numbers in self._values.items()}
        sizes, _ = choose(values, axes, Budget(keep=target, total=total), debt=Debt.none(axes))
        return Mask.of_sizes(axes, values, sizes)

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
                    stage=work.state.stage, done=self._done, of=self.updates, evaluations=self._done * self.passes,
                    best=min(whole), mean=sum(whole) / len(whole),
                    sizes={name: float(share.sum()) for name, share in self._shares().items()},
                )  # fmt: skip
                losses = []
        return _together(rows[: self.sequences]) if rows else work.batches()[:1]

    def fit(self, work: Work) -> None:
        """Restart the stage's search, because the recipe or a text changed."""
        self._stage = 0


def add_gradients(work: Work, gates: Mapping[str, Tensor], batches: Sequence[Tensor], *, divergence: float = 0.0) -> float:
    """Add to the leaves of `gates` the gradient of the mean loss of the gated model; the model and its weights are left as found.

    The loss is the task's, in nats per prediction, and `divergence` times KL(ungated model ‖ gated model) beside it.
    """
    model, task, device = work.model, work.task, work.model.device
    predicted = task.num_predicted(batches)
    total = torch.zeros((), dtype=torch.float64)
    with ExitStack() as stack:
        stack.enter_context(as_found(model, set()))
        stack.enter_context(linears_cast(model, work.recipe.dtype))
        for batch in world.share(batches):
            ids = batch.to(device)
            with precision(device, work.recipe.dtype):
                if divergence:
                    loss = _beside_divergence(work, gates, ids, divergence)
                else:
                    with gated(model, work.axes, gates):
                        loss = task.loss(model, ids)
            (loss / predicted).backward(retain_graph=True)  # the gates are a small graph that all batches share
            total += loss.detach().double().cpu()
    world.sum_in_place(total)
    return float(total) / predicted


def step(parameters: Mapping[str, Tensor], optimizer: Adam) -> None:
    """Take a step by the gradients, of all processes together, and forget them; one that no batch reached stays as it is."""
    world.sum_in_place(*(parameter.grad for parameter in parameters.values() if parameter.grad is not None))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _beside_divergence(work: Work, gates: Mapping[str, Tensor], ids: Tensor, divergence: float) -> Tensor:
    """The sum over predictions of cross-entropy + divergence · KL(ungated ‖ gated)."""
    model: Any = work.model
    task: Any = work.task
    with torch.no_grad():
        goal, _ = task.predicting(task.read(model, ids).last_hidden_state, ids, None)
    with gated(model, work.axes, gates):
        entering, targets = task.predicting(task.read(model, ids).last_hidden_state, ids, None)
        both = kl_of_logits(targets, goal, model, task, alpha=divergence / (1 + divergence))
        loss: Tensor = (1 + divergence) * task.of_logits(model, entering, both)
    return loss


def held(parameters: Mapping[str, Tensor], optimizer: Adam) -> dict[str, Any]:
    """Learnt numbers with their moments, as plain data."""
    return {
        name: {
            "value": parameter.detach().flatten().tolist(),
            "moments": {
                key: value.flatten().tolist() if value.dim() else float(value)
                for key, value in optimizer.state.get(parameter, {}).items()
            },
        }
        for name, parameter in parameters.items()
    }


def put_back(parameters: Mapping[str, Tensor], optimizer: Adam, data: Mapping[str, Any]) -> None:
    """Set numbers and moments, in place, to what `held` returned."""
    for name, values in data.items():
        parameter = parameters[name]
        with torch.no_grad():
            parameter.copy_(torch.tensor(values["value"]).view_as(parameter))
        if values["moments"]:
            optimizer.state[parameter] = {
                key: torch.tensor(value).to(parameter.device).view(() if key == "step" else parameter.shape)
                for key, value in values["moments"].items()
            }


def _together(rows: Sequence[Tensor]) -> list[Tensor]:
    """The sequences of an update in as few batches as their lengths allow; the user's own token ids may differ in length."""
    return batches_of(rows, max_tokens=sum(row.numel() for row in rows))
