"""What a run is going to do, stage by stage, in parameters, iterations, tokens and steps: arithmetic, before any work."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapt_pruner import families
from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.surgery import num_left
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import WHOLE, Recipe, parts
from adapt_pruner.reduce.allocate import Debt
from adapt_pruner.reduce.closed_form import without_bias
from adapt_pruner.reduce.slicing import width_for
from adapt_pruner.reduce.widths import check_multiple, fitting
from adapt_pruner.score.calibrate import Evidence, Metric, evidence_needed
from adapt_pruner.train.loop import stage_tokens

__all__ = [
    "Stage",
    "chooser_of",
    "evidence_of",
    "layer_measure_of",
    "mask_to",
    "measured_whole",
    "metrics_of",
    "params_of",
    "plan",
    "prunable",
    "reads_text",
    "rescales",
    "scored",
    "shuts_heads",
    "sizes_alike",
    "stage_targets",
    "stages",
    "writes_text",
]


@dataclass(frozen=True)
class Stage:
    """One round of pruning and training.

    Attributes:
        stage: its number, from 1.
        params: parameters that may be left after it.
        iterations: pruning iterations it will take, as far as the step tells.
        calibration_tokens: tokens that those iterations look at.
        tokens: tokens trained on.
        steps: optimiser steps.
    """

    stage: int
    params: int
    iterations: int
    calibration_tokens: int
    tokens: int
    steps: int


def stage_targets(start: int, end: int, stages: int) -> list[int]:
    """Parameters after each of T stages, linear: N_k = N_0 - (N_0 - N_T) · k / T, in whole numbers."""
    return [start - (start - end) * k // stages for k in range(1, stages + 1)]


def stages(recipe: Recipe, axes: Sequence[Axis], *, start: int, end: int) -> list[Stage]:
    """The stages of `recipe` on a model of `start` parameters with prunable `axes`, down to `end` parameters."""
    tokens = stage_tokens(recipe.training.tokens, stages=recipe.stages, shards=recipe.training.shards)
    depth = next((axis for axis in axes if axis.kind == "layers"), None)
    names = {axis.name for axis in axes if axis.modules}
    outer = [depth] if depth else [axis for axis in axes if not names & set(axis.enclosing)]  # units inside others go with them
    may_go = sum(axis.size * axis.cost for axis in outer)
    whole = [axis.cost for axis in outer if axis.gate.is_whole]
    least = sum(whole) / len(whole) if whole else 1  # one of them goes in any case
    planned, reached = [], start
    for k, target in enumerate(stage_targets(start, end, recipe.stages), start=1):
        counted_from = may_go - (start - reached) if recipe.debt == "reset" else may_go  # what the step is a share of
        at_once = max(recipe.step * counted_from, least)
        iterations = max(1, round((reached - target) / at_once)) if reached > target else 0
        iterations = iterations if recipe.rotate is None else min(1, iterations)
        looked_at = iterations * recipe.calibration.samples * recipe.calibration.length
        trained = tokens[k - 1]
        planned.append(Stage(k, target, iterations, looked_at, trained, -(-trained // recipe.training.batch_tokens)))
        reached = target
    return planned


def plan(
    model: Any, recipe: Recipe, *, dense: int, start: int | None = None, keep: int | None = None
) -> tuple[list[Stage], Budget]:
    """The stages and the budget of a run that began with `dense` parameters, once it is known that it can be met.

    Args:
        model: as it is now.
        recipe: the run.
        dense: what the budget is a share of.
        start: parameters at the start of the first stage, where tokens went before it.
        keep: the parameters that the recipe's latency comes to, where it names one instead of a budget.

    Raises:
        UsageError: it cannot.
    """
    axes = prunable(model, recipe)
    check_multiple(axes, recipe.multiple_of)
    _check_measured(model, recipe)
    budget = Budget.parse(recipe.budget if keep is None else keep, dense=dense)
    total = count_parameters(model)
    if total > budget.keep and families.is_sliced(model.config):
        raise UsageError(
            f"the model is sliced and has {total:,} parameters, more than the budget {budget.keep:,}, and a sliced model cannot be "
            "cut further; prune the dense model it came from"
        )
    if recipe.rotate is None:
        kinds = ", ".join(sorted({axis.kind for axis in axes})) or "nothing"
        budget.check_reachable(
            params_of(model, axes, sizes_alike(model, recipe, keep=0)) + repair_parameters(model, recipe),
            when=f"{recipe.chooser} has taken all that it may ({kinds})",
        )
    elif total > budget.keep:
        width_for(model, budget.keep)
    start = dense if start is None else start
    return stages(recipe, axes, start=start, end=min(start, budget.keep)), budget


def repair_parameters(model: Any, recipe: Recipe) -> int:
    """The parameters that the recipe's repair is yet to add to the model: those of biases."""
    if recipe.repair is None or recipe.repair.partition("(")[0] != "closed_form.mean_bias":
        return 0
    return sum(int(module.weight.shape[0]) for module in without_bias(model, families.axes(model)))


