"""The keys of a GGUF file about the tokenizer, derived from the fast tokenizer of transformers beside the weights.

llama.cpp has two kinds. The byte-level BPE (`gpt2`: Llama 3, Qwen, SmolLM) must be told how text is split before it (`pre`). The
other follows SentencePiece (`llama`: Llama 2, Mistral, Gemma) and uses a score per token instead of a list of merges. It puts the
piece with the highest score together first. To get the order of the merges, a token's score is minus the rank of the first merge
that makes it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.errors import UsageError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PRE_OF_SPLIT = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""How a tokenizer.json splits text before BPE -> llama.cpp's name for it."""


def add_tokenizer(writer: Any, tokenizer: Any, *, vocab_size: int, ends: Sequence[int]) -> list[str]:
    """Add the keys `tokenizer.*` to a GGUF file under construction.

    Args:
        writer: `gguf.GGUFWriter`.
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; rows without a token get a placeholder.
        ends: the tokens with which the model ends its turn.

    Returns:
        Sentences about what llama.cpp may do differently.

    Raises:
        UsageError: llama.cpp has no such tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "the tokenizer has no tokenizer.json, which the tokens of a GGUF are read from; save it as a fast tokenizer"
        )
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise UsageError(f"the tokenizer is of type {model['type']}, and GGUF export knows BPE; use the form padded or onnx")
    if not model["merges"]:
        raise UsageError("the tokenizer has no merges, and llama.cpp needs them; use the form padded or onnx")
    notes = []
    byte_level = "ByteLevel" in _steps(data["pre_tokenizer"])
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    if byte_level:
        pre = _pre(data["pre_tokenizer"])
        if pre is None:
            notes.append(
                "llama.cpp has no name for the way this tokenizer splits text, so the file says `default`, and llama.cpp may "
                "split text differently; `verify` counts how often"
            )
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    else:
        writer.add_tokenizer_pre("default")
        normalizer = data["normalizer"] or {}
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
        metaspace = _steps(data["pre_tokenizer"]).get("Metaspace", {})
        writer.add_add_space_prefix("Prepend" in steps or metaspace.get("prepend_scheme") in ("first", "always"))
    tokens, types = _tokens(tokenizer, data, vocab_size, byte_level=byte_level)
    writer.add_token_list(tokens)
    if not byte_level:
        rank: dict[str, int] = {}  # of the first merge that makes a token
        for index, pair in enumerate(model["merges"], start=1):
            rank.setdefault("".join(pair), index)
        writer.add_token_scores(
            [-float(rank.get(token, 0)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]
        )
    writer.add_token_types(types)
    _add_special(writer, tokenizer, ends)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif tokenizer.chat_template:
        writer.add_chat_template([{"name": name, "template": text} for name, text in tokenizer.chat_template.items()])
    return notes


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The steps of a pre-tokenizer, by type."""
    return {step["type"]: step for step in _in_order(pre_tokenizer)}


def _in_order(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, of which several may be of one type."""
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _pre(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for a byte-level tokenizer's pre-tokenizer; None if it has none."""
    steps = _steps(pre_tokenizer)
    if len(steps) != len(_in_order(pre_tokenizer)):  # llama.cpp's names stand for one step of a type
        return None
    level = steps.pop("ByteLevel")
    if level.get("add_prefix_space"):
        return None
    if level.get("use_regex", True):  # then the regex is GPT-2's
        if not steps:
            return "gpt-2"
        digits = steps.pop("Digits", None)
        return "smollm" if digits is not None and digits["individual_digits"] and not steps else None
    split = steps.pop("Split", None)
    if split is None or steps:
        return None
    return _PRE_OF_SPLIT.get(split["pattern"].get("Regex", ""))


def _tokens(tokenizer: Any, data: Mapping[str, Any], vocab_size: int, *, byte_level: bool) -> tuple[list[str], list[int]]:
    """The token of each row of the embedding, and its type."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UsageError(
            f"the tokenizer has token {max(by_id):,}, but the model has only {vocab_size:,} rows; get the right tokenizer"
        )
    added = {token["id"]: bool(token["special"]) for token in data["added_tokens"]}
    unknown = tokenizer.unk_token_id if not byte_level else None
    tokens, types = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            kind = _UNUSED
        elif index == unknown:
            kind = _UNKNOWN
        elif index in added:
            kind = _CONTROL if added[index] else _USER_DEFINED
        elif not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = _BYTE
        else:
            kind = _NORMAL
        if kind == _USER_DEFINED and not byte_level:
            token = str(token).replace("▁", " ")
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(kind)
    return tokens, types


def _add_special(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if other := [end for end in ends if end != tokenizer.eos_token_id]:
        writer.add_eot_token_id(other[0])
    ids = tokenizer("x", verbose=False)["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
