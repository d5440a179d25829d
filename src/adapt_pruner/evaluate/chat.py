"""What a person sees of a chat model: the share of our prompts that it answers rightly, ends by itself, and answers without a loop."""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapt_pruner.core.model.precision import precision, uses_bfloat16
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.strict_json import remembered, to_json
from adapt_pruner.data.conversations import Template
from adapt_pruner.data.fixed import goal_of
from adapt_pruner.data.generation import continued, ends_of
from adapt_pruner.data.prompts import Measured, Prompt, measured_prompts
from adapt_pruner.data.store import Store
from adapt_pruner.evaluate.tasks import fingerprint
from adapt_pruner.train.objectives import kl_to_goal

FEW, MANY = 30, 100
"""Prompts that a short run asks, and all that there are."""
LONGEST = 64
"""The most tokens of an answer."""
_FORMAT = 1
_LONGEST_LOOP, _TIMES, _LEAST = 24, 3, 8  # tokens of what repeats, how often it comes again, and tokens of all repeats together


@dataclass(frozen=True)
class Answers:
    """How a model answered the first prompts that are measured.

    Attributes:
        asked: number of prompts.
        right: the numbers of those that it answered rightly, from 0.
        ended: how many answers the model ended by itself, within 64 tokens.
        looping: how many repeat something again and again.
        saved: seconds that were saved, since the answers came from the cache; 0 if they were written now.
    """

    asked: int
    right: tuple[int, ...]
    ended: int
    looping: int
    saved: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {"asked": self.asked, "right": list(self.right), "ended": self.ended, "looping": self.looping}


def chat_answers(
    model: Any, tokenizer: Any, *, number: int, dtype: str = "float32", cache: Path | None = None, whose: str | None = None
) -> Answers | None:
    """Ask a model the first `number` prompts; it writes the likeliest token each time, at most 64.

    Answers are kept in the cache by the model's weights, so that a dense model answers once.

    Args:
        model: causal LM; left as found.
        tokenizer: the model's own.
        number: of prompts.
        dtype: precision of the matrix products.
        cache: folder; by default `cache_folder()`.
        whose: identifies the model; found from its weights if it is not given.

    Returns:
        None if the template has no place for what a user says.

    Raises:
        RunError: a logit is infinite or not a number.
    """
    prompts = measured_prompts()[:number]
    template, ends = Template(tokenizer), ends_of(model, tokenizer)
    openings = [template.opening(Prompt((prompt.ask,))) for prompt in prompts]
    if not all(openings):
        return None
    device = next(model.parameters()).device
    made_from = [_FORMAT, whose or fingerprint(model, tokenizer), openings, ends, uses_bfloat16(device, dtype), str(device.type)]
    path = (cache or cache_folder()) / "chat" / f"{hashlib.sha256(to_json(made_from).encode()).hexdigest()[:32]}.json"

    def read(kept: Any) -> tuple[list[list[int]], float]:
        if len(kept["answers"]) != len(prompts):
            raise ValueError
        return kept["answers"], float(kept["seconds"])

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        answers = continued(model, openings, most=LONGEST, ends=[[end] for end in ends], temperature=0.0, seed=0, dtype=dtype)
        return {"answers": answers, "seconds": time.perf_counter() - began}

    (answers, seconds), cached = remembered(path, read, make)
    return judged(tokenizer, answers, ends=ends, saved=seconds if cached else 0.0)


def judged(tokenizer: Any, answers: Sequence[Sequence[int]], *, ends: Sequence[int], saved: float = 0.0) -> Answers:
    """What the rules say of the answers to the first prompts that are measured.

    Args:
        tokenizer: of the model that wrote them.
        answers: token ids of each, with the end if it has one.
        ends: the tokens that end an answer.
        saved: seconds that the cache saved.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    return Answers(
        len(answers),
        tuple(at for at, (prompt, text) in enumerate(zip(measured_prompts(), texts, strict=False)) if is_right(prompt, text)),
        sum(bool(ids) and ids[-1] in ends for ids in answers),
        sum(map(loops, answers)),
        saved,
    )


def is_right(prompt: Measured, text: str) -> bool:
    """Whether an answer keeps every rule of its prompt."""
    if prompt.names and not any(_says(text, name) for name in prompt.names):
        return False
    if not all(_says(text, name) for name in prompt.all):
        return False
    if prompt.words is not None and len(text.split()) > prompt.words:
        return False
    return prompt.items is None or len(_items(text)) == prompt.items


def _says(text: str, name: str) -> bool:
    """Whether a word or phrase stands in a text; capitals count in a name of one or two letters."""
    flags = 0 if len(name) <= 2 else re.IGNORECASE
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, flags) is not None


def _items(text: str) -> set[str]:
    """The things that a text lists: those with bullets or numbers, or else those of its first line between commas."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bullets = [re.sub(r"^([-*•]|\d+[.)])\s*", "", line) for line in lines if re.match(r"([-*•]|\d+[.)])\s*\S", line)]
    if not bullets and lines:
        bullets = re.split(r",\s*(?:and\s|or\s)?|\sand\s|\sor\s", lines[0].rstrip(".!"))
    return {item.strip().lower() for item in bullets if item.strip()}


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer repeats the same tokens, up to 24 of them, three times or more after their first time."""
    for period in range(1, _LONGEST_LOOP + 1):
        run = 0
        for at in range(period, len(ids)):
            run = run + 1 if ids[at] == ids[at - period] else 0
            if run >= max(_LEAST, _TIMES * period):
                return True
    return False


@torch.no_grad()
def kl_to_written(model: Any, store: Store, *, dtype: str = "float32") -> float | None:
    """KL to the dense model, nats a token, on the answers of conversations that it wrote; see `train.objectives.kl_to_goal`."""
    if store.mask is None or store.kept is None or not len(store):
        return None
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with precision(device, dtype):
        for row in range(len(store)):
            kept, span = store.kept_of(row), store.tokens_of(row)
            assert kept is not None
            ids, mask = torch.tensor(store.ids[span].astype("int64")), torch.tensor(store.mask[span])
            total += float(kl_to_goal(model, ids[None].to(device), mask[None].to(device), goal=goal_of(kept)))
            count += len(kept.tokens)
    return total / count
