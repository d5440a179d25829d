"""What removing each unit costs by the curvature of the loss, after the remaining weights make up for it as well as they can.

Let W be the weights of the linear layer at a gate, x its input and g the gradient of the loss by its output. Around W the loss is
approximated by

    L(W + Δ) ≈ L(W) + ½ tr(Δ A Δᵀ G),        A = Σ x xᵀ / N,  G = Σ g gᵀ / P

over N tokens of which P are predicted, with g the gradient of the sum of their losses. This is the Fisher information with its
Kronecker factors (K-FAC), in nats per token. Removing columns is a Δ. The Δ that costs least also changes the columns that stay.
It depends on A alone: it is the least-squares repair of `reduce.repair.closed_form`.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.gram import add_gram, complete
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import Evidence

_ROUNDS = 48  # in which an axis's units of one column go; one by one they would take far longer for little more precision


@part("metric", needs={"text", "inputs"})
def kfac(
    model: nn.Module, axes: Sequence[Axis], *, ridge: Annotated[float, "0 or more"] = 0.3, task: Task = CAUSAL_LM
) -> Generator[Evidence, None, Scores]:
    """What removing a unit adds to the loss once the remaining units make up for it, computed in the order of removal (K-FAC).

    With P = (A + λI)⁻¹, λ = ridge · mean diagonal of A, and u the columns of a unit, the cost of removing it is

        ½ tr( (P_uu)⁻¹ W_uᵀ G W_u )       nats per token.

    The cheapest units go, and W and P are updated (W ← W - W_u P_uu⁻¹ P_u·, P ← P - P_·u P_uu⁻¹ P_u·). Then the costs of the rest
    are computed again, until one unit is left in every group. A unit's score is its cost when it goes, or the cost of a unit
    before it if that is greater. So the sum over the lowest k scores is the cost of removing these k units together. Scores of
    single units cannot say this: of two neurons that do the same, the first costs nothing and the second much.

    Args:
        model: causal LM. Two float32 matrices are held for each gate, [features, features] and [outputs, outputs].
        axes: axes to score; those without a linear layer at their gate (`layers`, `residual`) are skipped.
        ridge: λ as a multiple of the mean diagonal of A.
        task: what the model learns.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative, in nats per token: comparable between axes.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993) over whole columns with K-FAC (Martens & Grosse 2015), as in LLM Surgeon
    (arXiv:2312.17244). Differs: a greedy order instead of a threshold on single costs, G from the true labels, a ridge on A
    relative to its mean diagonal, and none on G.
    """
    axes = [axis for axis in axes if axis.slices and axis.gate.is_linear]
    weights = {axis.gate.module: axis.gate.oriented(model.get_parameter(f"{axis.gate.module}.weight").detach()) for axis in axes}
    gates = list(weights)
    inputs, outputs = {}, {}
    counts = torch.zeros(2, dtype=torch.float64)  # tokens, and those that are predicted
    for name, weight in weights.items():
        inputs[name] = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
        outputs[name] = weight.new_zeros(weight.shape[0], weight.shape[0], dtype=torch.float32)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            entering = args[0].detach().float().flatten(0, -2)
            add_gram(inputs[name], entering)
            if name == gates[0]:
                counts.add_(torch.tensor([entering.shape[0], task.num_predicted([args[0]])]))
            if output.requires_grad:
                output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            leaving = gradient.float().flatten(0, -2)
            add_gram(outputs[name], leaving)

        return hook

    with attached(model.get_submodule(name).register_forward_hook(watch(name)) for name in gates):
        yield Evidence.STREAM_GRADIENTS
    world.sum_in_place(*inputs.values(), *outputs.values(), counts)
    num_tokens, num_predicted = (max(1.0, float(count)) for count in counts)
    scores: Scores = {}
    for axis in axes:
        name = axis.gate.module
        # The gradients seen are those of the mean loss, 1 / num_predicted of those of the sum.
        scores[axis.name] = _costs(
            weights[name],
            complete(inputs[name]) / num_tokens,
            complete(outputs[name]) * num_predicted,
            width=axis.gate.width,
            groups=axis.groups,
            ridge=ridge,
        )
    return scores


def _costs(weight: Tensor, inputs: Tensor, outputs: Tensor, *, width: int, groups: int, ridge: float) -> Tensor:
    """The scores of an axis. A unit owns `width` columns of `weight`; each round removes equally many units from every group."""
    features = inputs.shape[0]
    each = features // width // groups
    eye = torch.eye(features, device=inputs.device, dtype=torch.float64)
    damping = max(ridge * float(inputs.diagonal().mean()), torch.finfo(torch.float32).tiny)
    precision = torch.linalg.inv(inputs.double() + damping * eye).float()
    felt = _root(outputs) @ weight.float()  # so that costs are squared norms
    costs = torch.full((groups, each), math.inf)
    highest = torch.zeros(groups, 1)
    at_once = max(1, each // _ROUNDS) if width == 1 else 1
    whole, rest = divmod(each - 1, at_once)  # one unit stays in the end
    for going in [at_once] * whole + [rest] * (rest > 0):
        marginal = _marginal(felt, precision, width=width).cpu().view(groups, each)
        marginal[costs < math.inf] = math.inf
        lowest = marginal.topk(going, dim=1, largest=False)
        paid = torch.maximum(highest, lowest.values.cummax(dim=1).values)
        costs.scatter_(1, lowest.indices, paid)
        highest = paid[:, -1:]
        units = (lowest.indices + each * torch.arange(groups)[:, None]).flatten().to(inputs.device)
        _eliminate(felt, precision, (units[:, None] * width + torch.arange(width, device=units.device)).flatten())
    last = torch.maximum(highest, _marginal(felt, precision, width=width).cpu().view(groups, each))
    return torch.where(costs < math.inf, costs, last).flatten()


def _marginal(felt: Tensor, precision: Tensor, *, width: int) -> Tensor:
    """½ tr(P_uu⁻¹ W_uᵀ G W_u) of every unit; meaningless for those that are gone."""
    if width == 1:
        return felt.square().sum(dim=0) / precision.diagonal() / 2
    num_units = felt.shape[1] // width
    blocks = precision.view(num_units, width, num_units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = felt.view(felt.shape[0], num_units, width).permute(1, 2, 0)
    solved: Tensor = torch.linalg.solve(blocks, columns @ columns.transpose(1, 2))
    return solved.diagonal(dim1=1, dim2=2).sum(dim=1) / 2


def _eliminate(felt: Tensor, precision: Tensor, columns: Tensor) -> None:
    """Remove columns, in place; in `precision` they become an identity that no other column sees."""
    across = precision[:, columns]
    inverse = torch.linalg.inv(across[columns].double()).float()
    felt -= felt[:, columns] @ inverse @ across.t()
    precision -= across @ inverse @ across.t()
    felt[:, columns] = 0
    precision[columns] = 0
    precision[:, columns] = 0
    precision[columns, columns] = 1


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix.double())
    root: Tensor = ((vectors * values.clamp_min(0).sqrt()) @ vectors.t()).float()
    return root
