"""From a SPEC of text to the batches a run is fed: calibration by iteration, training by stage, held-out windows."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import SELF, documents
from adapt_pruner.data.tokens import batches_of, calibration_ids, calibration_windows, evaluation_windows, training_blocks
from adapt_pruner.errors import UsageError

__all__ = ["calibration_feed", "held_out_windows", "training_shards"]

_MICRO_TOKENS = 256  # calibration tokens in one forward and backward: activations take about 1 MB a token in a 135M model


def calibration_feed(
    model: Any, tokenizer: Any, *, source: str, samples: int, length: int, ids: str | None, seed: int
) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches, int64 [batch, length].

    Every iteration draws anew from a text; fixed `ids` and text the model wrote itself (once, as it is now) stay the same.

    Raises:
        UsageError: there is no such text, or it is too short.
    """
    if ids is not None:
        rows: Sequence[Tensor] = calibration_ids(ids, vocab_size=model.config.vocab_size)
    elif source == SELF:
        rows = selfwritten_windows(model, tokenizer, samples=samples, length=length, seed=seed).split(1)
    else:
        texts = documents(source)
        encoded: dict[int, list[int]] = {}

        def draw(iteration: int) -> list[Tensor]:
            windows = calibration_windows(
                tokenizer, texts, samples=samples, length=length, seed=seed * 1_000_003 + iteration, encoded=encoded
            )
            return batches_of(windows.split(1), max_tokens=_MICRO_TOKENS)

        draw(0)  # a text that is too short is refused before any work is done
        return draw
    batches = batches_of(rows, max_tokens=_MICRO_TOKENS)
    return lambda iteration: batches


def training_shards(
    tokenizer: Any, *, source: str, length: int, stage_tokens: Sequence[int], seed: int, warn: Callable[[str], None]
) -> list[Tensor]:
    """The training blocks of each stage, int32 [blocks, length], as many as its share of the tokens.

    Raises:
        UsageError: there is no such text, it is shorter than one block, or it is `self`.
    """
    if source == SELF:
        raise UsageError("training.source 'self' would train the model on its own text; it serves calibration only, name a text")
    total = sum(stage_tokens)
    blocks, there = training_blocks(tokenizer, documents(source), length=length, tokens=total, seed=seed)
    if there < blocks.numel():
        warn(f"the training text has {there:,} tokens and {total:,} are asked for, so it is repeated")
    ends = [round(done * len(blocks) / total) for done in itertools.accumulate(stage_tokens)]
    return [blocks[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def held_out_windows(tokenizer: Any, *, source: str, window: int, max_windows: int | None) -> list[Tensor]:
    """Evaluation windows of a text; see `data.tokens.evaluation_windows`.

    Raises:
        UsageError: there is no such text, it is too short, or it is `self`.
    """
    if source == SELF:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    return evaluation_windows(tokenizer, documents(source), window=window, max_windows=max_windows)
