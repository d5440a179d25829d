"""A chat template is a program of somebody else: it gets little time, memory and text, wherever a conversation is rendered."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner import recipe
from adapt_pruner.core.system import chat_template
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.data.chat import encode_chats
from adapt_pruner.data.sources import Document
from adapt_pruner.errors import UsageError
from adapt_pruner.report import with_card
from conftest import HANGS, byte_tokenizer
from test_answers import chatting
from test_cli import ask
from test_data_chat import CHATML, CHATS, MARKED, chat_tokenizer

__all__ = ["ask"]  # a fixture

FOR_EVER = {
    "loops that write nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "a list that grows while it is read": "{% set l = namespace(x=[1]) %}{% macro m() %}{{ m() }}{% endmacro %}"
    "{% for i in range(99999) %}{% set l.x = l.x + l.x %}{% endfor %}",
    "one power": "{% set n = messages|length %}{{ (9 + n) ** (9 ** 9) }}",
    "one power of constants, while the template is compiled": "{{ 9 ** (9 ** 9) }}",
    "one product": "{{ 'x' * 10 ** 12 }}",
    "a product that fits, of products": "{% set a = 'x' * (10 ** 7 * messages|length) %}{% for i in range(999) %}{{ a }}{% endfor %}",
    "a format": "{{ '%99999999999d' % 1 }}",
    "a filter": "{{ 'x'|center(10 ** 12) }}",
}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template gets one second."""
    monkeypatch.setattr(chat_template, "_SECONDS", 1.0)


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_conversation_is_written_as_transformers_does(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    for chat in CHATS:
        for prompt in (False, True):
            expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert rendered(tokenizer, chat, add_generation_prompt=prompt).text == expected
    found = encode_chats(tokenizer, [Document("it", "", tuple(chat)) for chat in CHATS])
    assert [ids for ids, _ in found] == [tokenizer.apply_chat_template(chat)["input_ids"] for chat in CHATS]


def test_marks_of_the_template_are_those_of_transformers() -> None:
    tokenizer = chat_tokenizer(MARKED)
    for chat in CHATS:
        marks = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)["assistant_masks"]
        ((_, mask),) = encode_chats(tokenizer, [Document("it", "", tuple(chat))])
        assert mask == [bool(mark) for mark in marks]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("name", FOR_EVER)
def test_a_template_that_takes_too_much_is_stopped(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        ChatTemplateError, match=r"^the template (takes more than \d+ seconds or 1 GiB|writes more than [\d,]+ characters)$"
    ):
        rendered(with_template(FOR_EVER[name]), CHATS[0])
    assert time.monotonic() - began < HANGS
    assert rendered(chat_tokenizer(), CHATS[0]).text, "the next template is not concerned"


def test_a_text_that_is_too_long_is_not_taken() -> None:
    """Whatever its length is beside that of the messages."""
    twice = with_template("{{ messages[0].content * 2 }}")
    assert len(rendered(twice, [{"role": "user", "content": "x" * 600_000}]).text) == 1_200_000
    with pytest.raises(ChatTemplateError, match=r"the template writes more than 1,048,\d+ characters"):
        rendered(with_template("{{ 'x' * 1100000 }}"), CHATS[0])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0].nothing.more }}", "'dict object' has no attribute 'nothing'"),
        ("{% for", "unexpected 'end of template'|Expected an expression, got end of template block|.*end of.*"),
        ({"tool_use": "x"}, ".*no default.*|.*not set.*|.*multiple chat templates.*"),
        (5, ".*string.*"),
    ],
)
def test_a_template_that_fails_says_why(template: Any, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"^({reason})$"):
        rendered(with_template(template), CHATS[0])


def test_a_process_that_was_ended_is_started_again() -> None:
    tokenizer = chat_tokenizer()
    text = rendered(tokenizer, CHATS[0]).text
    child = chat_template._RENDERER._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGKILL)
    child._process.wait()
    assert rendered(tokenizer, CHATS[0]).text == text


@pytest.mark.usefixtures("hurried")
def test_every_command_says_it(ask: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """`chat` ends with the sentence; `prune` and `verify` leave the conversation out with a warning; training names the text."""
    folder = chatting(tiny_folder, tmp_path / "chats")
    (folder / "chat_template.jinja").write_text(FOR_EVER["loops that write"])
    status, _, err = ask("chat", folder, "hello")
    assert (status, "does not fit the model's chat template (the template takes more than" in " ".join(err.split())) == (2, True)
    words = ["--params", "80%", "--method", "random"]
    status, _, err = ask("prune", folder, "-o", tmp_path / "out", *words)
    assert status == 0
    assert "the prompts were not answered: the prompt does not fit the model's chat template (the template takes" in " ".join(
        err.split()
    )
    status, _, err = ask("export", tmp_path / "out", "--to", "padded", "-o", tmp_path / "padded")
    status, _, err = ask("verify", tmp_path / "out", tmp_path / "padded", "--text", text_file, "--window", 16, "--max-windows", 1)
    assert status == 0
    assert "no conversation was compared, because the chat template cannot write one: the template takes" in " ".join(err.split())
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHATS[0]}) + "\n")
    training = {"source": str(tmp_path / "c.jsonl"), "tokens": 256, "batch_tokens": 128, "length": 64}
    asked = recipe.read({"method": "random", "model": str(folder), "budget": "80%", "training": training})
    with pytest.raises(UsageError, match="c.jsonl line 1 does not fit the tokenizer's chat template .the template takes"):
        with_card.run(asked, tmp_path / "run")
