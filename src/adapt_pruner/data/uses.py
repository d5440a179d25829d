"""How often a text uses each token."""

import itertools
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.data.pieces import ids_in_pieces
from adapt_pruner.data.sources import Source, documents, domains, written_spec
from adapt_pruner.errors import UsageError

_TEXTS = 256  # documents tokenised at a time
_SHORT = 2**14  # characters; a longer document is tokenised alone, piece by piece


def token_uses(tokenizer: Any, source: Source, *, size: int) -> Tensor:
    """How often each token occurs in a text; for a mixture, in a text as long as all together with the mixture's shares.

    uses[t] = Σ_s share_s · count_s[t] / n_s · Σ_s n_s        with n_s the tokens of text s; for one text, count[t]

    Args:
        tokenizer: a transformers tokenizer.
        source: SPEC of text, or several with their weights.
        size: rows of the model's embedding; tokens numbered beyond them are left out.

    Returns:
        float64 [size].

    Raises:
        UsageError: there is no such text, or it is `self`.
    """
    shares = domains(source)
    if by_model := next((spec for spec in shares if written_spec(spec) is not None), None):
        raise UsageError(f"text {by_model!r} is written only after the vocabulary is chosen; name a text in vocabulary.source")
    frequencies, total = torch.zeros(size, dtype=torch.float64), 0
    for spec, share in shares.items():
        texts, counts = documents(spec), torch.zeros(size, dtype=torch.float64)
        for start in range(0, len(texts), _TEXTS):
            some = texts[start : start + _TEXTS]
            short, long = [text for text in some if len(text) <= _SHORT], [text for text in some if len(text) > _SHORT]
            together = tokenizer(short, verbose=False)["input_ids"] if short else []
            for ids in itertools.chain(together, *(ids_in_pieces(tokenizer, [text]) for text in long)):
                counts += torch.bincount(torch.as_tensor(ids, dtype=torch.int64), minlength=size)[:size]
        frequencies += share * counts / counts.sum().clamp(min=1)
        total += int(counts.sum())
    return (frequencies * total).round(decimals=6)
