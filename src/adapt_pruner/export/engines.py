"""The engine that an artefact runs in; it gives logits, greedy text and token ids. Torch, as the reference, is one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Engine", "torch_engine"]


@dataclass(frozen=True)
class Engine:
    """An open artefact.

    Attributes:
        name: name of the engine, with its version.
        stored: number format of the stored weights: `f32`, `bf16`, `q8_0`, …
        vocab_size: logits per token.
        logits: ids -> float32 [length, vocabulary].
        greedy: ids, n -> the next n tokens, each the one with the highest logit after those before it.
        encode: text -> ids, including what the engine puts before a text by itself; None if it has no tokenizer.
    """

    name: str
    stored: str
    vocab_size: int
    logits: Callable[[list[int]], Tensor]
    greedy: Callable[[list[int], int], list[int]]
    encode: Callable[[str], list[int]] | None


def torch_engine(model: Any, tokenizer: Any) -> Engine:
    """The torch model that artefacts are compared with."""
    from transformers import GenerationConfig

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        values: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return values

    @torch.no_grad()
    def greedy(ids: list[int], count: int) -> list[int]:
        before = model.generation_config
        model.generation_config = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=0)
        try:
            prompt = torch.tensor([ids])
            written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count)
        finally:
            model.generation_config = before
        continuation: list[int] = written[0, len(ids) :].tolist()
        return continuation

    def encode(text: str) -> list[int]:
        token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return token_ids

    return Engine(f"torch {torch.__version__}", "f32", model.get_input_embeddings().weight.shape[0], logits, greedy, encode)
