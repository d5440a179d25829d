"""Text that the model writes: self-written text to calibrate on, and repair text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from adapt_pruner.core.model.precision import casting_once, precision, refuse_nonfinite
from adapt_pruner.core.model.shelf import is_shelved
from adapt_pruner.data.tokens import opening

BATCH, BATCH_FROM_SHELF = 32, 128
"""Sequences written side by side. A model on a shelf is read once for each token of a batch."""
_TOLD = 8  # tokens of each sequence between two reports of progress


@torch.no_grad()
def selfwritten_windows(
    model: nn.Module,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    dtype: str = "float32",
    on_tokens: Callable[[int, int], None] = lambda done, of: None,
) -> torch.Tensor:
    """`samples` sequences of `length` tokens sampled from the model itself, at temperature 1 from the start-of-text token.

    End-of-text tokens do not stop a sequence; a new text follows them. The start-of-text token is the first of the `length`
    tokens if the tokenizer puts it before a text by itself, and is left out otherwise (`data.tokens.opening`). Each token is the
    first whose cumulated probability exceeds a number drawn uniformly for its sequence and place, so the text is the same in
    batches of any size and on any device, but for rounding of the logits.

    Args:
        model: causal LM; left as found.
        tokenizer: the model's own.
        samples: number of sequences.
        length: tokens of each.
        seed: seed of the draws.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_tokens: called with (done, of), in written tokens; at first (0, of).

    Returns:
        int64 [samples, length] on the CPU.

    Raises:
        RunError: a logit is infinite or not a number.
    """
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    shown = len(opening(tokenizer))
    device = next(model.parameters()).device
    training, own_config = model.training, model.generation_config
    batch = BATCH_FROM_SHELF if is_shelved(model) else BATCH
    new, rows = length - shown, list[torch.Tensor]()
    uniform = torch.rand(samples, new, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    refuse = refuse_nonfinite("no text can be drawn from logits of nan or inf", device, dtype)

    def draw(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        first, place = sum(map(len, rows)), ids.shape[1] - 1
        if place % _TOLD == 0:
            on_tokens(first * new + len(ids) * place, samples * new)
        cumulated = logits.double().softmax(-1).cumsum(-1)
        wanted = uniform[first : first + len(ids), place, None].to(device) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, wanted, right=True).clamp(max=logits.shape[-1] - 1)
        return torch.full_like(logits, -torch.inf).scatter(-1, drawn, 0.0)

    with casting_once(model), precision(device, dtype):
        try:
            model.eval()
            # The model's own settings (penalties, end-of-text ids) would change the distribution of its text.
            model.generation_config = GenerationConfig(pad_token_id=start)
            for first in range(0, samples, batch):
                ids = torch.full((min(batch, samples - first), 1), start, device=device)
                written = model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new,
                    logits_processor=LogitsProcessorList([refuse, draw]),
                )
                rows.append(written[:, 1 - shown :].cpu())
            on_tokens(samples * new, samples * new)
            return torch.cat(rows)
        finally:
            model.generation_config = own_config
            model.train(training)
