"""What each unit is worth by its activations X, the inputs of the linear layer at its axis's gate.

Symbols: x_ntj is feature j of X at token t of sequence n; N sequences; W the weight of that linear layer, [outputs, features].
Sums over text are kept in float64, one or two numbers per feature. Axes without such a layer (`layers`, `residual`) are skipped.
Only `magnitude` scores `residual`, by the outputs of the norms in the layers.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.shelf import numbers_of
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.score.calibrate import Evidence


@part("metric", needs={"text", "inputs"})
def wanda(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Weights times activations: the mean of |W_ij| · ‖X_j‖₂ over the outputs i, summed over the features j of a unit (Wanda-sp).

    ‖X_j‖₂ = √( Σ_nt x_ntj² ), over all calibration tokens.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative.

    Source: Wanda, arXiv:2306.11695, in the structured form that FLAP (arXiv:2312.11983) compares with. Differs: the released
    code divides the squares by N, which does not change the ranking. That code also measures each layer on the output of the
    already pruned layers below it; this metric does so if the recipe says `sequential_scoring: true`.
    """
    axes = _watchable(axes)
    channels = yield from _weighted_norms(model, axes)
    return {axis.name: _by_unit(channels, axis).sum(dim=1).float() for axis in axes}


@part("metric", needs={"text", "inputs"})
def fluctuation(
    model: nn.Module,
    axes: Sequence[Axis],
    *,
    form: Literal["WIFV", "IFV", "WIFN"] = "WIFV",
    authors_mean: bool = False,
    standardised: bool = False,
) -> Generator[Evidence, None, Scores]:
    """How much a unit's features vary over the text, times the weights that read them; needs no gradient (FLAP).

    For feature j, with x̄_j the mean over all tokens:

        IFV     V_j = Σ_nt (x_ntj - x̄_j)² / (N - 1)
        WIFV    V_j · Σ_i W_ij²
        WIFN    mean_i |W_ij| · ‖X_j‖₂

    A neuron scores its feature's value. A unit of several features, a head, scores the mean of its features' squared values.

    Args:
        form: `WIFV`, `IFV` or `WIFN`.
        authors_mean: for reproduction. The released code updates its running mean in place. So it uses only the new mean M_n
            (of sequences 1 to n), and the first sequence adds nothing:
            V_j = Σ_{n>1} (n - 1) / n · Σ_t (x_ntj - M_nj)² / (N - 1).
        standardised: bring the values of an axis's features to mean 0 and standard deviation 1, before the mean over a head's
            features. The authors do so for thresholds across layers; scores are then comparable between axes.

    Returns:
        axis name -> float32 [axis.entries] on the CPU; non-negative unless standardised.

    Raises:
        UsageError: fewer than two sequences; `authors_mean` with WIFN, which has no mean, or in several
            processes, which do not see the sequences in their order.

    Source: FLAP, arXiv:2312.11983, the authors' metrics of these names. Their code assumes heads of 128 features with one KV head
    each. Here a unit's features are those of its gate, so that a KV head counts the features of all its query heads.
    """
    if authors_mean and form == "WIFN":
        raise UsageError("fluctuation form 'WIFN' has no mean for authors_mean to act on; leave authors_mean out")
    if authors_mean and world.size() > 1:
        raise UsageError(
            f"fluctuation with authors_mean depends on the order of the sequences, which {world.size()} processes share out; "
            "run it in one process, or leave authors_mean out"
        )
    axes = _watchable(axes)
    if form == "WIFN":
        channels = yield from _weighted_norms(model, axes)
    else:
        channels = yield from (_authors_variances if authors_mean else _variances)(model, axes)
    if form == "WIFV":
        channels = {name: channel * _columns(model, axes, name).square().sum(dim=0).cpu() for name, channel in channels.items()}
    scores: Scores = {}
    for axis in axes:
        values = _by_unit(channels, axis)
        if axis.gate.width > 1:
            values = values.square()
        if standardised:
            values = values - values.mean()
            values = values / values.std(correction=min(1, values.numel() - 1)).clamp_min(torch.finfo(values.dtype).tiny)
        scores[axis.name] = values.mean(dim=1).float()
    return scores


