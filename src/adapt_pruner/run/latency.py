"""A budget in time: the parameters that a model may keep so that it takes a given share of the dense model's seconds.

For every kind of axis the whole model is timed at several widths, with all layers cut alike, alternating with the dense model.
Between two widths the time is assumed to be linear. The savings of two kinds are added. A layer's share of its kind's saving is
its share of the kind's parameters. Embedding, head and norms are in every measurement and are never cut.

    time(sizes) / time(dense) = 1 - sum over kinds of sum over axes a of weight_a · (1 - table[kind](size_a / dense size of a))

Whole models are timed, because the weights of a single layer that runs again and again would stay in the processor's cache.
"""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events import Listener, Progress
from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.precision import cast_weights, uses_bfloat16
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.speed import reading_and_writing
from adapt_pruner.recipe import Recipe, parse_latency
from adapt_pruner.reduce.units import mask_to, params_of, prunable, sizes_alike
from adapt_pruner.work import Work

PROMPT = 512
"""Tokens of the prompt. `prefill` times reading it, `decode` times writing `WRITTEN` tokens after it."""
WRITTEN = 16
ROUNDS = 5
SHARES = (0.75, 0.5, 0.25)
"""Widths that are timed, as shares of the dense width; the dense width and the least possible width are timed too."""

Table = dict[str, list[tuple[float, float]]]
"""kind of axis -> (share of the units kept, seconds as a share of the dense model's), shares rising to 1."""


