"""`task: causal_lm`: the model predicts each next token of plain text or of the answers in conversations."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adapt_pruner.core.model import task
from adapt_pruner.core.system.parts import part
from adapt_pruner.data.fixed import Rows, training_rows
from adapt_pruner.data.sources import Source
from adapt_pruner.data.tokens import text_bytes
from adapt_pruner.data.windows import calibration_feed, held_out_by_text


@part("task")
class CausalLM(task.CausalLM):
    """The next token of a text: -log p(token | what precedes it), in nats; measured as perplexity and bits per byte."""

    writes_text = True

    def calibration(self, model: Any, tokenizer: Any, **options: Any) -> Callable[[int], list[Tensor]]:
        """Windows of text, drawn again for each iteration; see `data.windows.calibration_feed`."""
        return calibration_feed(model, tokenizer, **options)

    def rows(self, tokenizer: Any, source: Source, **options: Any) -> Rows:
        """Rows of packed text or of conversations; see `data.fixed.training_rows`."""
        return training_rows(tokenizer, source, **options)

    def held_out(self, tokenizer: Any, **options: Any) -> dict[str, list[Tensor]]:
        """Windows of text; see `data.windows.held_out_by_text`."""
        return held_out_by_text(tokenizer, **options)

    def num_bytes(self, tokenizer: Any, batches: Sequence[Tensor]) -> int | None:
        """Bytes that the predicted tokens stand for; see `data.tokens.text_bytes`."""
        return text_bytes(tokenizer, batches)
