"""Write a conversation in the chat template of a tokenizer, in a process of its own that has little time and memory.

A template is a program of somebody else. It may loop without end, or make a text that fills the memory, also within one operation
that nothing can interrupt. The process is killed for that, and the next template gets a new one.
"""

import json
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from adapt_pruner.core.system.processes import Child, module, talking
from adapt_pruner.errors import RunError, first_line

_SECONDS = 10.0  # of processor time, for one conversation
_MEMORY = 2**30  # bytes beyond what the process holds before it renders
_CHARACTERS = 2**20  # that a template may write beside the messages themselves
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplateError(ValueError):
    """A template refuses a conversation, fails on it or takes too much for it; the message is the reason alone."""


class Rendered(NamedTuple):
    """A conversation as text, and the characters within `{% generation %}`: first and one past the last; None if it has none."""

    text: str
    generated: list[tuple[int, int]] | None


def rendered(
    tokenizer: Any, messages: Iterable[Mapping[str, Any]], *, add_generation_prompt: bool = False, thinking: bool = True
) -> Rendered:
    """Write a conversation as `tokenizer.apply_chat_template` does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: what was said, each with `role`, `content` and perhaps more.
        add_generation_prompt: whether the header of the assistant's next turn follows.
        thinking: False turns thinking off, in a template that can.

    Raises:
        ChatTemplateError: the template raises an error, runs for too long, or takes too much memory or writes too much.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # it has several, and none of them is the default
        raise ChatTemplateError(first_line(error)) from error
    conversation = json.dumps(
        [{key: value for key, value in message.items() if value is not None} for message in messages], default=str
    )
    answer = _RENDERER.ask({
        "template": template, "messages": conversation, "add_generation_prompt": add_generation_prompt,
        "variables": {} if thinking else {"enable_thinking": False},
        "special_tokens": tokenizer.special_tokens_map, "seconds": _SECONDS, "characters": _CHARACTERS + len(conversation),
    })  # fmt: skip
    if "error" in answer:
        raise ChatTemplateError(answer["error"])
    marks = answer["generated"]
    return Rendered(answer["text"], None if marks is None else [(start, stop) for start, stop in marks])


class _Renderer:
    """The process that renders. It is started when it is first needed, and again when it has ended."""

    def __init__(self) -> None:
        self._open, self._lock = ExitStack(), threading.Lock()
        self._child: Child | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._child is None or self._child.ended:
                self._open.close()
                self._child = self._open.enter_context(
                    talking(
                        module(__name__, str(_MEMORY)),
                        silent=f"the template takes more than {_SECONDS:g} seconds or {_MEMORY / 2**30:g} GiB",
                    )
                )
            try:
                answer: dict[str, Any] = self._child.ask(question)
            except BaseException as error:  # also of Ctrl-C, after which an answer would come that nobody waits for
                self._open.close()
                if isinstance(error, RunError):
                    raise ChatTemplateError(str(error)) from error
                raise
            return answer


_RENDERER = _Renderer()


def _main(memory: int) -> None:
    """Answer questions until stdin ends, or until a template takes too much and the system ends this process."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        most = min([held + memory, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        answer = _answer(render_jinja_template, question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _answer(render: Any, question: Mapping[str, Any]) -> dict[str, Any]:
    template = question["template"]
    try:
        marks = _GENERATION.search(template) is not None
        (text,), generated = render(
            conversations=[json.loads(question["messages"])], chat_template=template,
            add_generation_prompt=question["add_generation_prompt"], return_assistant_tokens_mask=marks,
            **question["special_tokens"], **question["variables"],
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and may raise anything
        return {"error": first_line(error)}
    if len(text) > question["characters"]:
        return {"error": f"the template writes more than {question['characters']:,} characters"}
    return {"text": text, "generated": generated[0] if marks else None}


if __name__ == "__main__":
    _main(int(sys.argv[1]))
