"""What a whole block is worth: a decoder layer by how far its output lies from its input, a unit or layer by shutting it.

All distances (residual stream included) grow with the change a layer makes, so a layer that hardly changes its input
scores lowest.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_pruner.core import world
from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.calibrate import Evidence, mean_loss
from adapt_pruner.core.surgery import gated

__all__ = ["block_influence", "cosine", "euclidean", "loss_drop", "manhattan"]


def cosine(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by angle: -mean over tokens of cos(X, Y), X entering and Y leaving the whole layer.

    Returns:
        {"layers": float32 [num_layers]} in [-1, 1]; higher means the layer turns its input further.

    Source: Adapt-Pruner, arXiv:2502.03460, "mapping distortion", the default. The mean is taken over all tokens;
    the authors sum over mini-batches, which their normalisation undoes.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: -F.cosine_similarity(x, y, dim=-1)))


def block_influence(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Block influence: 1 - mean over tokens of cos(X, Y), X entering and Y leaving the whole layer; ranks as `cosine` does.

    Returns:
        {"layers": float32 [num_layers]} in [0, 2]; a layer at 0 leaves the direction of its input as it is.

    Source: ShortGPT, arXiv:2403.03853. Differs: Y of the last layer is that layer's own output. The released code reads
    the `hidden_states` that transformers returns, the last of which has been through the final norm.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1)))


def euclidean(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by Euclidean distance: mean over tokens of ‖Y - X‖₂.

    Returns:
        {"layers": float32 [num_layers]}, non-negative.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the released code returns the distance with a minus sign, which
    makes the layers that change most look least important, against its own cosine.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: (y - x).norm(p=2, dim=-1)))


def manhattan(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by Manhattan distance: mean over tokens of ‖Y - X‖₁.

    Returns:
        {"layers": float32 [num_layers]}, non-negative.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the sign, as for `euclidean`.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: (y - x).norm(p=1, dim=-1)))


def loss_drop(model: nn.Module, axes: Sequence[Axis], batches: Sequence[Tensor], *, dtype: str = "auto") -> Scores:
    """What the loss would drop by if a shut unit were opened again: each unit is shut alone and the loss measured.

    score[u] = L(u shut), the mean next-token cross-entropy in nats per token; within an axis that ranks like
    L(u shut) - L. One forward pass a unit, so it is for few and dear units: the KV heads of a layer, or whole layers, where a
    shut one returns its input. First-order scores can miss heads by far: in SmolLM2-135M the KV head of layer 1 that Taylor
    ranks last costs 2.5 nats.

    Args:
        model: causal LM; left as found.
        axes: the axes whose units to shut, one after the other; of an axis with blocks one entry, since each block
            ranks its own. An axis of one unit, which cannot be shut, scores 0.
        batches: token ids, int64 [batch, length].
        dtype: precision of the matrix products.

    Returns:
        axis name -> float32 [axis.entries] on the CPU.

    Source: ours; removal as a measure is that of MoPE-CLIP (arXiv:2403.07839) and of layer-dropping work.
    """
    scores: Scores = {}
    for axis in axes:
        if axis.size == 1:
            scores[axis.name] = torch.zeros(axis.entries)
            continue
        losses = []
        for entry in range(axis.entries):
            keep = torch.arange(axis.entries) != entry
            with gated(model, axes, Mask({axis.name: keep})):
                losses.append(mean_loss(model, batches, dtype=dtype))
        scores[axis.name] = torch.tensor(losses)
    return scores


def _mean_over_tokens(
    model: nn.Module, axes: Sequence[Axis], distance: Callable[[Tensor, Tensor], Tensor]
) -> Generator[Evidence, None, Scores]:
    depth = next(axis for axis in axes if axis.name == "layers")
    layers: Any = model.get_submodule(depth.gate.module)
    totals = torch.zeros(depth.size, dtype=torch.float64)
    counts = torch.zeros(depth.size, dtype=torch.float64)

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                per_token = distance(entered.detach().float(), left.detach().float())
                totals[index] += per_token.sum(dtype=torch.float64).cpu()
                counts[index] += per_token.numel()

        return hook

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield Evidence.FORWARD
    finally:
        for handle in handles:
            handle.remove()
    world.sum_in_place(totals, counts)
    return {"layers": (totals / counts).float()}
