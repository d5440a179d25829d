"""The engine that an artefact runs in; it gives logits, greedy text and token ids. Torch, as the reference, is one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Engine:
    """An open artefact.

    Attributes:
        name: name of the engine, with its version.
        stored: number format of the stored weights: `f32`, `bf16`, `q8_0`, …
        vocab_size: logits per token.
        logits: ids -> float32 [length, vocabulary].
        encode: text -> ids, including what the engine puts before a text by itself; None if it has no tokenizer.
        written: ids, n -> the n tokens that the engine's own loop writes after them, greedily; None if it has no such loop.
    """

    name: str
    stored: str
    vocab_size: int
    logits: Callable[[list[int]], Tensor]
    encode: Callable[[str], list[int]] | None
    written: Callable[[list[int], int], list[int]] | None = None

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next `count` tokens, each the one with the highest logit after those before it."""
        if self.written is not None:
            return self.written(ids, count)
        continuation: list[int] = []
        while len(continuation) < count:
            continuation.append(int(self.logits(ids + continuation)[-1].argmax()))
        return continuation


def torch_engine(model: Any, tokenizer: Any) -> Engine:
    """The torch model that artefacts are compared with."""

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        values: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return values

    vocab_size = model.get_input_embeddings().weight.shape[0]
    return Engine(
        f"torch {torch.__version__}", "f32", vocab_size, logits, lambda text: tokenizer(text, verbose=False)["input_ids"]
    )
