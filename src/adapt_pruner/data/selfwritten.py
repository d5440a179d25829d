"""Text that the model writes itself, as calibration data when there is no text at hand."""

from typing import Any

import torch
from torch import nn

__all__ = ["selfwritten_windows"]

_BATCH = 32


@torch.no_grad()
def selfwritten_windows(model: nn.Module, tokenizer: Any, *, samples: int, length: int, seed: int) -> torch.Tensor:
    """`samples` sequences of `length` tokens sampled from the model itself, at temperature 1 from the start-of-text token.

    End-of-text tokens do not stop a sequence: what follows is a new text. The model's random state is left as found.

    Returns:
        int64 [samples, length] on the CPU.
    """
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    device = next(model.parameters()).device
    training = model.training
    state = torch.get_rng_state()
    try:
        model.eval()
        torch.manual_seed(seed)
        rows = []
        for done in range(0, samples, _BATCH):
            count = min(_BATCH, samples - done)
            ids = torch.full((count, 1), start, device=device)
            written = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=start,
            )
            rows.append(written[:, 1:].cpu())
        return torch.cat(rows)
    finally:
        torch.set_rng_state(state)
        model.train(training)
