"""Conversations as token ids in the tokenizer's own chat template, and which tokens the assistant says."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.core.system.chat_template import ChatTemplateError, Rendered, rendered
from adapt_pruner.data.sources import Document
from adapt_pruner.errors import UsageError


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
    _check(tokenizer)
    ends = tuple(tokenizer.get_added_vocab())
    texts, answers = [], []
    for chat in chats:
        text, generated = _rendered(tokenizer, chat, chat.messages)
        texts.append(text)
        answers.append(_said(tokenizer, chat, text, ends) if generated is None else generated)
    tokenized = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return [
        (ids, [any(start < end <= stop for start, stop in spans) for _, end in offsets])
        for ids, offsets, spans in zip(tokenized["input_ids"], tokenized["offset_mapping"], answers, strict=True)
    ]


def _check(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no chat template or cannot tell where its tokens lie in a text."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError(
            "the training text is conversations and the model's tokenizer has no chat template; "
            "train an instruction-tuned model, or give plain text in a field 'text'"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(
            "training on conversations needs a fast tokenizer (tokenizer.json); convert the model's, or give plain text"
        )


def _said(tokenizer: Any, chat: Document, text: str, ends: tuple[str, ...]) -> list[tuple[int, int]]:
    """The ranges of characters of the rendered `text` that the assistant says: first and one past the last, turn by turn."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant" or not index:  # an opening message answers nothing
            continue
        before = _rendered(tokenizer, chat, chat.messages[:index], add_generation_prompt=True).text
        after = _rendered(tokenizer, chat, chat.messages[: index + 1]).text
        if not (after.startswith(before) and text.startswith(after)):
            raise UsageError(
                f"the chat template writes the messages of {chat.name} differently once message {index + 1} follows, so the "
                "assistant's words cannot be told apart; mark them in the template with {% generation %}, or leave such conversations out"
            )
        turn = after[len(before) :].rstrip()
        stop = len(before) + len(turn) if turn.endswith(ends) else len(after)  # leaves out a line end after the end of turn
        spans.append((len(before), stop))
    return spans


def _rendered(tokenizer: Any, chat: Document, messages: Sequence[Mapping[str, Any]], **options: bool) -> Rendered:
    try:
        return rendered(tokenizer, messages, **options)
    except ChatTemplateError as error:
        raise UsageError(
            f"{chat.name} does not fit the tokenizer's chat template ({error}); correct the conversation or leave it out"
        ) from error
