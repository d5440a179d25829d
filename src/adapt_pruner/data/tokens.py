"""From documents to token ids: calibration windows, training blocks, evaluation windows, and how often each token is used."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.data.pieces import ids_in_pieces
from adapt_pruner.data.sources import Source, documents, domains, written_spec
from adapt_pruner.errors import UsageError

_JOINT = "\n\n"
_TEXTS = 256  # documents tokenised at a time
_SHORT = 2**14  # characters; a longer document is tokenised alone, piece by piece


def opening(tokenizer: Any) -> list[int]:
    """The ids that begin every window: [bos] if the tokenizer puts it before a text by itself, as in training; else nothing.

    A model that never saw a text without it reads such text badly: the perplexity of Gemma 3 270M on WikiText-2 is 57 with it and
    144 without.
    """
    ids: list[int] = tokenizer("x", verbose=False)["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, parts: Iterable[str], *, most: int | None = None) -> NDArray[np.int32]:
    """Token ids of the text that `parts` form one after another, without the `opening`; other added tokens are kept.

    Args:
        most: the number of ids wanted; no more text is read than they need.
    """
    skipped = len(opening(tokenizer))
    end = None if most is None else most + skipped
    pieces, count = [], 0
    for ids in ids_in_pieces(tokenizer, parts):
        pieces.append(ids.astype(np.int32))
        count += len(ids)
        if end is not None and count >= end:
            break
    return np.concatenate(pieces)[skipped:end]


def calibration_windows(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int,
    encoded: dict[int, NDArray[np.int32]] | None = None,
) -> Tensor:
    """`samples` random windows of `length` tokens: first one per document, then more of long documents, then joined short ones.

    Each begins with the tokenizer's `opening`, which counts towards its `length`.

    Args:
        encoded: index of a text -> its ids; filled in place, so that the next draw does not tokenise again.

    Returns:
        int64 [samples, length]; the same seed gives the same windows. No two overlap.

    Raises:
        UsageError: the text is too short for `samples` windows.

    Source: Adapt-Pruner's sampling (a random window of a document not used before). Differs: continues where theirs fails.
    """
    generator = torch.Generator().manual_seed(seed)
    start = opening(tokenizer)
    inner = length - len(start)  # tokens of the text in a window
    first: list[NDArray[np.int32]] = []
    more: list[NDArray[np.int32]] = []
    short: list[NDArray[np.int32]] = []
    encoded = {} if encoded is None else encoded
    for index in torch.randperm(len(texts), generator=generator).tolist():
        if index not in encoded:
            encoded[index] = encode(tokenizer, [texts[index]])
        ids = encoded[index]
        count = len(ids) // inner
        if count == 0:
            short.append(ids)
            continue
        offset = int(torch.randint(len(ids) - count * inner + 1, (1,), generator=generator))
        windows = [ids[offset + i * inner : offset + (i + 1) * inner] for i in range(count)]
        chosen = int(torch.randint(count, (1,), generator=generator))
        first.append(windows.pop(chosen))
        more += windows
        if len(first) == samples:
            break
    if len(first) < samples:
        order = torch.randperm(len(more), generator=generator).tolist()
        first += [more[i] for i in order[: samples - len(first)]]
    if len(first) < samples and short:
        joined = np.concatenate(short)
        first += [joined[at : at + inner] for at in range(0, len(joined) - inner + 1, inner)][: samples - len(first)]
    if len(first) < samples:
        raise _too_short(len(first), samples, length)
    return torch.stack([_opened(start, ids) for ids in first])


def joined_windows(
    tokenizer: Any, rows: Sequence[NDArray[np.int32]], *, samples: int, length: int, seed: int, repeat: bool = False
) -> Tensor:
    """`samples` windows of `length` tokens of rows that follow one another in random order; no two overlap.

    Each begins with the tokenizer's `opening`, which counts towards its `length`. With `repeat` the rows come again if they are too
    short.

    Returns:
        int64 [samples, length]; the same seed gives the same windows.

    Raises:
        UsageError: the rows are too short for so many windows.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    start = opening(tokenizer)
    inner, total = length - len(start), sum(map(len, rows))
    if total < samples * inner and not repeat:
        raise _too_short(total // inner, samples, length)
    together = np.resize(np.concatenate([rows[index] for index in order]), max(total, samples * inner))
    return torch.stack([_opened(start, together[at * inner : (at + 1) * inner]) for at in range(samples)])


def _too_short(num_windows: int, samples: int, length: int) -> UsageError:
    return UsageError(
        f"the calibration text gives {num_windows} windows of {length} tokens, but {samples} are asked for; "
        "give more text, or lower calibration.samples or calibration.length"
    )


def _opened(start: list[int], ids: NDArray[np.int32]) -> Tensor:
    return torch.cat([torch.tensor(start, dtype=torch.int64), torch.from_numpy(ids.astype(np.int64))])


def digest_of(rows: Sequence[Tensor]) -> str:
    """The SHA-256 of token ids, row by row."""
    return hashlib.sha256(to_json([row.tolist() for row in rows]).encode()).hexdigest()


def calibration_ids(path: str | Path, *, vocab_size: int) -> list[Tensor]:
    """The exact token ids in a JSON file {"input_ids": [[…], …]}, one int64 [1, length] tensor a row.

    Raises:
        UsageError: the file is not such JSON, or holds an id outside the vocabulary.
    """
    try:
        rows = read_json(expanded(path))["input_ids"]
        if not all(type(number) is int for row in rows for number in row):
            raise TypeError("not all of them are whole numbers")
        tensors = [torch.tensor(row, dtype=torch.long)[None] for row in rows]
    except FileNotFoundError as error:
        raise UsageError(
            f"calibration ids {str(path)!r} do not exist; give a JSON file with input_ids, a list of lists"
        ) from error
    except OSError as error:
        raise UsageError(f"calibration ids {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (OverflowError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not contain token ids ({error}); write it as JSON with input_ids, a list of lists of integers"
        ) from error
    if not tensors or any(row.dim() != 2 or row.shape[1] < 2 for row in tensors):
        raise UsageError(f"{path} must contain at least one sequence of at least 2 token ids")
    low, high = min(int(row.min()) for row in tensors), max(int(row.max()) for row in tensors)
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"{path} contains token id {high if high >= vocab_size else low}, but the model's vocabulary is 0 to {vocab_size - 1}"
        )
    return tensors


