"""Repairs in closed form: change the linear layers at the gates to make up for the inputs that a cut removes.

Symbols: W the weight of the linear layer at a gate, [outputs, features]; x its input, X the inputs at all N calibration tokens,
[features, N]; k the features that stay, r those that go, as column indices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.gram import add_gram, complete
from adapt_pruner.core.model.hooks import watching_inputs
from adapt_pruner.core.model.layers import Stream, decoder_layers, streams
from adapt_pruner.core.model.shelf import at_hand, fetched
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.repair.factors import rescale_blocks

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The ridges to choose from."""

FALLBACK = 1.0
"""The ridge if the text is too short to choose one, or too short for a ridge of 0."""

ROWS = 256
"""Rows of a float32 matrix that are read in float64 at one time."""

_ROUNDING = 1e-6  # for features scaled to length 1: smaller values are float32 rounding
_HELD_OUT = 4  # every fourth batch, from the second on, is held out to choose the ridge


@part("repair", needs={"gram"})
@torch.no_grad()
def least_squares(
    model: nn.Module,
    axes: Sequence[Axis],
    mask: Mask,
    batches: Sequence[Tensor],
    *,
    ridge: Annotated[float | None, "0 or more"] = 0.3,
    sequential: bool = False,
    factors: Annotated[int, "0 or more"] = 0,
    task: Task = CAUSAL_LM,
    dtype: str = "auto",
    warn: Callable[[str], None] = lambda message: None,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Change the remaining columns, in place, to bring their output as near as possible to that of all columns (least squares).

    W'_k minimises  ‖W' Z_k - W X‖² + λ ‖W' - W_k‖²,  which is

        W'_k = W_k + (W X Z_kᵀ - W_k Z_k Z_kᵀ) (Z_k Z_kᵀ + λI)⁻¹        λ = ridge · mean diagonal of Z_k Z_kᵀ

    Z is X. With `sequential`, Z is the input that comes from the already pruned and repaired layers below; X always comes from
    the unchanged model. The ridge pulls towards the remaining weights W_k, not towards zero: with λ → ∞ nothing changes. With
    Z = X this is W_k + W_r H_rk (H_kk + λI)⁻¹, H = X Xᵀ. Decoder layers are repaired one after the other, so memory holds the
    matrices of one of them at a time.

    Args:
        model: causal LM; the weights of the linear layers at gates that `mask` shuts change.
        axes: its axes.
        mask: the cut that follows.
        batches: token ids, int64 [batch, length].
        ridge: as a multiple of the mean diagonal. None chooses one of `RIDGES` for each layer, by the error on every fourth
            batch, which the trial fits do not see; with a single batch it takes `FALLBACK`. With fewer tokens than features, the
            ridge is multiplied by features / tokens; a ridge of 0 becomes `FALLBACK` times that. `warn` is told of both cases.
        sequential: let each layer also make up for its changed inputs from the pruned layers below; two to three times the work.
        factors: number of Gauss-Newton steps after the least squares, on one factor for each attention and MLP
            (`reduce.repair.factors.rescale_blocks`).
        task: what the model learns.
        dtype: precision of the matrix products of the model; the systems are solved in float64.
        warn: told when there are too few tokens for a ridge, or for factors.
        on_layer: told (done, of) after each layer; a Gauss-Newton step counts as much as all layers.

    Raises:
        UsageError: no batches.

    Source: ours, from ordinary ridge regression. SparseGPT (arXiv:2301.00774) and ZipLM (arXiv:2302.04089) also reconstruct
    each layer's output; FISTAPruner (arXiv:2408.03728) also takes inputs of the pruned model on one side only.
    """
    _need_text(batches)
    if ridge is None and len(batches) < 2:
        ridge = FALLBACK
        warn(
            f"{sum(batch.numel() for batch in batches):,} calibration tokens make one batch, and choosing a ridge takes two; "
            f"the ridge is {ridge:g}; set calibration.samples higher"
        )
    mine, numbers = world.share(batches), world.share(range(len(batches)))
    layers = decoder_layers(model)
    entering = streams(model, mine, task=task, dtype=dtype)
    without = Mask(
        {axis.name: mask[axis.name] for axis in axes if axis.layer is None and axis.name in mask and axis.gate.kind != "logits"}
    )
    with gated(model, axes, without):
        pruned = streams(model, mine, task=task, dtype=dtype) if sequential else entering
    tokens = torch.tensor(float(sum(batch.numel() for batch in mine)), dtype=torch.float64)
    world.sum_in_place(tokens)
    short, work = 1.0, len(layers) * (1 + factors)
    for index, layer in enumerate(layers):
        with fetched(layer):
            kept, weights = _kept(axes, mask, layer=index), _weights(model, axes, layer=index)
            fits = {name: _Fit(weights[name], keep, hold_out=ridge is None, sequential=sequential) for name, keep in kept.items()}
            if sequential:
                in_layer = {axis.name: mask[axis.name] for axis in axes if axis.layer == index and axis.name in mask}
                shut = partial(gated, model, axes, Mask({**without.kept, **in_layer}))
                solved = _fit_behind_pruned(model, layer, index, fits, entering, pruned, numbers, shut=shut)
            else:
                solved = _fit_alone(model, layer, index, fits, entering, numbers)
            for fit in solved:
                short = max(short, fit.apply(ridge, tokens=float(tokens)))
        on_layer(index + 1, work)
    if short > 1:
        raised = (
            f"their ridge is {FALLBACK:g} times that factor instead of 0"
            if ridge == 0
            else "their ridge was raised by the same factor"
        )
        warn(
            f"{float(tokens):,.0f} calibration tokens are few for a repair of layers with up to {short:.1f} times as many inputs; "
            f"{raised}; set calibration.samples higher"
        )
    if factors:
        entering, pruned = [], []  # frees the hidden states of the whole text
        rescale_blocks(
            model, axes, mask, batches, steps=factors, task=task, dtype=dtype, warn=warn,
            tell=lambda share: on_layer(len(layers) + round(share * (work - len(layers))), work),
        )  # fmt: skip


def _fit_alone(
    model: nn.Module, layer: nn.Module, index: int, fits: Mapping[str, "_Fit"], entering: Sequence[Stream], numbers: Iterable[int]
) -> Iterator["_Fit"]:
    """Show each fit the inputs of the unchanged model in a decoder layer, move its streams on, and yield the fits to be solved."""
    with at_hand(layer):
        for number, stream in zip(numbers, entering, strict=True):
            with _watching(model, fits) as seen:
                stream.hidden = stream.through(layer, index)
            for name, fit in fits.items():
                fit.add(seen[name], None, number)
    yield from fits.values()


def _fit_behind_pruned(
    model: nn.Module,
    layer: nn.Module,
    index: int,
    fits: Mapping[str, "_Fit"],
    entering: Sequence[Stream],
    pruned: Sequence[Stream],
    numbers: Sequence[int],
    *,
    shut: Callable[[], AbstractContextManager[None]],
) -> Iterator["_Fit"]:
    """The same with `sequential`: the caller solves each fit before the next one sees its inputs behind the repaired layers.

    Args:
        model: the model.
        layer: the decoder layer.
        index: its number.
        fits: by the name of the linear layer at the gate.
        entering: the streams of the unchanged model that enter the layer; they are moved on.
        pruned: those of the pruned and repaired model; they are moved on once all fits are solved.
        numbers: of the batches that the streams belong to.
        shut: the context in which all that goes in this layer, and in the whole model, is shut.
    """
    inputs: list[dict[str, Tensor]] = []
    with at_hand(layer):
        for stream in entering:
            with _watching(model, fits) as seen:
                stream.hidden = stream.through(layer, index)
            inputs.append(seen)
    for name, fit in fits.items():
        with shut(), at_hand(layer):
            for number, stream, before in zip(numbers, pruned, inputs, strict=True):
                with _watching(model, [name]) as seen:
                    stream.through(layer, index)
                fit.add(before[name], seen[name], number)
        yield fit
    with shut(), at_hand(layer):
        for stream in pruned:
            stream.hidden = stream.through(layer, index)


class _Fit:
    """The normal equations of the linear layer at one gate, and their solution.

    Each part of the text has two float32 sums: Z_k Z_kᵀ, and the rows of X Z_kᵀ for r; with `sequential`, for all features. They
    are read in slices, and the system is factored and solved in place, so a solution takes little beside one float64 matrix.
    """

    def __init__(self, weight: Tensor, keep: Tensor, *, hold_out: bool, sequential: bool) -> None:
        self.weight = weight
        self.keep = keep.to(self.weight.device)
        self.crossed = torch.ones_like(self.keep) if sequential else ~self.keep
        self.sequential = sequential
        stays = int(keep.sum())
        self.parts = [  # one to fit, one held out
            [weight.new_zeros(side, stays, dtype=torch.float32) for side in (stays, int(self.crossed.sum()))]
            for _ in range(1 + hold_out)
        ]

    def add(self, whole: Tensor, pruned: Tensor | None, number: int) -> None:
        """Add the layer's input in batch `number`, before and after pruning: [tokens, features]; None if both are the same."""
        square, cross = self.parts[len(self.parts) > 1 and number % _HELD_OUT == 1]
        stays = (whole if pruned is None else pruned)[:, self.keep]
        add_gram(square, stays)
        cross.addmm_((whole if self.sequential else whole[:, self.crossed]).t(), stays)

    def apply(self, ridge: float | None, *, tokens: float) -> float:
        """Change the layer's weight, in place, and drop the sums; returns the features per token, 1 if there are enough tokens."""
        for sums in self.parts:
            world.sum_in_place(*sums)
            complete(sums[0])
        short = max(1.0, self.keep.numel() / tokens)
        if ridge is None:
            ridge = self._chosen()
        elif ridge == 0 and short > 1:
            ridge = FALLBACK
        change = self._missing(*self.parts)
        _solve(partial(self._square, *self.parts), change, ridge * short)
        for rows, of_rows in zip(self.weight.split(ROWS), change.split(ROWS), strict=True):
            rows[:, self.keep] = (rows[:, self.keep].double() + of_rows).to(rows.dtype)
        self.parts = []
        return short

    def _square(self, *parts: list[Tensor]) -> Tensor:
        """Z_k Z_kᵀ of these parts: float64, column by column, which LAPACK factors in place."""
        total = torch.zeros_like(parts[0][0], dtype=torch.float64).t()
        for square, _ in parts:
            for rows, of_rows in zip(total.split(ROWS), square.split(ROWS), strict=True):
                rows += of_rows.double()
        return total

    def _missing(self, *parts: list[Tensor]) -> Tensor:
        """W X Z_kᵀ - W_k Z_k Z_kᵀ of these parts, float64 [outputs, those that stay]; W_r X_r Z_kᵀ if Z is X."""
        missing = self.weight.new_zeros(len(self.weight), int(self.keep.sum()), dtype=torch.float64)
        for square, cross in parts:
            for sums, features, sign in ((cross, self.crossed, 1), (square, self.keep, -1))[: 1 + self.sequential]:
                for rows, columns in zip(sums.split(ROWS), features.nonzero().flatten().split(ROWS), strict=True):
                    missing.addmm_(self.weight[:, columns].double(), rows.double(), alpha=sign)
        return missing

    def _chosen(self) -> float:
        """The ridge whose fit has the least error on the held-out batches, ‖(W'_k - W_k) Z_k - (W X - W_k Z_k)‖²."""
        fitted, held_out = self.parts
        missing, wanted = self._missing(fitted), self._missing(held_out)

        def error(ridge: float) -> float:
            change = missing.clone()
            _solve(partial(self._square, fitted), change, ridge)
            slices = zip(held_out[0].split(ROWS), change.split(ROWS, dim=1), wanted.split(ROWS, dim=1), strict=True)
            return sum(float(((change @ rows.double().t() - 2 * goal) * columns).sum()) for rows, columns, goal in slices)

        return min(RIDGES, key=error)


def _solve(square: Callable[[], Tensor], missing: Tensor, ridge: float) -> None:
    """Replace `missing`, in place, by missing · (square + λI)⁻¹, λ = ridge · mean diagonal; directions without data get 0.

    Whether a direction has data is judged with every feature scaled to length 1, so that a very large one does not hide the
    others. `square` makes the matrix, which the factors overwrite.
    """

    def shifted() -> Tensor:
        made = square()
        made.diagonal().add_(ridge * float(made.diagonal().mean()))
        return made

    factor, columns = shifted(), missing.t()
    scale = torch.where(factor.diagonal() > 0, factor.diagonal(), torch.ones_like(factor.diagonal())).sqrt()
    failed = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if not int(failed) and bool((factor.diagonal() > _ROUNDING**0.5 * scale).all()):
        torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(factor.t(), columns, upper=True, out=columns)
        return
    del factor
    values, vectors = torch.linalg.eigh(shifted() / scale / scale[:, None])
    has_data = values > _ROUNDING * float(values.max())
    inverse = torch.where(has_data, 1 / torch.where(has_data, values, torch.ones_like(values)), torch.zeros_like(values))
    missing.copy_(((missing / scale @ vectors) * inverse) @ vectors.t() / scale)


@part("repair", needs={"biases"})
@torch.no_grad()
def mean_bias(
    model: nn.Module,
    axes: Sequence[Axis],
    mask: Mask,
    batches: Sequence[Tensor],
    *,
    task: Task = CAUSAL_LM,
    dtype: str,
) -> None:
    """Add the mean contribution of the removed features, in place, to the bias of their layer: b ← b + W_r · mean(x_r).

    If these layers have no bias, they get one in all decoder layers, and `config.output_bias` says so. New biases count as
    parameters.

    Args:
        model: causal LM.
        axes: its axes.
        mask: the cut that follows.
        batches: token ids, int64 [batch, length].
        task: what the model learns.
        dtype: precision of the matrix products of the model.

    Raises:
        UsageError: no batches.

    Source: FLAP, arXiv:2312.11983, its bias compensation; the mean is over all calibration tokens.
    """
    _need_text(batches)
    layers = decoder_layers(model)
    entering = streams(model, world.share(batches), task=task, dtype=dtype)
    count = torch.tensor(float(sum(batch.numel() for batch in world.share(batches))), dtype=torch.float64)
    world.sum_in_place(count)
    module: Any
    for module in without_bias(model, axes):
        module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
        model.config.output_bias = True  # type: ignore[union-attr]
    for index, layer in enumerate(layers):
        with fetched(layer):
            kept, weights = _kept(axes, mask, layer=index), _weights(model, axes, layer=index)
            sums = {name: weights[name].new_zeros(kept[name].numel(), dtype=torch.float64) for name in kept}
            with at_hand(layer):
                for stream in entering:
                    with _watching(model, kept) as seen:
                        stream.hidden = stream.through(layer, index)
                    for name in kept:
                        sums[name] += seen[name].sum(dim=0, dtype=torch.float64)
            world.sum_in_place(*sums.values())
            for name, total in sums.items():
                module = model.get_submodule(name)
                goes = ~kept[name].to(total.device)
                module.bias += (weights[name][:, goes].double() @ (total[goes] / float(count))).to(module.bias.dtype)


def without_bias(model: nn.Module, axes: Sequence[Axis]) -> list[Any]:
    """The linear layers at gates that have no bias; `mean_bias` gives them one."""
    modules: list[Any] = [
        model.get_submodule(name) for name in dict.fromkeys(axis.gate.module for axis in axes if axis.gate.is_linear)
    ]
    return [module for module in modules if module.bias is None]


def _weights(model: nn.Module, axes: Sequence[Axis], *, layer: int) -> dict[str, Tensor]:
    """The weight of the linear layer at each gate of a decoder layer, [outputs, features], by its name; a view, to be changed in place."""
    gates = [axis.gate for axis in axes if axis.layer == layer and axis.gate.is_linear]
    return {gate.module: gate.oriented(model.get_parameter(f"{gate.module}.weight")) for gate in gates}


def _kept(axes: Sequence[Axis], mask: Mask, *, layer: int) -> dict[str, Tensor]:
    """Linear layers at those gates of a decoder layer that the mask shuts in part -> the features that stay, bool [features]."""
    kept: dict[str, Tensor] = {}
    for axis in axes:
        if axis.layer == layer and axis.gate.is_linear and axis.name in mask and not bool(mask[axis.name].all()):
            features = mask[axis.name].repeat_interleave(axis.gate.width)
            kept[axis.gate.module] = kept[axis.gate.module] & features if axis.gate.module in kept else features
    return kept


def _need_text(batches: Sequence[Tensor]) -> None:
    if not batches:
        raise UsageError("a repair needs calibration text and there is none; set calibration.source or calibration.ids")


@contextmanager
def _watching(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the input of each named linear layer while the context lasts: float32 [tokens, features]."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, given: Tensor) -> None:
        seen[name] = given.detach().float().flatten(0, -2)

    with watching_inputs({name: model.get_submodule(name) for name in names}, keep):
        yield seen
