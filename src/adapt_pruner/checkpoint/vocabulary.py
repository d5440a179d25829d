"""A tokenizer with fewer tokens: which tokens can go so that it still writes any text, and a tokenizer without them.

The set of kept tokens is closed. It has all bytes, or single characters if the tokenizer has no bytes, so that every text can be
written. For a token that is put together by merges (BPE), it also has the tokens that it is put together from, so that the token
can still be reached. A text whose tokens all stay is then split as before. BPE applies the first merge that fits, and at every
step that merge is one that stays. Unigram takes the likeliest split, and the likeliest of all splits is among those left.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"  # SentencePiece's space; if it were spelled in bytes, it would be read back as this character
_TALK = ({"role": "system", "content": ""}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""})


def kept_tokens(
    tokenizer: Any, uses: Tensor, *, keep: int | None = None, min_uses: int | None = None, named: Iterable[int] = ()
) -> Tensor:
    """The tokens that stay: those a text uses most, with all tokens that they are put together from.

    Some tokens stay whatever their use: added tokens (special ones included), the bytes, what the chat template writes around
    messages, and `named`. Embedding rows without a token go. Then tokens enter by their use, among equals the first one. Each
    brings the tokens that it is put together from, as long as all fit into `keep`.

    Args:
        tokenizer: fast, BPE or Unigram.
        uses: float64 [rows of the model's embedding]; how often each token is used.
        keep: the number of tokens that stay.
        min_uses: instead of `keep`, the least uses for which a token stays.
        named: tokens that the model's configs name.

    Returns:
        bool [rows], for `smaller_tokenizer`.

    Added tokens without a row of the embedding do not count: no text that the model can read has them.

    Raises:
        UsageError: the tokenizer cannot be rewritten, or `keep` is below the tokens that always stay or not below the number of
            rows.
    """
    data, rows = _description(tokenizer), uses.numel()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    needed = _always(data, vocabulary)
    for token in [token for token, index in added.items() if index >= rows and index not in needed]:  # Gemma 3's image token
        vocabulary.pop(token)
        added.pop(token)
    last = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[last] >= rows:
        raise UsageError(
            f"the tokenizer's token {last!r} has number {vocabulary[last]:,} but the model has {rows:,} rows, so their "
            "vocabularies differ; leave vocabulary out"
        )
    if keep is not None and keep >= rows:
        raise UsageError(f"vocabulary.keep {keep:,} is not below the {rows:,} tokens the model has; lower it")
    parts = _Parts(data["model"], vocabulary)
    kept = {*added.values(), *needed, *_around_messages(tokenizer), *named} & set(vocabulary.values())
    for token, index in vocabulary.items():
        if index in kept and token not in added:
            kept |= parts.of(token)
    if keep is not None and keep < len(kept):
        raise UsageError(
            f"vocabulary.keep {keep:,} is below the {len(kept):,} tokens that always stay (bytes, special tokens); raise it"
        )
    for token in sorted(vocabulary, key=lambda token: (-float(uses[vocabulary[token]]), vocabulary[token])):
        if len(kept) == keep or (min_uses is not None and uses[vocabulary[token]] < min_uses):
            break
        if vocabulary[token] not in kept:
            entering = parts.of(token) - kept
            if keep is None or len(kept) + len(entering) <= keep:
                kept |= entering
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[sorted(kept)] = True
    return mask


def smaller_tokenizer(tokenizer: Any, keep: Tensor) -> Any:
    """A tokenizer with only the tokens that stay, renumbered in their order; the given tokenizer is left as found.

    Args:
        tokenizer: fast, BPE or Unigram.
        keep: bool [rows], from `kept_tokens`.

    Returns:
        A tokenizer of the same class, settings and chat template.

    Raises:
        UsageError: the tokenizer cannot be rewritten.
    """
    data = _description(tokenizer)
    new = {old: index for index, old in enumerate(keep.nonzero().flatten().tolist())}
    model = data["model"]
    if model["type"] == "BPE":
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
        model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    else:
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = new.get(model["unk_id"])
    beyond = {token["content"] for token in data["added_tokens"] if token["id"] >= keep.numel()}  # its class may add them again
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] in new]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    for numbers in _numbers(data):
        numbers[:] = [new[old] for old in numbers]
    if data["padding"] is not None:
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(to_json(data), encoding="utf-8")
        smaller = type(tokenizer).from_pretrained(folder)
    inside = {token: index for token, index in smaller.get_vocab().items() if token not in beyond}
    if inside != {token: new[old] for token, old in tokenizer.get_vocab().items() if old in new}:
        raise _not_rewritten(f"its class {type(tokenizer).__name__} changes what tokenizer.json says")
    return smaller


class _Parts:
    """The tokens from which a tokenizer's merges put each token together; without merges (Unigram), only the token itself."""

    def __init__(self, model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model.get("merges", ()))}
        self._vocabulary = vocabulary

    def of(self, token: str) -> set[int]:
        """The token itself and every token that occurs while single characters are merged into it."""
        met, pieces = {token}, list(token) if self._ranks else [token]
        met.update(pieces)
        while len(pieces) > 1:
            ranks = [self._ranks.get(pair, math.inf) for pair in itertools.pairwise(pieces)]
            first = min(ranks)
            if first == math.inf:
                break
            at = ranks.index(first)
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            met.add(pieces[at])
        return {self._vocabulary[piece] for piece in met if piece in self._vocabulary}


def _description(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer, as plain data; refuses a tokenizer that cannot be rewritten."""
    if not getattr(tokenizer, "is_fast", False):
        raise _not_rewritten("it has no tokenizer.json")
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise _not_rewritten(f"it is of type {model['type']}, and only BPE and Unigram are known")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _not_rewritten("its merges add prefixes or suffixes to tokens")
    list(_numbers(data))
    return data


def _not_rewritten(why: str) -> UsageError:
    return UsageError(f"the model's tokenizer cannot be rewritten for fewer tokens: {why}; leave vocabulary out")


def _numbers(data: Mapping[str, Any]) -> Iterator[list[int]]:
    """The lists of token numbers that a tokenizer adds around a text; they may be changed in place."""
    steps = [data["post_processor"]] if data["post_processor"] else []
    for step in steps:
        if step["type"] == "Sequence":
            steps += step["processors"]
        elif step["type"] == "TemplateProcessing":
            yield from (special["ids"] for special in step["special_tokens"].values())
        elif step["type"] != "ByteLevel":
            raise _not_rewritten(f"its post-processor {step['type']} is not known")


def _always(data: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Collection[int]:
    """The tokens needed to write every text, and those that the tokenizer itself names."""
    model = data["model"]
    spelled = model.get("byte_fallback") and vocabulary.keys() >= _BYTES
    ids = {vocabulary[token] for token in vocabulary if (token in _BYTES or token == _SPACE if spelled else len(token) == 1)}
    ids.update(number for numbers in _numbers(data) for number in numbers)
    unknown = model["unk_id"] if model["type"] == "Unigram" else vocabulary.get(model["unk_token"])
    padding = None if data["padding"] is None else data["padding"]["pad_id"]
    return ids | {number for number in (unknown, padding) if number is not None}


def _around_messages(tokenizer: Any) -> Collection[int]:
    """The tokens that the chat template writes around messages: roles, line ends, a system prompt of its own."""
    ids: set[int] = set()
    for talk in (_TALK, _TALK[1:]) if tokenizer.chat_template else ():
        try:
            ids.update(tokenizer(rendered(tokenizer, talk).text, add_special_tokens=False)["input_ids"])
        except ChatTemplateError:  # for example, the template has no system role
            continue
    return ids