def batches_of(rows: Sequence[Tensor], *, max_tokens: int) -> list[Tensor]:
    """Join neighbouring rows [1, length] of equal length into batches of at most `max_tokens` tokens, or of one longer row."""
    batches: list[list[Tensor]] = []
    for row in rows:
        last = batches[-1] if batches else []
        if last and last[0].shape == row.shape and (len(last) + 1) * row.shape[1] <= max_tokens:
            last.append(row)
        else:
            batches.append([row])
    return [torch.cat(batch) for batch in batches]


def evaluation_windows(tokenizer: Any, texts: Iterable[str], *, window: int, max_windows: int | None) -> list[Tensor]:
    """The text cut into non-overlapping windows; documents are joined by a blank line. Reads no more than it needs.

    Each begins with the tokenizer's `opening`, which counts towards its `window` and predicts the first token of the text.

    Returns:
        int64 [1, window] tensors; the last may be shorter, but one of a single token is left out.

    Raises:
        UsageError: the text is shorter than 2 tokens, or `window` is.
    """
    if window < 2:
        raise UsageError(f"window {window} predicts nothing; give at least 2 tokens")
    start = opening(tokenizer)
    inner = window - len(start)
    joined = itertools.islice(itertools.chain.from_iterable((_JOINT, text) for text in texts), 1, None)
    ids = encode(tokenizer, joined, most=None if max_windows is None else max_windows * inner)
    windows = [_opened(start, ids[i : i + inner])[None] for i in range(0, len(ids), inner)]
    windows = [ids for ids in windows if ids.shape[1] >= 2][:max_windows]
    if not windows:
        raise UsageError(f"the text is {len(ids)} tokens long; perplexity needs at least 2")
    return windows


def in_other_tokens(windows: Sequence[Tensor], *, read_by: Any, tokenizer: Any) -> list[Tensor]:
    """The text of each window in the tokens of another tokenizer, so that both models are measured on the same text.

    A character that the edge of a window cuts in two is left out. A window keeps its text even if it gets more or fewer tokens.

    Args:
        windows: int64 [1, length] each.
        read_by: the transformers tokenizer that made the windows.
        tokenizer: the other one; each new window begins with its `opening`.

    Returns:
        int64 [1, length] each; a window whose text becomes a single token is left out, because it predicts nothing.
    """
    skipped, start = len(opening(read_by)), opening(tokenizer)
    pieces = (read_by.decode(ids[0, skipped:], clean_up_tokenization_spaces=False).strip("\ufffd") for ids in windows)
    retold = [_opened(start, encode(tokenizer, [piece]))[None] for piece in pieces]
    return [ids for ids in retold if ids.shape[1] >= 2]


def text_bytes(tokenizer: Any, windows: Sequence[Tensor]) -> int:
    """UTF-8 bytes of the text behind the tokens of `windows`, without the first token of each, which is not predicted.

    Losses divided by this number compare between tokenizers. A token that is a part of a character counts the bytes of that part.
    Special tokens (start and end of text) count none. If the tokenizer changes its text, the changed text counts.
    Args:
        tokenizer: a transformers tokenizer.
        windows: int64 [batch, length].
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    byte_level = "ByteLevel" in repr(decoder)  # then each character of a token stands for a byte
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
    lengths: dict[int, int] = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            lengths[index] = 0
        elif byte_level and index not in added:
            lengths[index] = len(token)
        else:
            lengths[index] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    return sum(lengths[index] for ids in windows for index in ids[:, 1:].flatten().tolist())


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
