"""From a SPEC of text to the batches of a run: calibration by iteration, training by stage, held-out windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import SELF, Source, documents, domains, texts
from adapt_pruner.data.tokens import batches_of, calibration_ids, calibration_windows, evaluation_windows
from adapt_pruner.errors import UsageError

__all__ = ["MICRO_TOKENS", "calibration_feed", "held_out_by_text", "held_out_windows", "text_batches", "too_long"]

MICRO_TOKENS = 256  # calibration tokens in one forward and backward pass: activations take about 1 MB a token in a 135M model


def calibration_feed(
    model: Any,
    tokenizer: Any,
    *,
    source: Source,
    samples: int,
    length: int,
    ids: str | None,
    seed: int,
    dtype: str = "float32",
    on_tokens: Callable[[int, int], None] = lambda done, of: None,
) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches, int64 [batch, length].

    Windows of a text are drawn again for every iteration. Fixed `ids` stay the same, and so does self-written text, which the
    model writes once, as it is now. Each text of a mixture gives its share of the samples. If the model writes the text, `dtype`
    is the precision of its matrix products and `on_tokens` is called with (done, of), in tokens.

    Raises:
        UsageError: a text does not exist, is too short, or has a share below one sample.
    """
    shares = domains(source)
    if ids is not None:
        rows: Sequence[Tensor] = calibration_ids(ids, vocab_size=model.config.vocab_size)
    elif SELF in shares:
        written = selfwritten_windows(
            model, tokenizer, samples=samples, length=length, seed=seed, dtype=dtype, on_tokens=on_tokens
        )
        rows = written.split(1)
    else:
        by_spec = {spec: documents(spec) for spec in shares}
        counts = _apportioned(samples, shares, what="calibration.samples")
        encoded: dict[str, dict[int, NDArray[np.int32]]] = {spec: {} for spec in shares}

        def draw(iteration: int) -> list[Tensor]:
            windows = torch.cat([
                calibration_windows(
                    tokenizer, by_spec[spec], samples=counts[spec], length=length,
                    seed=seed * 1_000_003 + iteration, encoded=encoded[spec],
                )
                for spec in shares
            ])  # fmt: skip
            return batches_of(windows.split(1), max_tokens=MICRO_TOKENS)

        draw(0)  # refuses a text that is too short before any work is done
        return draw
    batches = batches_of(rows, max_tokens=MICRO_TOKENS)
    return lambda iteration: batches


def text_batches(tokenizer: Any, text: Source, *, samples: int, length: int, seed: int = 0) -> list[Tensor]:
    """Random windows of a text as batches, for calibration or for a training loop of one's own.

    Args:
        tokenizer: a transformers tokenizer.
        text: SPEC of the text, or SPEC -> weight for a mixture.
        samples: number of windows; no two overlap.
        length: tokens of each.
        seed: of the draw.

    Returns:
        int64 [batch, length] each, of at most 2,048 tokens; or of one window, if that is longer.

    Raises:
        UsageError: a text does not exist, is too short, or has a share below one sample.
    """
    draw = calibration_feed(None, tokenizer, source=text, samples=samples, length=length, ids=None, seed=seed)
    return draw(1)


def too_long(config: Any, lengths: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each setting that asks for longer sequences, in tokens, than the model was made to read."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for setting, length in lengths.items():
        if positions is not None and length > positions:
            yield f"{setting} of {length:,} tokens is longer than the {positions:,} that the model reads; give {positions} or less"


def held_out_windows(tokenizer: Any, *, source: Source, window: int, max_windows: int | None) -> list[Tensor]:
    """The windows of `held_out_by_text`, one text after the other."""
    by_text = held_out_by_text(tokenizer, source=source, window=window, max_windows=max_windows)
    return [ids for windows in by_text.values() for ids in windows]


def held_out_by_text(tokenizer: Any, *, source: Source, window: int, max_windows: int | None) -> dict[str, list[Tensor]]:
    """Evaluation windows of a text, or of each text of a mixture, by SPEC; see `data.tokens.evaluation_windows`.

    Each text of a mixture gives its share of `max_windows`, or all its windows without such a limit.

    Raises:
        UsageError: a text does not exist, is too short, has a share below one window, or is `self`.
    """
    shares = domains(source)
    if SELF in shares:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    counts = dict.fromkeys(shares) if max_windows is None else _apportioned(max_windows, shares, what="max_windows")
    return {spec: evaluation_windows(tokenizer, texts(spec), window=window, max_windows=count) for spec, count in counts.items()}


def _apportioned(number: int, shares: Mapping[str, float], *, what: str) -> dict[str, int]:
    """`number` in whole parts by share; what rounding down leaves goes to the largest fractions.

    Raises:
        UsageError: a part would be 0.
    """
    counts = {spec: int(number * share) for spec, share in shares.items()}
    by_fraction = sorted(shares, key=lambda spec: counts[spec] - number * shares[spec])
    for spec in by_fraction[: number - sum(counts.values())]:
        counts[spec] += 1
    for spec, count in counts.items():
        if not count:
            raise UsageError(
                f"{what} {number} leaves nothing for {spec!r}, whose share is {shares[spec]:.1%}; raise {what}, or the weight of "
                "this text"
            )
    return counts
