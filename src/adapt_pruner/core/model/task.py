"""What a model learns, in one place: what of a batch is predicted, from which hidden states, and with what loss.

Scoring, repairs, training and evaluation ask a `Task`. They do not know the head, the labels or the order of tokens themselves.
How text becomes batches is the work of `data.task.TextTask`, which a recipe names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.loss import LogitLoss, logit_map, nll_of_logits, of_head, through_head

LOADED_BY = {"causal_lm": ("AutoModelForCausalLM", "AutoTokenizer"), "contrastive": ("AutoModel", "AutoProcessor")}
"""Task -> the class of transformers that loads a model for it, and the class that loads what makes its batches."""


class Task(Protocol):
    """What scoring, repairs and training ask of the work that a model does.

    Attributes:
        towers: the stacks of layers that a batch goes through, as axes name them: `("",)`, or `("text.", "vision.")`, in which case the
            samples of a batch are told apart together, so that a batch must not be taken apart.
    """

    towers: ClassVar[tuple[str, ...]]

    def num_predicted(self, batches: Iterable[Tensor], predicted: Tensor | None = None) -> int:
        """How many predictions of these batches count in the loss; only the first two dimensions of each batch are read.

        `predicted`, bool [batch, length], marks what counts in a single batch; None for all that can be predicted.
        """

    def entrance(self, model: Any) -> nn.Module:
        """The module whose output begins the residual stream; gradients with respect to activations start there."""

    def head(self, model: Any) -> nn.Module:
        """The module that turns the last hidden states into what is predicted."""

    def read(self, model: Any, batch: Tensor, **outputs: Any) -> Any:
        """Run everything below the predictions, decoder layers included, to a `last_hidden_state` [batch, length, width].

        Args:
            model: runs in the precision of the surrounding context.
            batch: on the model's device.
            outputs: further outputs, as keyword arguments of the model's forward.
        """

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The sum of the loss over all predictions: float32 scalar, differentiable once.

        Args:
            model: left as found, except for gradients.
            batch: on the model's device.
            predicted: bool [batch, length], which parts of the batch count; None for all that can be predicted.
            chunk: predictions whose logits exist at one time, see `through_head`.
        """

    def judged(self, model: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Figures beside the loss, each a sum over all predictions: `{"accuracy": number of right answers}`; {} for none."""

    def observed(self, model: Any, batches: Sequence[Tensor], tower: str) -> Tensor:
        """What `merit` needs to know of a tower of a model, or of the whole model, whose tower is ""; without gradients."""

    def merit(self, observed: Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """How well a model does by the task's own measure, more being better.

        Args:
            observed: tower -> what `observed` gave of it. While one tower is pruned, the others need not run again.
            batches: those that were observed.
        """


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: position t predicts token t + 1, at -log p(token | what precedes it) in nats.

    The logits are the output of `get_output_embeddings()` for the last hidden state of `get_decoder()`, capped if the model caps
    them. Batches are token ids, int64 [batch, length], length at least 2; padding, if any, on the right.
    """

    towers: ClassVar[tuple[str, ...]] = ("",)

    def num_predicted(self, batches: Iterable[Tensor], predicted: Tensor | None = None) -> int:
        """All tokens of a sequence except the first, or those of them that `predicted` marks."""
        if predicted is not None:
            return int(predicted[:, 1:].sum())
        return sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)

    def entrance(self, model: Any) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = model.get_input_embeddings()
        return embedding

    def read(self, model: Any, batch: Tensor, **outputs: Any) -> Any:
        """Run the decoder, without a cache."""
        return model.get_decoder()(input_ids=batch, use_cache=False, **outputs)

    def predicting(self, hidden: Tensor, batch: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The hidden states that predict a token, and the tokens they predict.

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
        """The linear layer that turns hidden states into logits."""
        layer: nn.Linear = model.get_output_embeddings()
        return layer

    def of_logits(self, model: Any, hidden: Tensor, loss: LogitLoss, *, chunk: int | None = None) -> Tensor:
        """The sum of `loss` over the logits of `hidden`, [n, width]; these never exist together, see `through_head`."""
        return through_head(hidden, self.head(model), of_head(loss, logit_map(model)), chunk=chunk)

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The sum over the predicted tokens of -log p, in nats; see `Task.loss`."""
        hidden, targets = self.predicting(self.read(model, batch).last_hidden_state, batch, predicted)
        return self.of_logits(model, hidden, nll_of_logits(targets), chunk=chunk)

    def judged(self, model: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Nothing beside the loss."""
        return {}

    def observed(self, model: Any, batches: Sequence[Tensor], tower: str) -> Tensor:
        """The sum of the loss over each batch."""
        return torch.stack([self.loss(model, batch.to(model.device)) for batch in batches])

    def merit(self, observed: Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """-L, of the mean loss L in nats per token."""
        return -float(observed[""].double().sum()) / self.num_predicted(batches)


CAUSAL_LM = CausalLM()