def params_of(model: Any, axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    """The parameters that `model` would have left with such sizes of `axes`, whichever units stay."""
    return num_left(model, families.axes(model), mask_to(axes, sizes))


def mask_to(axes: Sequence[Axis], sizes: Mapping[str, int]) -> Mask:
    """A mask that leaves such sizes, whichever units stay."""
    return Mask.of_sizes(axes, {axis.name: torch.zeros(axis.entries) for axis in axes}, sizes)


def sizes_alike(model: Any, recipe: Recipe, *, keep: int) -> dict[str, int]:
    """The sizes that the recipe's chooser comes to on its way to `keep` parameters, or as near as it may, if all scores are alike."""
    axes = families.axes(model)
    whole = left = prunable(model, recipe)
    chooser = chooser_of(recipe, step=1.0, amplitude=0.0)
    total = count_parameters(model)
    found, debt = {axis.name: axis.size for axis in left}, Debt.none(left)
    while not keep or total > keep:
        alike = {axis.name: torch.zeros(axis.entries) for axis in (*axes, *left)}
        sizes, debt = chooser(alike, left, Budget(keep=keep, total=total), debt=debt)
        if all(sizes[axis.name] == axis.size for axis in left):
            break
        found |= sizes
        # Not what the axes cost: a channel and a neuron own a weight together.
        total = num_left(model, axes, mask_to(whole, found))
        num_layers = sizes.get("layers", len(alike["layers"]))  # of layers that are alike the first stay
        gone = {name for name, size in sizes.items() if size == 0}
        staying = [axis for axis in left if axis.layer is None or axis.layer < num_layers]
        staying = [axis for axis in staying if not gone & {axis.name, *axis.enclosing}]
        left = [replace(axis, size=sizes[axis.name], costs=axis.costs[: sizes[axis.name]]) for axis in staying]
    return found


def _check_measured(model: Any, recipe: Recipe) -> None:
    """Refuse what a metric refuses by itself, and `behind` where nothing is measured in layers, or not by what flows through them."""
    if recipe.rotate is not None:
        return
    evidence_needed(model, scored(model, recipe), metrics_of(recipe, seed=0))
    if not recipe.behind:
        return
    if not set(recipe.axes) - {*WHOLE, "residual"}:
        raise UsageError(
            f"behind=true measures units inside layers, and axes has none but {', '.join(recipe.axes)}; set behind=false"
        )
    if evidence_needed(model, scored(model, recipe), metrics_of(recipe, seed=0)[:1]) is not Evidence.FORWARD:
        raise UsageError(
            "behind=true measures layers one by one by what flows through them, and "
            f"{recipe.metric} looks at something else; take a metric of activations"
        )


def chooser_of(recipe: Recipe, *, step: float, amplitude: float) -> Callable[..., tuple[dict[str, int], Debt]]:
    """The recipe's chooser, its sizes brought to the widths that the recipe allows; called as any chooser is."""
    choose = parts.bind("chooser", recipe.chooser, step=step, amplitude=amplitude)

    def within_widths(scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt) -> tuple[dict[str, int], Debt]:
        sizes = {axis.name: axis.size for axis in axes}
        # What it wanted of neurons at their least would be given back, and it would never get to the heads.
        if free := [axis for axis in axes if axis.kind != "neurons" or axis.size > recipe.multiple_of]:
            wanted, debt = choose(scores, free, budget, debt=debt)
            sizes |= wanted
        if recipe.multiple_of > 1 or recipe.equal_widths:
            sizes = fitting(sizes, axes, scores=scores, multiple_of=recipe.multiple_of, equal_widths=recipe.equal_widths)
        return sizes, debt

    return within_widths


def prunable(model: Any, recipe: Recipe) -> list[Axis]:
    """The axes of `model` that the recipe lets shrink."""
    return [axis for axis in families.axes(model) if axis.kind in recipe.axes]


def scored(model: Any, recipe: Recipe) -> list[Axis]:
    """The axes that metrics look at: those that may shrink, whose parameters alone get gradients, and `layers`."""
    return [axis for axis in families.axes(model) if axis.kind in recipe.axes or axis.name == "layers"]


def measured_whole(model: Any, recipe: Recipe) -> list[Axis]:
    """The axes that a distance with passes of its own shuts the units of: what may go whole, else `layers`, which choosers go by."""
    return [axis for axis in prunable(model, recipe) if axis.gate.is_whole] or [
        axis for axis in families.axes(model) if axis.name == "layers"
    ]


def metrics_of(recipe: Recipe, *, seed: int) -> list[Metric]:
    """The metrics that share the recipe's calibration pass: what units are worth, and layers."""
    metrics: list[Metric] = [parts.bind("metric", recipe.metric, seed=seed)] if set(recipe.axes) - set(WHOLE) else []
    if recipe.distance is not None and layer_measure_of(recipe) is None:
        metrics.append(parts.bind("distance", recipe.distance))
    return metrics


def layer_measure_of(recipe: Recipe) -> Callable[..., Scores] | None:
    """The recipe's distance where it takes passes of its own, as `blocks.loss_drop` does; None where it shares the metric's."""
    if recipe.distance is None:
        return None
    distance = parts.bind("distance", recipe.distance, dtype=recipe.dtype)
    return None if inspect.isgeneratorfunction(distance) else distance


def shuts_heads(recipe: Recipe) -> bool:
    """Whether KV heads are measured one by one, in layers that lose one."""
    return recipe.rotate is None and recipe.head_metric is not None and "kv_heads" in recipe.axes


def rescales(recipe: Recipe) -> bool:
    """Whether the repair looks at gradients of what flows, to fit a factor for each block."""
    return recipe.repair is not None and bool(parts.bind("repair", recipe.repair).keywords.get("factors"))


def reads_text(model: Any, recipe: Recipe) -> bool:
    """Whether anything the recipe scores with looks at the calibration text."""
    if recipe.rotate is not None or recipe.repair is not None or layer_measure_of(recipe) is not None or shuts_heads(recipe):
        return True
    return evidence_of(model, recipe) is not Evidence.WEIGHTS


def evidence_of(model: Any, recipe: Recipe) -> Evidence:
    """The most that the metrics which share the recipe's calibration pass need to see; weights alone where it has none."""
    if recipe.rotate is not None:
        return Evidence.WEIGHTS
    return evidence_needed(model, scored(model, recipe), metrics_of(recipe, seed=0))


def writes_text(recipe: Recipe) -> bool:
    """Whether the calibration text is one that the model writes itself."""
    return recipe.calibration.ids is None and SELF in domains(recipe.calibration.source)
