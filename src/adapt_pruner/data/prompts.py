"""Prompts of ours: those that the dense model answers to be learnt from, and those that are measured, with their rules."""

import functools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.data.sources import Document

_HERE = Path(__file__).parent
_RUN = 3  # words; a prompt that shares most of a measured prompt's runs of so many words is a near copy of it
_COPIED, _LONGER = 0.6, 3
_COMMON = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "had", "has", "have", "how",
    "i", "in", "into", "is", "it", "its", "me", "my", "of", "on", "one", "or", "our", "please", "say", "tell", "than",
    "that", "the", "their", "there", "they", "this", "to", "two", "three", "four", "five", "was", "we", "were", "what",
    "when", "where", "which", "who", "why", "will", "with", "word", "words", "would", "you", "your", "name", "list",
    "give", "answer",
})  # fmt: skip
"""Words that say nothing of what a prompt asks."""


@dataclass(frozen=True)
class Prompt:
    """What a user says in one or two turns, with a system prompt or an empty one."""

    turns: tuple[str, ...]
    system: str = ""


@dataclass(frozen=True)
class Measured:
    """A prompt whose answer a rule can check.

    Attributes:
        ask: what the user says.
        names: one of these words or phrases occurs in a right answer; empty for any.
        all: each of these occurs.
        items: number of things that it lists; None for any.
        words: most words that it has; None for any.
    """

    ask: str
    names: tuple[str, ...] = ()
    all: tuple[str, ...] = ()
    items: int | None = None
    words: int | None = None


@functools.cache
def measured_prompts() -> tuple[Measured, ...]:
    """The prompts that are measured; a short run asks the first of them."""
    return tuple(
        Measured(row["ask"], tuple(row.get("names", ())), tuple(row.get("all", ())), row.get("items"), row.get("words"))
        for row in _read("measured.yaml")
    )


def our_prompts(*, long: bool) -> list[Prompt]:
    """The prompts to be learnt from, in an order that mixes all kinds.

    Args:
        long: whether those with a context of about 2,000 tokens are among them; they come last.
    """
    data = _read("prompts.yaml")
    prompts = [
        *(Prompt((ask,)) for ask in data["single"]),
        *(Prompt((row["ask"],), row["system"]) for row in data["with_system"]),
        *(Prompt((row["ask"], row["then"])) for row in data["two_turns"]),
    ]
    shuffle = random.Random(0)
    shuffle.shuffle(prompts)
    for question in data["about_passages"] if long else ():
        passages = list(data["passages"])
        shuffle.shuffle(passages)
        prompts.append(Prompt(("\n\n".join([*passages, question]),)))
    return prompts


def prompts_of(chats: Iterable[Document]) -> list[Prompt]:
    """The prompts of a person's conversations, of each the system prompt and the first two turns of the user; each prompt once."""
    prompts = []
    for chat in chats:
        contents = {
            role: [message["content"] for message in chat.messages if message["role"] == role] for role in ("system", "user")
        }
        if contents["user"]:
            prompts.append(Prompt(tuple(contents["user"][:2]), "".join(contents["system"][:1])))
    return list(dict.fromkeys(prompts))


def is_measured(text: str) -> bool:
    """Whether a text is a prompt that is measured, or comes close to one.

    It does if 60 % of that prompt's runs of three words stand in it. It also does if it has all words that say what the prompt asks
    for and is at most three times as long; if there is only one such word, at most as long.
    """
    words = _words(text)
    runs, present = _runs(words), set(words)
    for those, needed, length in _of_measured():
        if those and len(those & runs) >= _COPIED * len(those):
            return True
        if needed and needed <= present and len(words) <= length * (_LONGER if len(needed) > 1 else 1):
            return True
    return False


@functools.cache
def _of_measured() -> list[tuple[set[tuple[str, ...]], set[str], int]]:
    """Of each measured prompt its runs of words, the words that say what it asks for, and its length in words."""
    words = [_words(prompt.ask) for prompt in measured_prompts()]
    return [(_runs(those), set(those) - _COMMON, len(those)) for those in words]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1)}


def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / name).read_text(encoding="utf-8"))
