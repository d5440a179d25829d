"""Text that the model writes: self-written text to calibrate on, and repair text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from adapt_pruner.core.model.precision import casting_once, precision, refuse_nonfinite
from adapt_pruner.data.tokens import opening

_BATCH = 32
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
    tokens if the tokenizer puts it before a text by itself, and is left out otherwise (`data.tokens.opening`). The model's random
    state is left as found.

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
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), casting_once(model), precision(device, dtype):
        try:
            model.eval()
            # The model's own settings (penalties, end-of-text ids) would change the distribution of its text.
            model.generation_config = GenerationConfig(pad_token_id=start)
            torch.manual_seed(seed)
            rows: list[torch.Tensor] = []
            of = samples * (length - shown)

            def count(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                if (ids.shape[1] - 1) % _TOLD == 0:
                    on_tokens(sum(map(len, rows)) * (length - shown) + len(ids) * (ids.shape[1] - 1), of)
                return logits

            for first in range(0, samples, _BATCH):
                ids = torch.full((min(_BATCH, samples - first), 1), start, device=device)
                written = model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=length - shown,
                    logits_processor=LogitsProcessorList(
                        [count, refuse_nonfinite("no text can be drawn from logits of nan or inf", device, dtype)]
                    ),
                )
                rows.append(written[:, 1 - shown :].cpu())
            on_tokens(of, of)
            return torch.cat(rows)
        finally:
            model.generation_config = own_config
            model.train(training)
