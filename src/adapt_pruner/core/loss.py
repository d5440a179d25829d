"""The next-token loss of a causal LM, worked out in pieces so that the full logits are never held."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["next_token_nll"]

_CHUNK = 512  # tokens whose logits exist at one time; 100 MB in float32 with a vocabulary of 49 k


def next_token_nll(model: nn.Module, input_ids: Tensor, *, backward_scale: float | None = None, chunk: int = _CHUNK) -> Tensor:
    """Sum over all predicted tokens of -log p(token | what precedes it), in nats.

    Every sequence predicts its tokens 1 … length - 1. With `backward_scale` the gradient of `backward_scale` × the sum
    is added to the parameters' `.grad`: each chunk of logits is differentiated and let go before the next is made,
    then the decoder is differentiated once.

    Args:
        model: causal LM whose logits are `get_output_embeddings()` of `get_decoder()`'s last hidden state.
        input_ids: int64 [batch, length], length at least 2; no padding.
        backward_scale: None for the value only (wrap in `torch.no_grad()`), else the factor of the gradient.
        chunk: tokens whose logits exist at one time.

    Returns:
        float32 scalar, detached.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    entering = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = input_ids[:, 1:].reshape(-1)
    total = torch.zeros((), device=targets.device)
    gradients = []
    for piece, target in zip(entering.split(chunk), targets.split(chunk), strict=True):
        piece = piece.detach().requires_grad_(backward_scale is not None)
        nll = F.cross_entropy(head(piece).float(), target, reduction="sum")
        total += nll.detach()
        if backward_scale is not None:
            (nll * backward_scale).backward()
            gradients.append(piece.grad)
    if backward_scale is not None and entering.requires_grad:
        entering.backward(torch.cat(gradients))
    return total
