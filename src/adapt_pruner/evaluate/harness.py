"""A model as lm-eval's own `HFLM`, which computes all likelihoods and texts of tasks; it says what it cuts off."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.errors import UsageError

_CPU_LOGITS, _DEVICE_LOGITS = 2**17, 2**20  # sequences in a pass × tokens of the vocabulary; on a CPU more only takes memory
_MOST_SEQUENCES = 32


def harness_model(
    model: Any,
    tokenizer: Any,
    *,
    dtype: str = "float32",
    on_answer: Callable[[Any], None] | None = None,
    on_cut: Callable[[int, int, int], None] | None = None,
) -> Any:
    """A model as lm-eval's `HFLM`.

    Like lm-eval, it begins texts as the tokenizer does by itself (Gemma's puts <bos> first, SmolLM2's nothing).
    `data.tokens.opening` uses the same rule for perplexity.

    Args:
        model: causal LM, in eval mode.
        tokenizer: a transformers tokenizer; left as found.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_answer: called with each likelihood or text as it comes.
        on_cut: called with (requests, of, tokens) if `requests` requests are cut off on the left to the `tokens` that the model
            reads.

    Its likelihoods raise UsageError if a continuation is longer than the model can read.
    """
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
            lengths = [(len(context), len(continuation)) for _, context, continuation in requests]
            if (longest := max((continuation for _, continuation in lengths), default=0)) > self.max_length:
                raise UsageError(
                    f"a continuation of {longest:,} tokens is longer than the {self.max_length:,} that the model reads"
                )
            cut = sum(context + continuation > self.max_length + 1 for context, continuation in lengths)
            if cut and on_cut is not None:
                on_cut(cut, len(lengths), self.max_length)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    device = next(model.parameters()).device
    logits = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS
    harness = Harness(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval adds a padding token if it is missing
        batch_size=max(1, min(_MOST_SEQUENCES, logits // model.get_output_embeddings().weight.shape[0])),
        mixed_precision_dtype="bfloat16" if uses_bfloat16(device, dtype) else None,
        softmax_dtype="float32",
    )
    if on_answer is not None:
        harness.set_cache_hook(SimpleNamespace(add_partial=lambda kind, request, answer: on_answer(answer)))
    return harness
