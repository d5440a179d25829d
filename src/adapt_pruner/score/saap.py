"""SAAP's importance: two second-order Taylor scores of a unit, fused by their uncertainty and divided by its fluctuation."""

from collections.abc import Callable, Generator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.score.weights import taylor


@part("metric", needs={"text"})
def saap(
    model: nn.Module, axes: Sequence[Axis], *, terms: Literal["both", "vector", "element"] = "both", stability: bool = True
) -> Generator[Evidence, str | None, Scores]:
    """Vector-wise and element-wise Taylor scores of second order, fused by their uncertainty over the text (SAAP).

    For unit u, with g_n what sequence n of N adds to the gradient of the mean loss, and w the unit's weights in all its matrices:

        a_n[u] = Σ_w w · g_n                  e_n[u] = Σ_w |w · g_n|
        vector    V = | Σ_n a_n - (N / 2) Σ_n a_n² |                      H ≈ N Σ_n g_n g_nᵀ
        element   E = Σ_w | w g - w² F / 2 |                              `weights.taylor(form=mixed)`
        σ_V², σ_E²  the variance of |a_n| and of e_n over n, over their mean square, averaged over all units of a kind
        I = V' / (2 σ_V²) + E' / (2 σ_E²)                                 V', E': brought to mean 1 over the units of a kind
        score = I + log σ_V + log σ_E, or with `stability` I / f + log σ_V + log σ_E        f: deviation of e_n over its mean

    Args:
        model: causal LM; takes the memory of `weights.taylor(form=mixed)`, and two numbers for each unit and sequence.
        axes: axes to score; those without slices are skipped.
        terms: `both` fuses the two. `vector` or `element` alone is a control of the fusion: the score is V or E, or with
            `stability` V / f or E / f.
        stability: divide by the fluctuation f, so that units whose worth depends on the text go earlier.

    Returns:
        axis name -> float32 [axis.entries] on the CPU. Comparable within a kind; `rank.standardised(by=kind)` compares kinds.

    Source: arXiv:2412.15127. Its code is not public, and we know its formulas from reviews only. The Taylor terms and the fusion
    I / (2σ²) + log σ are theirs; the estimate of σ, the scaling to mean 1, and the fluctuation are ours. Differs: they also rank
    modules, to choose the layers that lose units; here all units of all layers stand in one line.
    """
    scored = [axis for axis in axes if axis.slices]
    lines: dict[str, list[list[Tensor]]] = {axis.name: [[], []] for axis in scored}  # a_n and e_n of each sequence
    pieces: dict[str, list[tuple[Axis, int]]] = {}
    for axis in scored:
        for number, piece in enumerate(axis.slices):
            if model.get_parameter(piece.parameter).dim() > 1:
                pieces.setdefault(piece.parameter, []).append((axis, number))
    with attached(model.get_parameter(name).register_hook(_watch(model, name, slices, lines)) for name, slices in pieces.items()):
        elements = yield from taylor(model, axes, form="mixed")
    scores: Scores = {}
    for kind in {axis.kind: None for axis in scored}:
        alike = [axis for axis in scored if axis.kind == kind]
        sums = [
            torch.cat(
                [
                    torch.stack(lines[axis.name][which]) if lines[axis.name][which] else torch.zeros(0, axis.entries)
                    for axis in alike
                ],
                dim=1,
            )
            for which in (0, 1)
        ]
        fused = _fused(torch.cat([elements[axis.name] for axis in alike]), *sums, terms=terms, stability=stability)
        scores |= dict(zip([axis.name for axis in alike], fused.split([axis.entries for axis in alike]), strict=True))
    return scores


def _watch(
    model: nn.Module, name: str, slices: Sequence[tuple[Axis, int]], lines: dict[str, list[list[Tensor]]]
) -> Callable[[Tensor], None]:
    """A hook that adds what a matrix contributes to each unit's a_n and e_n, for the sequence n of this pass."""
    seen = 0

    def hook(gradient: Tensor) -> None:
        nonlocal seen
        terms = model.get_parameter(name).detach().float() * gradient.float()
        for axis, number in slices:
            piece = axis.slices[number]
            across = [dim for dim in range(terms.dim()) if dim != piece.dim]
            owned = slice(piece.start, piece.start + axis.entries * piece.width)
            for kind, values in enumerate((terms, terms.abs())):
                units = values.sum(dim=across)[owned].view(-1, piece.width).sum(dim=1).cpu()
                line = lines[axis.name][kind]
                if seen < len(line):
                    line[seen] = line[seen] + units
                else:
                    line.append(units)
        seen += 1

    return hook


def _fused(elements: Tensor, signed: Tensor, absolute: Tensor, *, terms: str, stability: bool) -> Tensor:
    """The scores of a kind from E (`elements`, [units]), a_n (`signed`) and e_n (`absolute`), both [own sequences, units]."""
    number = torch.tensor(float(len(signed)))
    first, second = signed.sum(dim=0), signed.square().sum(dim=0)
    spread = [torch.stack([values.sum(dim=0), values.square().sum(dim=0)]) for values in (signed.abs(), absolute)]
    world.sum_in_place(number, first, second, *spread)
    vector = (first - number / 2 * second).abs()
    score, logs = elements if terms == "element" else vector, 0.0
    if terms == "both":
        score = torch.zeros_like(elements)
        for values, (total, squares) in zip((vector, elements), spread, strict=True):
            mean = total / number
            variance = (squares / number - mean.square()).clamp_min(0)
            sigma = (variance / mean.square().clamp_min(1e-30)).mean().clamp_min(1e-6).sqrt()
            score = score + values / values.mean().clamp_min(1e-30) / (2 * sigma**2)
            logs += float(sigma.log())
    if stability:
        total, squares = spread[1]
        mean = total / number
        fluctuation = (squares / number - mean.square()).clamp_min(0).sqrt() / mean.clamp_min(1e-30)
        score = score / fluctuation.clamp_min(1e-6)
    return (score + logs).float()
