"""`task: causal_lm`: the model predicts each next token of plain text or of the answers in conversations."""

from adapt_pruner.core.model import task
from adapt_pruner.core.system.parts import part
from adapt_pruner.data.fixed import training_rows
from adapt_pruner.data.tokens import text_bytes
from adapt_pruner.data.windows import calibration_feed, held_out_by_text


@part("task")
class CausalLM(task.CausalLM):
    """The next token of a text: -log p(token | what precedes it), in nats; measured as perplexity and bits per byte."""

    writes_text = True

    calibration = staticmethod(calibration_feed)
    rows = staticmethod(training_rows)
    held_out = staticmethod(held_out_by_text)
    num_bytes = staticmethod(text_bytes)
