"""What a model learns, said in one place: what of a batch is predicted, from where, and at what loss.

Scoring, repairs, training and evaluation ask a `Task` and know no head, no labels and no order of tokens themselves. How batches are
made of text is for `data.task.TextTask` to say, which a recipe names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from adapt_pruner.core.loss import LogitLoss, capped, logit_cap, nll_of_logits, through_head

__all__ = ["CAUSAL_LM", "CausalLM", "Task"]


class Task(Protocol):
    """What scoring, repairs and training ask of the work that a model does."""

    def num_predicted(self, batches: Iterable[Tensor], predicted: Tensor | None = None) -> int:
        """How many predictions of these batches count in the loss; of each batch only the first two dimensions are read.

        `predicted`, bool [batch, length], says which of a single batch count; None for all that can be predicted.
        """

    def entrance(self, model: Any) -> nn.Module:
        """The module whose output begins the stream: what flows has gradients from there on."""

    def read(self, model: Any, batch: Tensor, **asked: Any) -> Any:
        """Run what lies below the predictions, decoder layers among it; the output has `last_hidden_state`, [batch, length, width].

        Args:
            model: in the precision around the call.
            batch: on the model's device.
            asked: what else the output is to have, as the model's forward calls it.
        """

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The sum of the loss over what is predicted: float32 scalar, differentiable once.

        Args:
            model: left as found, but for gradients.
            batch: on the model's device.
            predicted: bool [batch, length], what of the batch counts; None for all that can be predicted.
            chunk: predictions whose logits exist at one time, see `through_head`.
        """

    def judged(self, model: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Figures beside the loss, each a sum over what is predicted: `{"accuracy": number of right answers}`; {} for none."""


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: position t predicts token t + 1, at -log p(token | what precedes it) in nats.

    Its logits are what `get_output_embeddings()` makes of the last hidden state of `get_decoder()`, capped or not.
    Batches are token ids, int64 [batch, length], length at least 2; padding, if any, on the right.
    """

    def num_predicted(self, batches: Iterable[Tensor], predicted: Tensor | None = None) -> int:
        """All tokens of a sequence but its first, or those of them that `predicted` marks."""
        if predicted is not None:
            return int(predicted[:, 1:].sum())
        return sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)

    def entrance(self, model: Any) -> nn.Module:
        """The embedding of tokens."""
        embedding: nn.Module = model.get_input_embeddings()
        return embedding

    def read(self, model: Any, batch: Tensor, **asked: Any) -> Any:
        """Run the decoder, without a cache."""
        return model.get_decoder()(input_ids=batch, use_cache=False, **asked)

    def predicting(self, hidden: Tensor, batch: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The hidden states that predict something, and what they predict.

        Args:
            hidden: [batch, length, width].
            batch: token ids.
            predicted: bool [batch, length], the tokens that count; None for all. No position predicts token 0.

        Returns:
            [n, width] and int64 [n].
        """
        before, targets = hidden[:, :-1], batch[:, 1:]
        if predicted is None:
            return before.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        chosen = predicted[:, 1:]
        return before[chosen], targets[chosen]

    def head(self, model: Any) -> nn.Linear:
        """The linear layer that makes logits of hidden states."""
        layer: nn.Linear = model.get_output_embeddings()
        return layer

    def of_logits(self, model: Any, hidden: Tensor, loss: LogitLoss, *, chunk: int | None = None) -> Tensor:
        """The sum of `loss` over the logits of `hidden`, [n, width], which never exist together; see `through_head`."""
        return through_head(hidden, self.head(model), capped(loss, logit_cap(model)), chunk=chunk)

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The sum over the predicted tokens of -log p, in nats; see `Task.loss`."""
        hidden, targets = self.predicting(self.read(model, batch).last_hidden_state, batch, predicted)
        return self.of_logits(model, hidden, nll_of_logits(targets), chunk=chunk)

    def judged(self, model: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Nothing beside the loss."""
        return {}


CAUSAL_LM = CausalLM()
