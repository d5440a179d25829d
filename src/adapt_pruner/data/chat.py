"""Conversations as token ids in the tokenizer's own chat template, and which tokens the assistant says."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from adapt_pruner.data.sources import Document
from adapt_pruner.errors import UsageError

__all__ = ["chat_template", "encode_chats"]

_MARKS_ITSELF = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template.

    Raises:
        UsageError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UsageError(
            "the training text is conversations and the model's tokenizer has no chat template; "
            "train an instruction-tuned model, or give plain text in a field 'text'"
        ) from error


def encode_chats(tokenizer: Any, chats: Sequence[Document]) -> list[tuple[list[int], list[bool]]]:
    """Each conversation's token ids, and for each token whether the assistant says it.

    The assistant says its message and the token that ends its turn, not the header before it and not the line end after it. If
    the template itself marks this (`{% generation %}`), the marks are used. Otherwise it is the text that an assistant's message
    adds to the conversation before it with the header of the turn. A message that opens the conversation answers nothing and is
    left out. A token counts if its last character does.

    Raises:
        UsageError: there is no template, a conversation does not fit it, or the template writes earlier messages
            differently once later ones follow.
    """
    if _MARKS_ITSELF.search(chat_template(tokenizer)):
        tokenized = _applied(tokenizer, chats, return_dict=True, return_assistant_tokens_mask=True)
        return [
            (ids, [bool(mark) for mark in marks])
            for ids, marks in zip(tokenized["input_ids"], tokenized["assistant_masks"], strict=True)
        ]
    if not tokenizer.is_fast:
        raise UsageError(
            "training on conversations needs a fast tokenizer (tokenizer.json); convert the model's, or give plain text"
        )
    texts: list[str] = _applied(tokenizer, chats, tokenize=False)
    ends = tuple(tokenizer.get_added_vocab())
    tokenized = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    encoded = []
    for chat, text, ids, offsets in zip(chats, texts, tokenized["input_ids"], tokenized["offset_mapping"], strict=True):
        spans = _said(tokenizer, chat, text, ends)
        encoded.append((ids, [any(start < end <= stop for start, stop in spans) for _, end in offsets]))
    return encoded


def _said(tokenizer: Any, chat: Document, text: str, ends: tuple[str, ...]) -> list[tuple[int, int]]:
    """The ranges of characters of the rendered `text` that the assistant says: first and one past the last, turn by turn."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant" or not index:  # an opening message answers nothing
            continue
        before = _rendered(tokenizer, chat, chat.messages[:index], add_generation_prompt=True)
        after = _rendered(tokenizer, chat, chat.messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise UsageError(
                f"the chat template writes the messages of {chat.name} differently once message {index + 1} follows, so the "
                "assistant's words cannot be told apart; mark them in the template with {% generation %}, or leave such conversations out"
            )
        turn = after[len(before) :].rstrip()
        stop = len(before) + len(turn) if turn.endswith(ends) else len(after)  # leaves out a line end after the end of turn
        spans.append((len(before), stop))
    return spans


def _applied(tokenizer: Any, chats: Sequence[Document], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([list(chat.messages) for chat in chats], **options)
    except (TemplateError, LookupError, TypeError, ValueError):
        for chat in chats:  # find the conversation that fails, and raise an error that names it
            _rendered(tokenizer, chat, chat.messages)
        raise


def _rendered(tokenizer: Any, chat: Document, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{chat.name} does not fit the tokenizer's chat template ({error}); correct the conversation or leave it out"
        ) from error
