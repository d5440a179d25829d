"""What training minimises: given a model and a batch, add the gradient and return the loss."""

from torch import Tensor, nn

from adapt_pruner.core.loss import next_token_nll

__all__ = ["lm"]


def lm(model: nn.Module, input_ids: Tensor, *, share: float = 1.0) -> Tensor:
    """Next-token cross-entropy, the mean over the predicted tokens of the batch.

    Adds `share` × its gradient to the parameters' `.grad` (`share` < 1 for a part of a batch).

    Args:
        input_ids: int64 [batch, length], no padding.
        share: the part's share of the whole batch.

    Returns:
        The loss, float32 scalar, nats per token, detached.
    """
    num_predicted = input_ids.shape[0] * (input_ids.shape[1] - 1)
    return next_token_nll(model, input_ids, backward_scale=share / num_predicted) / num_predicted
