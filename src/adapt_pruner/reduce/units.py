"""`reduce: units`, the loop of Adapt-Pruner: score, choose, repair and cut until the stage's budget is met.

    metric, distance ──► scores ──► chooser ──► sizes ──► head_metric, scores ──► mask ──► repair ──► cut
           ▲                                                                                          │
           └──────────────────────────── the next iteration, on the model as it is now ◄──────────────┘

The recipe names the parts: `metric`, `distance` and `head_metric` from `score/`, `chooser` and `repair` from `reduce/`.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.core.events.run import Searched
from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.cut import num_left
from adapt_pruner.core.model.gram import PANEL
from adapt_pruner.core.model.kinds import HEADS, WHOLE, kind_of, tower_of
from adapt_pruner.core.model.shelf import Shelved, numbers_of
from adapt_pruner.core.system.memory import give_back
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.cutline import cut_line
from adapt_pruner.reduce.choose.widths import alike_experts, check_multiple, fitting, levelled
from adapt_pruner.reduce.repair.closed_form import without_bias
from adapt_pruner.score.calibrate import Evidence, Metric, checked, eval_mode, evidence_needed, score, score_sequentially
from adapt_pruner.score.experts import usage, used
from adapt_pruner.work import Change, Passes, Reduction, TextUse, Work

HEAD_TOKENS = 1024  # tokens on which a KV head is measured
_NEARLY = 0.05  # share of a step: a last step smaller than this is left out of the estimate, since rounding may save it


@part("reduce", needs={"chosen"})
class Units(Reduction):
    """Remove the least valuable units in small steps, and repair the remaining weights in each step (Adapt-Pruner's loop)."""

    goes_by_layer = True

    def __init__(self) -> None:
        self._debt: Debt | None = None
        self._stage = 0

    def check(self, work: Work) -> None:
        """Refuse axes that the model lacks, a `multiple_of` that is too large, and `sequential_scoring` that cannot work."""
        recipe = work.recipe
        kinds = {axis.kind for axis in work.axes} | {kind_of(name) for name in work.state.began}
        whole = families.left_whole(work.model.config)
        missing = [kind for kind in recipe.axes if kind not in kinds and (kind not in whole or not kinds & set(recipe.axes))]
        if missing:
            raise UsageError(f"axes names {', '.join(missing)}, which this model does not have; leave that out of axes")
        if "layers" in whole and "layers" in recipe.axes:
            raise UsageError(f"whole layers of this model stay ({whole['layers']}); leave layers out of axes")
        if _is_periodic(work) and set(WHOLE) & set(recipe.axes) != {"layers"}:
            raise UsageError(
                f"chooser {recipe.chooser} keeps the pattern of whole layers, and axes is {', '.join(recipe.axes)}; name layers in axes and leave "
                "out attentions and mlps, or set periodic=false"
            )
        check_multiple(prunable(work), work.multiple_of)
        for need, gate in (("inputs", "inputs"), ("experts", "routed")):
            if need in parts.needs("metric", recipe.metric):
                _check_scored(work, {axis.kind for axis in prunable(work) if axis.slices and axis.gate.kind != gate})
        evidence_of(work)
        if not (recipe.sequential_scoring and "sequential_scoring" in parts.reads("reduce", recipe.reduce)):
            return
        if not set(recipe.axes) - {*WHOLE, "residual"}:
            raise UsageError(
                f"sequential_scoring=true scores units inside layers, and axes has only {', '.join(recipe.axes)}; set sequential_scoring=false"
            )
        if evidence_of(work, metrics_of(work, seed=0)[:1]) is not Evidence.FORWARD:
            raise UsageError(
                "sequential_scoring=true scores layer by layer from activations, and "
                f"{recipe.metric} does not use activations; set metric to one that does, such as activations.wanda, or set "
                "sequential_scoring=false"
            )

    def floor(self, work: Work) -> tuple[int, str]:
        """The parameters that are left once the chooser has removed all that it may, plus the biases that the repair adds."""
        kinds = ", ".join(sorted({axis.kind for axis in prunable(work)})) or "nothing"
        least = params_of(work, prunable(work), sizes_alike(work, keep=0)) + repair_parameters(work)
        if least >= work.num_params:
            depth = sum(axis.size for axis in work.axes if axis.kind == "layers")
            return (
                least,
                f"{work.recipe.chooser} can remove nothing ({kinds}) from a model of {depth} layers, so set another method or chooser",
            )
        return least, f"{work.recipe.chooser} has removed all it can ({kinds})"

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """Estimate of the iterations: each removes a share `step`, or one whole layer or block if that is more.

        If the chooser keeps heads at first (`heads_after`), steps remove less until heads go, too.
        """
        if reached <= target:
            return 0
        recipe, axes = work.recipe, prunable(work)
        depth = next((axis for axis in axes if axis.kind == "layers"), None)
        names = {axis.name for axis in axes if axis.modules}
        outer = [depth] if depth else [axis for axis in axes if not names & set(axis.enclosing)]  # axes inside a block go with it
        may_go = sum(axis.size * axis.cost for axis in outer)
        whole = [axis.cost for axis in outer if axis.gate.is_whole]
        least = sum(whole) / len(whole) if whole else 1  # one of them goes in any case
        after = float(parts.bind("chooser", recipe.chooser).keywords.get("heads_after") or 0.0)
        if after and recipe.debt != "reset":
            heads = sum(axis.size * axis.cost for axis in outer if axis.kind in HEADS)
            shares = [_share_of(gone, may_go - heads, heads, after) for gone in (start - reached, start - target)]
            steps = (shares[1] - shares[0]) / recipe.step
        else:
            counted_from = may_go - (start - reached) if recipe.debt == "reset" else may_go  # what the step is a share of
            at_once = recipe.step * counted_from
            if "structures" in parts.needs("chooser", recipe.chooser):  # mostly the cheapest go, since they are by far the most
                at_once = recipe.step * sum(axis.entries for axis in outer) * min(axis.cost for axis in outer)
            steps = (reached - target) / max(at_once, least)
        return max(1, math.ceil(steps - _NEARLY))

    def text_use(self, work: Work) -> TextUse:
        """What the metrics, the distance, the head metric and the repair read."""
        recipe, evidence = work.recipe, evidence_of(work)
        layers = by_passes(work, "distance") is not None or by_passes(work, "metric") is not None
        heads = _head_metric(work) is not None and "kv_heads" in recipe.axes
        repairs = recipe.repair is not None
        return TextUse(
            text=repairs or layers or heads or evidence is not Evidence.WEIGHTS,
            evidence=evidence,
            forward=heads or by_passes(work, "metric") is not None,
            streams=repairs and bool(parts.bind("repair", recipe.repair or "").keywords.get("factors")),
        )

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """Scoring, shutting units one by one, choosing and the repair.

        To shut a KV head or a block, the layers from its own on run again, half of all layers on average. Heads are measured in
        those layers that would lose some if all scores were equal. Scoring each layer on the output of the pruned layers
        below it runs each layer twice. A repair sums the products of each gate's inputs, about features² operations per
        token (`core.model.gram`). It then solves for the weights: features³ / 3 operations in float64, here counted twice.
        """
        recipe, evidence = work.recipe, evidence_of(work)
        tokens = recipe.calibration.samples * recipe.calibration.length
        phases = {"score": Passes(both=tokens) if evidence.value >= Evidence.GRADIENTS.value else Passes(forward=tokens)}
        if evidence is Evidence.WEIGHTS:
            phases["score"] = Passes()
        if by_passes(work, "metric") is not None:
            phases["score"] = removing(prunable(work), tokens=tokens, towers=len(work.task.towers))
        if by_passes(work, "distance") is not None:
            phases["blocks"] = Passes(forward=tokens * sum(axis.size for axis in _measured_whole(work)) / 2)
        heads = [axis for axis in prunable(work) if axis.kind == "kv_heads"]
        if _head_metric(work) is not None and heads:
            sizes = sizes_alike(work, keep=target)
            measured = sum(axis.size for axis in heads if sizes[axis.name] < axis.size)
            phases["heads"] = Passes(forward=min(tokens, HEAD_TOKENS) * measured / 2)
        phases["choose"] = Passes(forward=2 * tokens) if recipe.sequential_scoring else Passes()
        if recipe.repair is not None:
            further = recipe.calibration.self_generated + recipe.calibration.repair_samples
            text = tokens + further * recipe.calibration.length
            features = [axis.size * axis.gate.width for axis in prunable(work) if axis.gate.is_linear]
            flops = sum(text * size * (size + PANEL) + 2 * size**3 / 3 for size in features)
            steps = int(parts.bind("repair", recipe.repair).keywords.get("factors") or 0)
            phases["repair"] = Passes(forward=text * (1 + steps / 4), both=steps * text / 2, flops=flops)
        return phases

    def steps(self, work: Work, target: int) -> Iterator[Change | Searched]:
        """Score, choose, repair and yield the mask, until the model has at most `target` parameters."""
        recipe, model = work.recipe, work.model
        self._debt = self._carried(work)
        while (now := work.num_params) > target:
            step = work.step
            amplitude = recipe.amplitude * step / recipe.step  # so that layers differ as much as in small steps
            choose = within_widths(work, parts.bind("chooser", recipe.chooser, step=step, amplitude=amplitude))
            where = {"stage": work.state.stage, "iteration": work.iteration}
            may_shrink = prunable(work)
            with work.state.clock("score"):
                batches = work.batches()
                scores, loss = scores_of(work, batches, **where)
                work.begins("choose", **where)
                budget = Budget(keep=target, total=now + repair_parameters(work))
                sizes, debt = choose(scores, may_shrink, budget, debt=self._debt)
                if recipe.sequential_scoring:
                    metric = metrics_of(work, seed=recipe.seed + work.iteration)[0]
                    scores |= score_sequentially(
                        model, work.axes, sizes, batches, metric=metric, known=scores, task=work.task, dtype=recipe.dtype
                    )
                scores |= _head_scores(work, sizes, batches, **where)
                mask = Mask.of_sizes(may_shrink, scores, sizes)
            if mask.num_removed() == 0:
                raise RunError(
                    f"{recipe.chooser} finds nothing more to remove at {now:,} parameters, above the target {target:,}; raise "
                    "the budget, or add to axes"
                )
            repaired(work, mask, batches, **where)
            self._debt = debt.after(mask)
            told = {
                "sizes": sizes,
                "distances": scores["layers"].tolist() if "layers" in scores else None,
                "blocks": {axis.name: float(scores[axis.name]) for axis in may_shrink if axis.modules},
                "scores": cut_line(may_shrink, scores, mask),
                "used": {axis.name: scores[used(axis)].tolist() for axis in may_shrink if used(axis) in scores} or None,
            }
            yield Change(mask, loss, told)

    def _carried(self, work: Work) -> Debt:
        """The debt with which this stage begins or goes on."""
        stage, self._stage = self._stage, work.state.stage
        if self._debt is None or (work.recipe.debt == "reset" and stage != self._stage):
            return Debt.none(prunable(work))
        return self._debt

    def state(self) -> dict[str, Any]:
        """The stage, and the debt that the chooser carries from one iteration to the next."""
        if self._debt is None:
            return {}
        return {"stage": self._stage, "debt": {"start": dict(self._debt.start), "sparsity": dict(self._debt.sparsity)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the stage and the debt."""
        if "debt" in state:
            self._stage, self._debt = state["stage"], Debt(**state["debt"])

    def fit(self, work: Work) -> None:
        """Add axes that are new in the recipe, without a debt."""
        if self._debt is not None:
            none = Debt.none(prunable(work))
            self._debt = Debt({**none.start, **self._debt.start}, {**none.sparsity, **self._debt.sparsity})


def _share_of(gone: int, others: int, heads: int, after: float) -> float:
    """The share s of all but heads that is gone after `gone` parameters; heads lose (s - after) / (1 - after) once s > after."""
    if gone <= after * others:
        return gone / max(1, others)
    return after + (gone - after * others) / (others + heads / (1 - after))


def removing(axes: Sequence[Axis], *, tokens: int, towers: int) -> Passes:
    """The passes of a metric that takes the units of `axes` out one by one, neurons in 8 groups, and orders neurons by gradients."""
    units = sum(8 if axis.kind == "neurons" else axis.entries for axis in axes)
    return Passes(forward=tokens * (units / towers + 1), both=tokens)


def scores_of(work: Work, batches: Sequence[Tensor], axes: Sequence[Axis] | None = None, /, **where: int) -> tuple[Scores, float]:
    """The scores of all units that may go, or of those of `axes`, and of all layers, and the mean loss, on these batches.

    Raises:
        UsageError: the metric gives no scores for a kind of axis that may shrink.
        RunError: it gives scores of another shape, or a score is not finite.
    """
    recipe, may_go = work.recipe, prunable(work) if axes is None else list(axes)
    metrics = metrics_of(work, seed=recipe.seed + where["iteration"])
    tell = work.progress("score", **where)
    scores, loss = score(work.model, scored(work), batches, metrics=metrics, task=work.task, dtype=recipe.dtype, on_batch=tell)
    if (measure := by_passes(work, "metric", on_axis=tell)) is not None:
        scores |= checked(
            measure(work.model, [axis for axis in may_go if axis.slices], batches), part=f"metric {recipe.metric!r}"
        )
    if (measure_layers := by_passes(work, "distance", on_axis=work.counts("blocks", **where))) is not None:
        scores |= checked(measure_layers(work.model, _measured_whole(work), batches), part=f"distance {recipe.distance!r}")
    if "distance" not in parts.reads("reduce", recipe.reduce):  # a search decides which blocks go, and one unit needs no rank
        scores |= {axis.name: torch.zeros(axis.entries) for axis in may_go if axis.gate.is_whole}
    _check_scored(work, {axis.kind for axis in may_go if axis.name not in scores})
    for axis in may_go:
        if scores[axis.name].shape != (axis.entries,):
            raise RunError(
                f"metric {recipe.metric!r} gives {axis.name} scores of shape {tuple(scores[axis.name].shape)}; it has "
                f"{axis.entries} units, so the shape is ({axis.entries},)"
            )
    return scores, loss


def refuse_limits(work: Work, why: str) -> None:
    """Refuse limits of the chooser that a search would not keep.

    Raises:
        UsageError: the recipe's chooser has an option `first`, `last` or `floor`.
    """
    options = parts.bind("chooser", work.recipe.chooser).keywords
    if kept := [f"{name}={options[name]}" for name in ("first", "last", "floor") if options.get(name)]:
        raise UsageError(f"{why}, so {' and '.join(kept)} of chooser {work.recipe.chooser!r} would not hold; leave that out")


def with_forward(of_metric: TextUse) -> TextUse:
    """What a metric reads, and forward passes over the same text besides."""
    return TextUse(text=True, evidence=of_metric.evidence if of_metric.text else Evidence.FORWARD, forward=True)


def _check_scored(work: Work, without: Collection[str]) -> None:
    """Refuse a metric if kinds of axis that may shrink are left `without` scores."""
    if without:
        raise UsageError(
            f"metric {work.recipe.metric!r} gives no scores for {', '.join(sorted(without))}; set metric to another, such as "
            "weights.taylor, or leave them out of axes"
        )


def repaired(work: Work, mask: Mask, batches: Sequence[Tensor], **where: int) -> None:
    """Let the recipe's repair, if it has one, prepare the weights, in place, for a cut by `mask`."""
    recipe = work.recipe
    if recipe.repair is None:
        return
    with work.state.clock("repair"):
        tell = work.progress("repair", **where)
        repair = parts.bind("repair", recipe.repair, task=work.task, dtype=recipe.dtype, warn=work.warn_of_stage, on_layer=tell)
        shapes = {name: weight.shape for name, weight in work.model.named_parameters()}
        with eval_mode(work.model):
            repair(work.model, work.axes, mask, [*batches, *work.data.own])
        _check_repaired(work, mask, shapes)


def _check_repaired(work: Work, mask: Mask, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a repair that leaves other parameters than it found, but for the biases that it declares, or NaN or infinity.

    Raises:
        RunError: it did; the run could not go on with the model, or nobody could load it.
    """
    repair, weights = work.recipe.repair or "", dict(work.model.named_parameters())
    declares = "biases" in parts.needs("repair", repair)
    for name in {*shapes, *weights}:
        before, now = shapes.get(name), weights[name].shape if name in weights else None
        if before != now and not (before is None and declares and name.endswith(".bias")):
            told = "" if before is not None else "; a repair that adds biases declares needs={'biases'}"
            raise RunError(
                f"repair {repair!r} changed the shape of {name} from {_shown(before)} to {_shown(now)}, and it may change only "
                f"values{told}"
            )
    shrinking = [axis for axis in work.axes if axis.gate.is_linear and axis.name in mask]
    for name, weight in weights.items():
        if isinstance(weight, Shelved) and not weight.changed:
            continue
        with numbers_of(weight):
            finite = weight.isfinite()
        for axis in shrinking:  # what a repair leaves in columns that go does not matter
            if name == f"{axis.gate.module}.weight":
                goes = ~mask[axis.name].repeat_interleave(axis.gate.width)
                axis.gate.oriented(finite)[:, goes.to(finite.device)] = True
        if not bool(finite.all()):
            raise RunError(f"repair {repair!r} leaves NaN or infinity in {name}; set repair=null, or to another repair")


def _shown(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _head_metric(work: Work) -> str | None:
    """The recipe's `head_metric`, if the reduction reads it; a reduction that does not ranks KV heads by the metric."""
    return work.recipe.head_metric if "head_metric" in parts.reads("reduce", work.recipe.reduce) else None


def _head_scores(work: Work, sizes: Mapping[str, int], batches: Sequence[Tensor], **where: int) -> Scores:
    """Scores of `head_metric` for the KV heads of every layer that is to lose one."""
    recipe = work.recipe
    losing = [axis for axis in prunable(work) if axis.kind == "kv_heads" and sizes[axis.name] < axis.size]
    head_metric = _head_metric(work)
    if head_metric is None or not losing:
        return {}
    give_back()  # return memory that scoring has freed, before all weights are copied
    measure = parts.bind("head_metric", head_metric, task=work.task, dtype=recipe.dtype, on_axis=work.progress("heads", **where))
    before = accumulate((batch.numel() for batch in batches), initial=0)
    enough = [batch for batch, tokens in zip(batches, before, strict=False) if tokens < HEAD_TOKENS]
    return checked(measure(work.model, losing, enough), part=f"head_metric {head_metric!r}")


def prunable(work: Work) -> list[Axis]:
    """The axes that the recipe lets shrink; `layers` has a pattern if the recipe's chooser keeps one."""
    pattern = tuple(getattr(work.model.config, "layer_types", None) or ()) if _is_periodic(work) else ()
    axes = [axis for axis in work.axes if axis.kind in work.recipe.axes]
    return [replace(axis, pattern=pattern) if axis.kind == "layers" else axis for axis in axes]


def _is_periodic(work: Work) -> bool:
    return bool(parts.bind("chooser", work.recipe.chooser).keywords.get("periodic"))


def scored(work: Work) -> list[Axis]:
    """The axes that metrics score: those that may shrink, and `layers`. Only the parameters of these axes get gradients."""
    return [axis for axis in work.axes if axis.kind in work.recipe.axes or axis.kind == "layers"]


def _measured_whole(work: Work) -> list[Axis]:
    """The axes whose units a distance with passes of its own shuts one by one: those that may go whole, else `layers`."""
    return [axis for axis in prunable(work) if axis.gate.is_whole] or [axis for axis in work.axes if axis.kind == "layers"]


def metrics_of(work: Work, *, seed: int) -> list[Metric]:
    """The metrics that share one calibration pass: the recipe's metric, and its distance if it has no passes of its own."""
    recipe = work.recipe
    metrics: list[Metric] = []
    if set(recipe.axes) - set(WHOLE) and by_passes(work, "metric") is None:
        metrics.append(parts.bind("metric", recipe.metric, seed=seed, task=work.task))
    if recipe.distance is not None and by_passes(work, "distance") is None:
        metrics.append(parts.bind("distance", recipe.distance))
    if "experts" in recipe.axes and "text" in parts.needs("metric", recipe.metric):
        metrics.append(usage)
    return metrics


def by_passes(work: Work, key: Literal["metric", "distance"], **told: Callable[[int, int], None]) -> Callable[..., Scores] | None:
    """The recipe's metric or distance if it makes passes of its own, as `blocks.loss_drop` does; None if it shares the pass of all."""
    name = getattr(work.recipe, key)
    if name is None:
        return None
    measure = parts.bind(key, name, task=work.task, dtype=work.recipe.dtype, **told)
    return None if inspect.isgeneratorfunction(measure) else measure


def evidence_of(work: Work, metrics: Sequence[Metric] | None = None) -> Evidence:
    """The most evidence that `metrics` need; by default those of `metrics_of`, or a metric with passes of its own."""
    if metrics is None and by_passes(work, "metric") is not None:
        return Evidence.GRADIENTS
    return evidence_needed(work.model, scored(work), metrics_of(work, seed=0) if metrics is None else metrics)


def repair_parameters(work: Work) -> int:
    """Number of bias parameters that the repair will add to the model."""
    repair = work.recipe.repair
    if repair is None or "biases" not in parts.needs("repair", repair):
        return 0
    return sum(int(module.weight.shape[0]) for module in without_bias(work.model, work.axes))


def within_widths(work: Work, choose: Callable[..., Any]) -> Callable[..., tuple[dict[str, int], Debt]]:
    """Wrap a chooser so that its sizes have the widths that the recipe allows; it is called like any chooser."""
    multiple_of, equal = work.multiple_of, work.recipe.equal_widths

    def fitted(scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt) -> tuple[dict[str, int], Debt]:
        sizes = {axis.name: axis.size for axis in axes}
        # Rounding would give back neurons taken below `multiple_of` each time, and the chooser would never get to the heads.
        if free := [axis for axis in axes if axis.kind != "neurons" or axis.size > multiple_of]:
            try:
                wanted, debt = choose(scores, free, budget, debt=debt)
            except (ValueError, ArithmeticError) as error:
                if isinstance(error, UsageError):
                    raise
                raise RunError(f"chooser {work.recipe.chooser!r} fails: {first_line(error)}") from error
            _check_chosen(wanted, debt, free, chooser=work.recipe.chooser)
            sizes |= wanted
        if multiple_of > 1 or equal:
            sizes = fitting(sizes, axes, scores=scores, multiple_of=multiple_of, equal_widths=equal)
        elif sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes) >= budget.excess:
            sizes = levelled(sizes, work.axes)
        return alike_experts(sizes, axes, scores=scores), debt

    return fitted


def _check_chosen(sizes: Mapping[str, Any], debt: Debt, axes: Sequence[Axis], *, chooser: str) -> None:
    """Refuse what no chooser may return: sizes of other axes, sizes that the axis cannot have, or a debt that is no number.

    Raises:
        RunError: it returned that.
    """
    named = {axis.name: axis for axis in axes}
    for name, size in sizes.items():
        if name not in named:
            raise RunError(f"chooser {chooser!r} gives a size for {name}, which is not among the axes that it was given")
        least, most = named[name].least, named[name].size
        if type(size) is not int or not least <= size <= most:
            raise RunError(f"chooser {chooser!r} gives {name} the size {size!r}; a size is a Python int from {least} to {most}")
    for name, share in debt.sparsity.items():
        if not math.isfinite(share):
            raise RunError(f"chooser {chooser!r} gives {name} the debt {share}; a debt is a share from 0 to 1")


def params_of(work: Work, axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    """The number of parameters of the model with these sizes of `axes`; it does not depend on which units stay."""
    return num_left(work.model, work.axes, mask_to(axes, sizes))


def mask_to(axes: Sequence[Axis], sizes: Mapping[str, int]) -> Mask:
    """Some mask that leaves these sizes."""
    return Mask.of_sizes(axes, {axis.name: torch.zeros(axis.entries) for axis in axes}, sizes)


def sizes_alike(work: Work, *, keep: int) -> dict[str, int]:
    """The sizes that the recipe's chooser reaches for `keep` parameters, or as near as it may, if all scores are equal."""
    whole = left = prunable(work)
    choose = within_widths(work, parts.bind("chooser", work.recipe.chooser, step=1.0, amplitude=0.0))
    total = work.num_params
    reached, debt = {axis.name: axis.size for axis in left}, Debt.none(left)
    while not keep or total > keep:
        if not keep:  # axes can cost more than the model has, since a channel and a neuron both count a weight that they share
            total = max(total, sum(axis.size * axis.cost for axis in left))
        alike = {axis.name: torch.zeros(axis.entries) for axis in (*work.axes, *left)}
        sizes, debt = choose(alike, left, Budget(keep=keep, total=total), debt=debt)
        if all(sizes[axis.name] == axis.size for axis in left):
            break
        reached |= sizes
        # Counted in the model: the costs of the axes count a weight twice that a channel and a neuron share.
        total = num_left(work.model, work.axes, mask_to(whole, reached))
        stay = {
            axis.name: sizes.get(axis.name, axis.size) for axis in whole if axis.kind == "layers"
        }  # of equal layers the first
        gone = {name for name, size in sizes.items() if size == 0}
        staying = [axis for axis in left if axis.layer is None or axis.layer < stay.get(f"{tower_of(axis.name)}layers", math.inf)]
        staying = [axis for axis in staying if not gone & {axis.name, *axis.enclosing}]
        left = [
            replace(axis, size=sizes[axis.name], costs=axis.costs[: sizes[axis.name]], pattern=axis.pattern[: sizes[axis.name]])
            for axis in staying
        ]
    return reached
