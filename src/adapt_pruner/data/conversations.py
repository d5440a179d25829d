"""Text that the dense model writes to be learnt from: its answers to prompts (`self-chat`), or plain text (`self`).

The tokens are kept as they were drawn, with a mask of those that are learnt, and are never rendered again. With each learnt token
the 64 likeliest ones are kept, so that a smaller model can learn from them without the dense model in memory.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adapt_pruner.core.model.loss import log_softmax_, logit_map
from adapt_pruner.core.model.precision import casting_once, precision, uses_bfloat16
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.generation import continued, ends_of
from adapt_pruner.data.prompts import Prompt, is_measured, our_prompts, prompts_of
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import SELF, SELF_CHAT, parts_of, read
from adapt_pruner.data.store import Chunk, Kept, Store, joined, stored
from adapt_pruner.errors import UsageError

BATCH = 32
"""Texts that are written at a time."""
HELD_OUT = 10
"""One in this many is held out."""
_KEPT = 64  # likeliest tokens kept for each learnt one
_ANSWER, _DRAWN = 128, 96  # the most tokens of an answer, and of a prompt that the model draws
_WARMTH = 0.7  # temperature of answers; prompts are drawn at 1
_LONG = 4096  # tokens that a model must read for prompts with a long context
_MARK = "Qzx7mark"  # stands for what somebody says; no template writes it itself
_FORMAT = 1


class Template:
    """What a tokenizer's chat template writes around the turns of a conversation, as token ids; thinking is off."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        header, _, footer = self._text(Prompt((_MARK,))).partition(_MARK)
        self.header, self.footer = self._ids(header), self._ids(footer)
        """What stands before and after the first thing that a user says. No header: the template fails, or writes nothing there."""

    def opening(self, prompt: Prompt) -> list[int]:
        """All up to the assistant's first answer; empty if the prompt does not fit the template."""
        return self._ids(self._text(prompt))

    def following(self, prompt: Prompt, end: int) -> list[int]:
        """What stands between the first answer, which ended with the token `end`, and the second one; empty if nobody can tell."""
        with suppress(ChatTemplateError):
            messages = [*_messages(Prompt(prompt.turns[:1], prompt.system)), {"role": "assistant", "content": _MARK}]
            messages.append({"role": "user", "content": prompt.turns[1]})
            text = rendered(self._tokenizer, messages, add_generation_prompt=True, thinking=False).text
            if text.startswith(self._text(prompt)) and text.count(_MARK) == 1:
                ids = self._ids(text.partition(_MARK)[2])
                return ids[1:] if ids[:1] == [end] else []
        return []

    @property
    def closing(self) -> list[int]:
        """The beginning of the footer with which a drawn prompt has to end: up to its first added token, or all of it."""
        first = next((at for at, token in enumerate(self.footer) if token in self._added), len(self.footer) - 1)
        return self.footer[: first + 1]

    def _text(self, prompt: Prompt) -> str:
        with suppress(ChatTemplateError):
            return rendered(self._tokenizer, _messages(prompt), add_generation_prompt=True, thinking=False).text
        return ""

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return ids


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """The system prompt, if there is one, and the first turn."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.turns[0]}]


def prompts_for(spec: str, longest: int | None) -> list[Prompt]:
    """The prompts of `self-chat`, or those of the conversations that `self-chat:SPEC` names, without what is measured.

    Args:
        spec: without its part.
        longest: tokens that the model reads at once.

    Raises:
        UsageError: the SPEC names no conversations.
    """
    _, _, source = spec.partition(":")
    if not source:
        prompts = our_prompts(long=longest is not None and longest >= _LONG)
    elif not (prompts := prompts_of(read(parts_of(source)[0]))):
        raise UsageError(
            f"text {spec!r} names no conversations; name a file of conversations, or {SELF_CHAT} alone for prompts of ours"
        )
    return [prompt for prompt in prompts if not any(map(is_measured, prompt.turns))]


def written_batches(
    model: Any,
    tokenizer: Any,
    spec: str,
    *,
    whose: str,
    texts: int,
    length: int,
    seed: int,
    dtype: str,
    cache: Path | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
    on_texts: Callable[[int, int], None] = lambda done, of: None,
    in_time: Callable[[], bool] = lambda: True,
    batches: int | None = None,
    dense: Callable[[], Any] | None = None,
) -> list[Store]:
    """About `texts` texts that a model writes, in batches of at most 32, each from the cache or written now and kept there.

    Conversations that do not end are left out, and so is a prompt that is close to one that is measured. Prompts of ours and the
    user's come again once all have been answered, ours beside as many that the model draws.

    Args:
        model: the dense model; left as found.
        tokenizer: the model's own.
        spec: `self`, `self-chat` or `self-chat:SPEC`, without a part.
        whose: identifies the model in the cache.
        texts: how many are wanted.
        length: tokens of a text of `self`; conversations are as long as they are.
        seed: of the draws.
        dtype: precision of the matrix products.
        cache: see `data.store.stored`.
        warn: told of damaged stores.
        on_texts: called with (done, of).
        in_time: asked before a batch is written; no more are written once it says False.
        batches: exactly how many batches, instead of `texts`.
        dense: gives the model that writes, if `model` has been cut since; called only if something has to be written.

    Raises:
        UsageError: the model has no chat template, or no prompt fits it.
    """
    device = next(model.parameters()).device
    writer = _Writer(model, tokenizer, spec, length=length, dtype=dtype, dense=dense)
    made_from = {
        "written": _FORMAT, "text": writer.identity, "whose": whose, "seed": seed, "length": length if spec == SELF else None,
        "bfloat16": uses_bfloat16(device, dtype),
    }  # fmt: skip
    largest = max(tokenizer.get_vocab().values(), default=0)
    stores: list[Store] = []

    def write() -> Iterator[Chunk]:
        if not in_time():
            raise _TooLateError
        return writer.batch(len(stores), seed=seed * 1_000_003 + len(stores))

    with suppress(_TooLateError):
        while len(stores) < (3 + 4 * -(-texts // BATCH) if batches is None else batches):
            done = sum(map(len, stores))
            if batches is None and done >= texts:
                break
            on_texts(min(done, texts), texts)
            numbered = {**made_from, "batch": len(stores)}
            stores.append(stored(numbered, write, dtype="<u2" if largest < 2**16 else "<u4", cache=cache, warn=warn))
    on_texts(texts, texts)
    return stores


class _TooLateError(Exception):
    """There is no time to write another batch."""


def of_part(batches: Sequence[Store], part: str) -> Store:
    """The texts to train on (`train`), those that are held out (`heldout`), or all.

    One prompt in ten is held out with all its answers. Of five prompts or fewer, it is one text in ten.
    """
    prompts = [_asked(store, row) for store in batches for row in range(len(store))]
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    by_prompt = len(number_of) > HELD_OUT // 2
    numbers = [number_of[prompt] if by_prompt else row for row, prompt in enumerate(prompts)]
    held_out = HELD_OUT // 2
    return joined(batches, chosen=lambda row: not part or (numbers[row] % HELD_OUT == held_out) == (part == "heldout"))


def _asked(store: Store, row: int) -> bytes:
    """What stands before the first answer of a row; of plain text, which has no prompt, the whole row."""
    span = store.tokens_of(row)
    assert store.mask is not None  # only a store without rows has none
    begins = int(store.mask[span].argmax())
    return store.ids[span][: begins if begins > 1 else None].tobytes()  # the first token is never learnt


@dataclass
class _Text:
    """A text on its way: its ids, which of them are learnt, and the prompt that it answers."""

    ids: list[int]
    learnt: list[bool]
    prompt: Prompt | None = None

    def add(self, ids: Sequence[int], *, learnt: bool) -> None:
        self.ids += ids
        self.learnt += [learnt] * len(ids)


class _Writer:
    """Writes batches of texts with a model."""

    def __init__(
        self, model: Any, tokenizer: Any, spec: str, *, length: int, dtype: str, dense: Callable[[], Any] | None
    ) -> None:
        self._now, self._dense = model, dense
        self._tokenizer, self._spec, self._length, self._dtype = tokenizer, spec, length, dtype
        self._openings: list[tuple[Prompt, list[int]]] = []
        self.identity = spec
        if spec == SELF:
            return
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"text {spec!r} is conversations and the model's tokenizer has no chat template; take {SELF!r} instead"
            )
        self._template = Template(tokenizer)
        self._draws = spec == SELF_CHAT and bool(self._template.header and self._template.footer)
        self._ends = ends_of(model, tokenizer)
        prompts = prompts_for(spec, getattr(model.config, "max_position_embeddings", None))
        openings = ((prompt, self._template.opening(prompt)) for prompt in prompts)
        self._openings = [(prompt, ids) for prompt, ids in openings if ids]
        if not self._openings:
            raise UsageError(f"no prompt of {spec!r} fits the model's chat template; correct the template, or name another text")
        made_of = [
            BATCH,
            [ids for _, ids in self._openings],
            self._template.header,
            self._template.footer,
            self._ends,
            tokenizer.chat_template,
        ]
        self.identity = hashlib.sha256(to_json([spec, *made_of]).encode()).hexdigest()

    @functools.cached_property
    def _model(self) -> Any:
        return self._now if self._dense is None else self._dense()

    def batch(self, number: int, *, seed: int) -> Iterator[Chunk]:
        """The texts of a batch, those that came to their end."""
        texts = self._plain(seed) if self._spec == SELF else self._conversations(number, seed)
        if not texts:
            return
        for text in texts:
            text.learnt[0] = False  # nothing predicts it
        kept = kept_logits(self._model, [text.ids for text in texts], [text.learnt for text in texts], dtype=self._dtype)
        yield Chunk(
            np.array([token for text in texts for token in text.ids], np.uint32),
            np.array([len(text.ids) for text in texts], np.int64),
            np.array([mark for text in texts for mark in text.learnt], np.bool_),
            kept=kept,
        )

    def _plain(self, seed: int) -> list[_Text]:
        windows = selfwritten_windows(
            self._model, self._tokenizer, samples=BATCH, length=self._length, seed=seed, dtype=self._dtype
        )
        return [_Text(ids, [True] * len(ids)) for ids in windows.tolist()]

    def _conversations(self, number: int, seed: int) -> list[_Text]:
        texts = [_Text(list(ids), [False] * len(ids), prompt) for prompt, ids in self._prompts(number)]
        if len(texts) < BATCH:
            texts += self._drawn(BATCH - len(texts), seed)
        ended = self._answered(texts, seed)
        further = []
        for text in ended:
            if (
                text.prompt is not None
                and len(text.prompt.turns) > 1
                and (ids := self._template.following(text.prompt, text.ids[-1]))
            ):
                further.append((text, _Text([*text.ids, *ids], [*text.learnt, *[False] * len(ids)])))
        if further:
            finished = {id(more) for more in self._answered([more for _, more in further], seed)}
            longer = {id(text): more for text, more in further if id(more) in finished}
            ended = [longer.get(id(text), text) for text in ended]
        return ended

    def _prompts(self, number: int) -> list[tuple[Prompt, list[int]]]:
        """Those of ours or the user's that a batch answers: 32, or 16 if the model draws others once all of ours have been answered."""
        whole = -(-len(self._openings) // BATCH)
        first, size = BATCH * number, BATCH
        if self._draws and number >= whole:
            first, size = BATCH // 2 * (number + whole), BATCH // 2
        return [self._openings[at % len(self._openings)] for at in range(first, first + size)]

    def _drawn(self, count: int, seed: int) -> list[_Text]:
        """Prompts that the model draws after the header of a user's turn (arXiv:2406.08464); only those that end as they should."""
        closing = self._template.closing
        drawn = continued(
            self._model, [self._template.header] * count, most=_DRAWN, ends=[closing, *([end] for end in self._ends)], temperature=1.0,
            seed=seed, dtype=self._dtype,
        )  # fmt: skip
        texts, seen = [], set[str]()
        for ids in drawn:
            message = self._tokenizer.decode(ids[: -len(closing)], skip_special_tokens=True).strip()
            if ids[-len(closing) :] != closing or message in seen or len(message.split()) < 2 or is_measured(message):
                continue
            seen.add(message)
            whole = [*self._template.header, *ids, *self._template.footer[len(closing) :]]
            texts.append(_Text(whole, [False] * len(whole)))
        return texts

    def _answered(self, texts: list[_Text], seed: int) -> list[_Text]:
        """Let the model answer, in place; only the texts whose answer came to its end are given back."""
        answers = continued(
            self._model, [text.ids for text in texts], most=_ANSWER, ends=[[end] for end in self._ends], temperature=_WARMTH,
            seed=seed + 1, dtype=self._dtype,
        )  # fmt: skip
        ended = []
        for text, answer in zip(texts, answers, strict=True):
            if len(answer) > 1 and answer[-1] in self._ends:
                text.add(answer, learnt=True)
                ended.append(text)
        return ended


@torch.no_grad()
def kept_logits(model: Any, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], *, dtype: str = "float32") -> Kept:
    """The likeliest tokens at each token of some masks, by a model, with log p of each over its whole vocabulary.

    Args:
        model: causal LM; left as found.
        rows: token ids.
        masks: which tokens of each row; never the first.
        dtype: precision of the matrix products.
    """
    device, head, logits_of = next(model.parameters()).device, CAUSAL_LM.head(model), logit_map(model)
    tokens, logs = [], []
    with casting_once(model), precision(device, dtype):
        for row, mask in zip(rows, masks, strict=True):
            ids, chosen = torch.tensor([row], device=device), torch.tensor([mask], device=device)
            entering, _ = CAUSAL_LM.predicting(CAUSAL_LM.read(model, ids).last_hidden_state, ids, chosen)
            logits = F.linear(entering.to(head.weight.dtype), head.weight, head.bias).float()
            likely = log_softmax_(logits_of.apply_(logits)).topk(min(_KEPT, logits.shape[-1]))
            tokens.append(likely.indices.cpu().numpy())
            logs.append(likely.values.cpu().numpy().astype(np.float16))
    return Kept(np.concatenate(tokens), np.concatenate(logs))