def budget_for(work: Work) -> dict[str, Any]:
    """The number of parameters to keep for the recipe's latency, by a table that is measured here and now.

    Args:
        work: the run, with its model before any pruning.

    Returns:
        `latency`: `asked`, `of`, `params` to keep, `predicted` share of the dense model's seconds, `table`; and
        `measuring_seconds`, about how long `measured` will take. Empty if the recipe has no latency.

    Raises:
        UsageError: the latency is out of reach; the message names the least that can be reached.
    """
    recipe = work.recipe
    if not recipe.latency:
        return {}
    share, axes = parse_latency(recipe.latency), prunable(work)
    if float(recipe.latency.rstrip(" x")) > 1:
        work.warn(
            f"latency {recipe.latency} is taken as that many times as fast, which is {share:.3g}x of the dense model's time"
        )
    began = time.perf_counter()
    table = table_of(work)
    round_of_two = (time.perf_counter() - began) / max(1, sum(len(points) - 1 for points in table.values())) / (ROUNDS + 1)
    least = sizes_alike(work, keep=0)
    nearest = predicted(table, axes, least)
    if nearest > share:
        raise UsageError(
            f"latency {recipe.latency} is out of reach: {recipe.latency_of} takes {nearest:.2f}x of the dense model's time once "
            f"{recipe.chooser} has removed all that it may; ask for {np.ceil(nearest * 100 + 1e-9) / 100:.2f}x or more"
        )
    low, high = params_of(work, axes, least), work.num_params
    while high - low > max(1, high // 10_000):
        middle = (low + high) // 2
        within = predicted(table, axes, sizes_alike(work, keep=middle)) <= share
        low, high = (middle, high) if within else (low, middle)
    foretold = predicted(table, axes, sizes_alike(work, keep=low))
    figures = {"asked": share, "of": recipe.latency_of, "params": low, "predicted": foretold, "table": table}
    return {"latency": figures, "measuring_seconds": round_of_two * (2 * ROUNDS + 1)}


def params_to_keep(recipe: Recipe, figures: Mapping[str, Any]) -> int | None:
    """The number of parameters that `budget_for` found when the run began; None if the recipe has a budget instead.

    Raises:
        UsageError: the run began with another latency, or with none.
    """
    if not recipe.latency:
        return None
    latency = figures.get("latency", {"asked": None, "of": None})
    if (latency["asked"], latency["of"]) != (parse_latency(recipe.latency), recipe.latency_of):
        raise UsageError(
            f"latency {recipe.latency} of {recipe.latency_of} has to be measured on the dense model, but the run was started "
            "without it; leave latency as it was, set a budget, or name another folder"
        )
    params: int = latency["params"]
    return params


def measured(work: Work) -> dict[str, Any]:
    """The latency of the pruned model, timed in turn with the dense model; empty if the recipe has no latency.

    Returns:
        `latency`: what `budget_for` found, and `reached`, the median share of the dense model's seconds, with its quartiles
        `reached_low` and `reached_high`, and `dense_seconds`.
    """
    recipe = work.recipe
    if not recipe.latency:
        return {}
    device = next(work.model.parameters()).device
    dense = _as_it_runs(load(recipe.model, device=device, trust_remote_code=work.trust_remote_code).model, recipe)
    pruned = _as_it_runs(copy.deepcopy(work.model), recipe)
    shares, seconds = _in_turn(dense, pruned, recipe, rounds=2 * ROUNDS, listen=work.listen)
    low, median, high = statistics.quantiles(shares, n=4, method="inclusive")
    now = {"reached": median, "reached_low": low, "reached_high": high, "dense_seconds": seconds}
    return {"latency": {**work.state.figures["latency"], **now}}


def table_of(work: Work) -> Table:
    """Time the model at several widths of each kind of axis, as shares of its own time; the model is left as found."""
    recipe = work.recipe
    dense = _as_it_runs(copy.deepcopy(work.model), recipe)
    axes = prunable(work)
    table: Table = {}
    for kind in sorted({axis.kind for axis in axes}):
        of_kind = [axis for axis in axes if axis.kind == kind]
        points = {1.0: 1.0}
        for share in (*SHARES, 0.0):
            sizes = {axis.name: _width(axis, share, work.multiple_of) for axis in of_kind}
            share_left = sum(sizes.values()) / sum(axis.size for axis in of_kind)
            if share_left in points:
                continue
            work.tell(Progress(phase="time", what=f"{share_left:.0%} of {kind}", done=len(points), of=len(SHARES) + 1))
            smaller = copy.deepcopy(dense)
            cut(smaller, families.axes(smaller), mask_to(of_kind, sizes))
            points[share_left] = statistics.median(_in_turn(dense, smaller, recipe, rounds=ROUNDS)[0])
        table[kind] = sorted(points.items())
    return table


def predicted(table: Table, axes: Sequence[Axis], sizes: Mapping[str, int]) -> float:
    """The share of the dense model's seconds that a model of these sizes takes, predicted by the table.

    Args:
        table: of `table_of`.
        axes: of the dense model.
        sizes: axis name -> units kept.
    """
    saved = 0.0
    for kind, points in table.items():
        of_kind = [axis for axis in axes if axis.kind == kind]
        whole = sum(axis.size * axis.cost for axis in of_kind)
        shares, times = zip(*points, strict=True)
        for axis in of_kind:
            time = float(np.interp(sizes[axis.name] / axis.size, shares, times))
            saved += axis.size * axis.cost / whole * (1 - time)
    return 1 - saved


def _width(axis: Axis, share: float, multiple: int) -> int:
    """A width near a share of an axis, as a chooser leaves it: a multiple of `multiple`, else an odd number of neurons."""
    if axis.kind != "neurons":
        return max(1, round(share * axis.size))
    if multiple > 1:
        return max(min(multiple, axis.size), round(share * axis.size / multiple) * multiple)
    return min(axis.size, int(share * axis.size) | 1)


def _as_it_runs(model: Any, recipe: Recipe) -> Any:
    """Bring the model, in place, to eval mode and its weights to the precision of matrix products; returns it."""
    narrow = uses_bfloat16(next(model.parameters()).device, recipe.dtype)
    cast_weights(model, torch.bfloat16 if narrow else torch.float32)
    return model.eval().requires_grad_(False)


def _in_turn(
    dense: Any, pruned: Any, recipe: Recipe, *, rounds: int, listen: Listener = lambda event: None
) -> tuple[list[float], float]:
    """For each round the pruned model's seconds as a share of the dense model's; and the dense model's median seconds."""
    decode = recipe.latency_of == "decode"
    size = min(model.get_input_embeddings().weight.shape[0] for model in (dense, pruned))
    ids: Tensor = torch.randint(size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    shares, seconds = [], []
    for round_idx in range(rounds + 1):
        listen(Progress(phase="time", what="the result", done=round_idx, of=rounds))
        dense_seconds, pruned_seconds = (
            reading_and_writing(model, ids, WRITTEN if decode else 0)[decode] for model in (dense, pruned)
        )
        if round_idx:  # the first round is slow
            shares.append(pruned_seconds / dense_seconds)
            seconds.append(dense_seconds)
    return shares, statistics.median(seconds)
