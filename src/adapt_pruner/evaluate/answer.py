"""What a model answers: one turn of a conversation in its own chat template."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TextStreamer

from adapt_pruner.core.model.precision import precision, refuse_nonfinite
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.data.generation import ends_of
from adapt_pruner.errors import RunError, UsageError, first_line, is_out_of_memory, option

PROMPTS = ("What is the capital of France?", "Why is the sky blue?", "Write a sentence about a rainy day.")
"""The prompts of a run for a chat model, unless its recipe has others."""
LONGEST = 48
"""The most tokens of an answer on the page of a run."""

_LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Answer:
    """An answer of `tokens` tokens, written in `seconds`; `ended` says whether the model ended it by itself.

    `templated` is False if the tokenizer has no chat template, so that the model merely continued the prompt.
    """

    text: str
    tokens: int
    seconds: float
    ended: bool
    templated: bool


class _Told(TextStreamer):  # type: ignore[misc]
    """Passes text on as it is written."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._tell(text)


def check_asked(prompt: str | None, *, temperature: float = 0.0, seed: int | None = None) -> None:
    """Refuse an empty prompt, and a seed where nothing is drawn.

    Args:
        prompt: what the user says; None if that is not known yet.
        temperature: as for `answer`.
        seed: of the draws; None if the user gave none.

    Raises:
        UsageError: either.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty; write a question or an instruction, in quotes")
    if seed is not None and not temperature:
        raise UsageError(
            f"{option('seed', seed)} has no effect at temperature 0, which draws nothing; add {option('temperature', 0.7)}, or leave "
            f"{option('seed')} out"
        )


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    before: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Generate the model's answer to `prompt`, in the tokenizer's chat template if it has one.

    Args:
        model: causal LM, in eval mode. Its random state and settings are left as found.
        tokenizer: a transformers tokenizer.
        prompt: what the user says.
        system: the system prompt, at the template's place for it.
        before: earlier turns, as (prompt, answer); without a template they stand above the prompt.
        max_new_tokens: the most tokens to write.
        temperature: 0 takes the likeliest token each time; otherwise tokens are drawn at that temperature, with `seed`.
        seed: seed of the draws.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_text: called with each piece of text as it comes.

    Raises:
        UsageError: the prompt is empty, longer than the model can read, or does not fit the template.
        RunError: a logit is infinite or not a number.
    """
    check_asked(prompt)
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        messages = [{"role": "system", "content": system}] if system else []
        for question, reply in before:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": prompt})
        try:
            text = rendered(tokenizer, messages, add_generation_prompt=True).text
        except ChatTemplateError as error:
            remedy = "correct the template in chat_template.jinja or tokenizer_config.json"
            if system:
                remedy = f"leave {option('system')} out"
            raise UsageError(f"the prompt does not fit the model's chat template ({error}); {remedy}") from error
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        above = [*([system] if system else []), *(line for turn in before for line in turn)]
        ids = tokenizer("\n".join([*above, prompt]), return_tensors="pt").input_ids
    if not ids.shape[1]:
        made = "chat template writes nothing" if templated else "tokenizer makes no tokens"
        raise UsageError(f"the model's {made} for this prompt; correct its files, or write another prompt")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise UsageError(
            f"the prompt of {ids.shape[1]:,} tokens and {max_new_tokens:,} new ones are more than the {limit:,} tokens that the "
            f"model reads; shorten it, or lower {option('max_new_tokens')}"
        )
    ids = ids.to(model.device)
    ends = ends_of(model, tokenizer)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {
        "do_sample": False, "temperature": None, "top_k": None, "top_p": None,
    }  # fmt: skip
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise UsageError(f"temperature {temperature:g} is below {_LEAST_TEMPERATURE:g}; give 0, which takes the likeliest token")
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), precision(model.device, dtype):
        torch.manual_seed(seed)
        try:
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, num_beams=1, num_return_sequences=1,
                logits_processor=LogitsProcessorList([refuse_nonfinite("no answer can be read from logits of nan or inf", model.device, dtype)]),
                pad_token_id=ends[0] if ends else 0, streamer=None if on_text is None else _Told(tokenizer, on_text), **how,
            )[0, ids.shape[1] :]  # fmt: skip
        except (RunError, UsageError):
            raise
        except Exception as error:  # a model's generation settings may cause errors of many kinds
            if is_out_of_memory(error) or isinstance(error, OSError):
                raise
            raise RunError(
                f"the model cannot write ({type(error).__name__}: {first_line(error)}); its generation_config.json or config.json "
                "asks for what it cannot do, so correct or remove generation_config.json"
            ) from error
    seconds = time.perf_counter() - began
    ended = bool(len(written)) and int(written[-1]) in ends
    return Answer(tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), seconds, ended, templated)
