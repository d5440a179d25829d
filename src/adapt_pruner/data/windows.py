"""From a SPEC of text to the batches of a run: calibration by iteration, training by stage, held-out windows."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapt_pruner.data.chat import encode_chats
from adapt_pruner.data.fixed import Written, written_text
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import MAX_HUB_DOCUMENTS, SELF, Source, beginning, domains, texts, written_spec
from adapt_pruner.data.tokens import batches_of, calibration_ids, calibration_windows, evaluation_windows, joined_windows
from adapt_pruner.errors import UsageError

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
    written: Written = MappingProxyType({}),
) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches, int64 [batch, length].

    Windows of a text are drawn again for every iteration. Conversations are read in the tokenizer's chat template, if it has one. Fixed `ids` stay the same, and so does self-written text, which the
    model writes once, as it is now. Each text of a mixture gives its share of the samples. If the model writes the text, `dtype`
    is the precision of its matrix products and `on_tokens` is called with (done, of), in tokens. `written` is what the dense model
    wrote before, by its SPEC.

    Raises:
        UsageError: a text does not exist, is too short, or has a share below one sample.
    """
    shares = domains(source)
    if ids is not None:
        rows: Sequence[Tensor] = calibration_ids(ids, vocab_size=model.config.vocab_size)
    elif SELF in shares:
        windows = selfwritten_windows(
            model, tokenizer, samples=samples, length=length, seed=seed, dtype=dtype, on_tokens=on_tokens
        )
        rows = windows.split(1)
    else:
        counts = _apportioned(samples, shares, what="calibration.samples")
        windows_of = {spec: _windows_of(tokenizer, spec, written, samples=counts[spec], length=length) for spec in shares}

        def draw(iteration: int) -> list[Tensor]:
            windows = torch.cat([draw_of(seed * 1_000_003 + iteration) for draw_of in windows_of.values()])
            return batches_of(windows.split(1), max_tokens=MICRO_TOKENS)

        draw(0)  # refuses a text that is too short before any work is done
        return draw
    batches = batches_of(rows, max_tokens=MICRO_TOKENS)
    return lambda iteration: batches


def _windows_of(tokenizer: Any, spec: str, written: Written, *, samples: int, length: int) -> Callable[[int], Tensor]:
    """A function from a seed to windows of a text, int64 [samples, length]; conversations follow one another in random order."""
    encoded: dict[int, NDArray[np.int32]] = {}
    by_model = written_spec(spec) is not None
    if by_model:
        store = written_text(written, spec)
        rows = [store.ids[start:stop].astype(np.int32) for start, stop in itertools.pairwise(store.offsets)]
    else:
        documents = list(beginning(spec, MAX_HUB_DOCUMENTS))
        if not (documents and documents[0].messages and getattr(tokenizer, "chat_template", None)):
            plain = [document.text for document in documents]
            return lambda seed: calibration_windows(tokenizer, plain, samples=samples, length=length, seed=seed, encoded=encoded)
        rows = [np.array(ids, np.int32) for ids, _ in encode_chats(tokenizer, documents)]
    return lambda seed: joined_windows(tokenizer, rows, samples=samples, length=length, seed=seed, repeat=by_model)


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


def held_out_by_text(
    tokenizer: Any, *, source: Source, window: int, max_windows: int | None, written: Written = MappingProxyType({})
) -> dict[str, list[Tensor]]:
    """Evaluation windows of a text, or of each text of a mixture, by SPEC; see `data.tokens.evaluation_windows`.

    Each text of a mixture gives its share of `max_windows`, or all its windows without such a limit. Of what the dense model wrote
    (`written`) a text is a window, cut at `window` tokens.

    Raises:
        UsageError: a text does not exist, is too short, has a share below one window, or is `self`.
    """
    shares = domains(source)
    if SELF in shares:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    counts = dict.fromkeys(shares) if max_windows is None else _apportioned(max_windows, shares, what="max_windows")
    by_text = {}
    for spec, count in counts.items():
        if written_spec(spec) is None:
            by_text[spec] = evaluation_windows(tokenizer, texts(spec), window=window, max_windows=count)
        else:
            store = written_text(written, spec)
            spans = itertools.islice(itertools.pairwise(store.offsets), count)
            by_text[spec] = [torch.from_numpy(store.ids[start:stop][:window].astype(np.int64))[None] for start, stop in spans]
    return by_text


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