@part("metric", needs={"text"})
def magnitude(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Size of a unit's activations: the mean of |x| over a sequence, then the L2 norm over sequences and features (Minitron).

    score[u] = √( Σ_{j ∈ u} Σ_n ( mean_t |x_ntj| )² )

    For a channel of the stream (`residual`), x is the output of a norm, and the score is the sum over the norms in the layers.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative.

    Source: Minitron, arXiv:2407.14679, as NVIDIA's Model-Optimizer computes it; that leaves the last norm out, too. Differs:
    norms after a block (Gemma 3) count. KV heads, which Model-Optimizer does not score, have the features of their query heads.
    """
    axes = [axis for axis in axes if axis.slices and axis.gate.kind != "logits"]
    squares = _zeros(model, axes)

    def look(name: str, seen: Tensor) -> None:
        squares[name] += seen.abs().mean(dim=1, dtype=torch.float64).square().sum(dim=0)

    with _looking(model, squares, look):
        yield Evidence.FORWARD
    world.sum_in_place(*squares.values())
    by_unit = {axis.name: [_by_unit(squares, axis, name).sum(dim=1).sqrt() for name in _at(axis)] for axis in axes}
    return {name: torch.stack(scores).sum(dim=0).float() for name, scores in by_unit.items()}


def _weighted_norms(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, dict[str, Tensor]]:
    """mean_i |W_ij| · ‖X_j‖₂ of every feature j: name of the linear layer -> float64 [features] on the CPU."""
    squares = _zeros(model, axes)

    def look(name: str, entering: Tensor) -> None:
        squares[name] += entering.square().sum(dim=(0, 1), dtype=torch.float64)

    with _looking(model, squares, look):
        yield Evidence.FORWARD
    world.sum_in_place(*squares.values())
    return {name: square.sqrt().cpu() * _columns(model, axes, name).abs().mean(dim=0).cpu() for name, square in squares.items()}


def _variances(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, dict[str, Tensor]]:
    """Σ_nt (x_ntj - x̄_j)² / (N - 1) of every feature j: name of the linear layer -> float64 [features] on the CPU."""
    sums, squares = _zeros(model, axes), _zeros(model, axes)
    counts = {name: torch.zeros(2, dtype=torch.float64) for name in sums}  # sequences and tokens

    def look(name: str, entering: Tensor) -> None:
        wide = entering.double()  # rounding must not spoil the difference of squares below
        sums[name] += wide.sum(dim=(0, 1))
        squares[name] += wide.square().sum(dim=(0, 1))
        counts[name] += torch.tensor([wide.shape[0], wide.shape[0] * wide.shape[1]])

    with _looking(model, sums, look):
        yield Evidence.FORWARD
    world.sum_in_place(*sums.values(), *squares.values(), *counts.values())
    variances = {}
    for name, (num_sequences, num_tokens) in counts.items():
        _check_enough(int(num_sequences))
        spread = squares[name] - sums[name].square() / float(num_tokens)
        variances[name] = spread.clamp_min(0).cpu() / (num_sequences - 1)
    return variances


def _authors_variances(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, dict[str, Tensor]]:
    """`_variances` as the released code computes them: sequence by sequence, around a mean that already includes the sequence."""
    means, spreads = _zeros(model, axes), _zeros(model, axes)
    seen = dict.fromkeys(means, 0)

    def look(name: str, entering: Tensor) -> None:
        for sequence in entering.double():
            seen[name] += 1
            means[name] += (sequence.mean(dim=0) - means[name]) / seen[name]
            spreads[name] += (sequence - means[name]).square().sum(dim=0) * ((seen[name] - 1) / seen[name])

    with _looking(model, means, look):
        yield Evidence.FORWARD
    for num_sequences in seen.values():
        _check_enough(num_sequences)
    return {name: spread.cpu() / (seen[name] - 1) for name, spread in spreads.items()}


def _check_enough(num_sequences: int) -> None:
    if num_sequences < 2:
        raise UsageError(
            f"fluctuation over {num_sequences} calibration sequence is not defined; set calibration.samples to 2 or more"
        )


def _watchable(axes: Sequence[Axis]) -> list[Axis]:
    return [axis for axis in axes if axis.slices and axis.gate.is_linear]


def _weights(model: nn.Module, axes: Sequence[Axis]) -> dict[str, Tensor]:
    """The weights of the modules at which axes are watched: [outputs, features] of a linear layer, [features] of a norm."""
    weights = {}
    for axis in axes:
        for name in _at(axis):
            weight = model.get_parameter(f"{name}.weight").detach()
            weights[name] = axis.gate.oriented(weight) if axis.gate.is_linear else weight
    return weights


def _columns(model: nn.Module, axes: Sequence[Axis], name: str) -> Tensor:
    """The weight of a linear layer at a gate, float64 [outputs, features]."""
    with numbers_of(model.get_parameter(f"{name}.weight")):
        return _weights(model, axes)[name].double()


def _at(axis: Axis) -> tuple[str, ...]:
    """The modules at which an axis is watched: the linear layer at its gate, or those norms at its gate that lie in layers."""
    return axis.gate.also if axis.gate.kind == "channels" else (axis.gate.module,)


def _zeros(model: nn.Module, axes: Sequence[Axis]) -> dict[str, Tensor]:
    """Float64 zeros, [features], for each module at which axes are watched; axes may share a module."""
    return {name: weight.new_zeros(weight.shape[-1], dtype=torch.float64) for name, weight in _weights(model, axes).items()}


@contextmanager
def _looking(model: nn.Module, names: Mapping[str, Any], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context lasts, call `look` with each name and its values, float32 [batch, length, features].

    The values of a linear layer are its inputs, those of a norm its outputs.
    """

    def watch(name: str) -> RemovableHandle:
        module = model.get_submodule(name)
        if model.get_parameter(f"{name}.weight").dim() == 1:
            return module.register_forward_hook(lambda module, args, given: look(name, given.detach().float()))
        return module.register_forward_pre_hook(lambda module, args: look(name, args[0].detach().float()))

    with attached(watch(name) for name in names):
        yield


def _by_unit(channels: Mapping[str, Tensor], axis: Axis, name: str | None = None) -> Tensor:
    """The values of the features of each unit, at the gate's linear layer or at `name`: [units, width] on the CPU."""
    return channels[name or axis.gate.module].cpu().view(-1, axis.gate.width)
