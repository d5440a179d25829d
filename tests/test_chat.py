"""What a person sees of a chat model: answers that a rule checks, whether they end, and whether they loop."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_pruner as ap
from adapt_pruner.core.events.run import Chatted
from adapt_pruner.core.events.words import answered
from adapt_pruner.data.conversations import of_part
from adapt_pruner.data.prompts import Measured, measured_prompts
from adapt_pruner.evaluate import chat
from adapt_pruner.evaluate.chat import chat_answers, is_right, kl_to_written, loops
from adapt_pruner.report.page import page
from adapt_pruner.report.record import read_record
from adapt_pruner.report.with_card import run
from conftest import log_of
from test_cli import ask
from test_conversations import chat_folder, chat_recipe, chatting, few_and_short, rows, texts
from test_data_chat import chat_tokenizer

__all__ = ["ask", "chat_folder", "texts"]  # fixtures

RIGHT = {
    Measured("", names=("Paris",)): ("The capital of France is Paris.", "paris", "It's Paris!"),
    Measured("", names=("13", "thirteen")): ("7 + 6 = 13", "Thirteen."),
    Measured("", names=("blue",), words=3): ("Blue.", "It is blue"),
    Measured("", items=3): (
        "1. Apple\n2. Pear\n3. Plum", "Here are three:\n- apple\n- pear\n- plum", "Apples, pears and plums.", "Apple, pear, plum",
        "Three fruits are apples, bananas, and oranges.",
    ),
    Measured("", all=("red", "blue"), names=("yellow", "green")): ("Red, blue, and yellow.", "red blue green"),
    Measured("", names=("Z",)): ("The last letter is Z.",),
}  # fmt: skip
WRONG = {
    Measured("", names=("Paris",)): ("The capital of France is France, France", "Parisian", ""),
    Measured("", names=("13", "thirteen")): ("130", "113", "7 + 6 = 12"),
    Measured("", names=("blue",), words=3): ("The sky is blue on a clear day", "green"),
    Measured("", items=3): ("Apple", "Apple, apple, apple", "1. Apple\n2. Pear\n3. Plum\n4. Fig", ""),
    Measured("", all=("red", "blue"), names=("yellow", "green")): ("Red and blue.", "yellow and red"),
    Measured("", names=("Z",)): ("A pizza", "z"),
}


@pytest.mark.parametrize("prompt", RIGHT, ids=str)
def test_rules_know_right_answers_from_wrong_ones(prompt: Measured) -> None:
    assert [text for text in RIGHT[prompt] if not is_right(prompt, text)] == []
    assert [text for text in WRONG[prompt] if is_right(prompt, text)] == []


def test_no_answer_is_right_by_repeating_its_prompt() -> None:
    """Or a model that only echoes would seem to know."""
    echoed = [prompt.ask for prompt in measured_prompts() if is_right(prompt, prompt.ask)]
    assert echoed == []


def test_loops() -> None:
    assert loops([5] * 9)
    assert loops([1, 2, 3] * 4)
    assert loops([9, 8, *range(20), *range(20), *range(20), *range(20), 7])
    assert not loops([5] * 5)
    assert not loops([1, 2, 3] * 2)
    assert not loops(list(range(60)))
    assert not loops([1, 2, 3, 4, 5, 6, 1, 2, 9, 4, 5, 6, 1, 2, 8, 4, 5, 6])


def test_a_model_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chatting(), chat_tokenizer()
    first = chat_answers(model, tokenizer, number=5, cache=tmp_path)
    assert first is not None
    assert first.asked == 5
    assert 0 < first.ended <= 5
    with monkeypatch.context() as patch:
        patch.setattr(chat, "continued", lambda *args, **how: pytest.fail("it has answered"))
        again = chat_answers(model, tokenizer, number=5, cache=tmp_path)
        assert again == first
        assert again is not None
        assert again.saved > first.saved == 0, "a deadline counts what the small model will take"
        with pytest.raises(pytest.fail.Exception):
            chat_answers(chatting(seed=1), tokenizer, number=5, cache=tmp_path)
    answers = [tokenizer(text + "<|im_end|>")["input_ids"] for text in ("Paris.", "Kyoto", "Rome " * 12, "5", "14")]
    monkeypatch.setattr(chat, "continued", lambda *args, **how: answers)
    found = chat_answers(chatting(seed=2), tokenizer, number=5, cache=tmp_path)
    assert found is not None
    assert (found.right, found.ended, found.looping) == ((0, 2, 3), 5, 1)
    assert chat_answers(model, chat_tokenizer("{{ raise_exception('no') }}"), number=5, cache=tmp_path) is None


def test_kl_on_held_out_conversations(texts: Any) -> None:
    """None from the model that wrote them, and that of the full logits from another, but for what lies beside the likeliest 64."""
    store = of_part(texts, "heldout")
    assert kl_to_written(chatting(), store) == pytest.approx(0, abs=1e-3)
    other, dense = chatting(seed=1), chatting()
    total, count = 0.0, 0
    for ids, mask in rows(store):
        p, q = (m(torch.tensor([ids])).logits[0, :-1].detach().log_softmax(-1)[torch.tensor(mask[1:])] for m in (dense, other))
        total += float((p.exp() * (p - q)).sum())
        count += sum(mask)
    found = kl_to_written(other, store)
    assert found is not None
    assert 0.5 * total / count < found <= total / count + 1e-3


def test_the_verdict_in_words() -> None:
    assert answered(right=[0, 1, 2, 9], asked=10, ended=7, looping=1, dense=[0, 1, 2, 3]) == (
        "answers 3 of the 4 prompts that the dense model answers; 7 of 10 answers end, 1 loops"
    )
    dense = Chatted(stage=0, asked=10, right=[0, 1, 2, 3], ended=9, looping=0)
    assert dense.line() == "dense model: answers 4 of 10 prompts rightly; 9 of 10 answers end, 0 loop"
    assert not dense.is_poor
    small = Chatted(stage=1, asked=10, right=[3, 7], ended=2, looping=8, dense=[0, 1, 2, 3], kl=0.5)
    assert small.is_poor
    assert small.line() == (
        "small model: answers 1 of the 4 prompts that the dense model answers; 2 of 10 answers end, 8 loop; 0.500 nats from the dense model"
    )
    assert not Chatted(stage=1, asked=10, right=[0, 3], ended=2, looping=8, dense=[0, 1, 2, 3]).is_poor


@pytest.fixture(scope="module")
def asked_run(chat_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that asks three prompts at the start and the end, and learns from conversations."""
    folder = tmp_path_factory.mktemp("runs") / "asked"
    evaluation = {"source": str(text_file), "window": 64, "max_windows": 2, "prompts": ["Hi"], "chat": 3}
    with pytest.MonkeyPatch.context() as patch:
        few_and_short(patch)
        run(chat_recipe(chat_folder, text_file, evaluation=evaluation), folder)
    return folder


def test_a_run_says_how_its_model_answers(asked_run: Path) -> None:
    """In its log, on its page and on its card."""
    told = log_of(asked_run, "chatted")
    assert [event["stage"] for event in told] == [0, 1]
    assert all(event["asked"] == 3 for event in told)
    assert told[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert told[1]["kl"] > 0.01
    last = Chatted(**{key: value for key, value in told[1].items() if key not in ("event", "time")})
    assert last.dense == told[0]["right"]
    assert last.verdict in (asked_run / "report.html").read_text(encoding="utf-8")
    assert last.verdict in (asked_run / "model" / "README.md").read_text(encoding="utf-8")
    assert "conversations that the dense model wrote" in (asked_run / "model" / "README.md").read_text(encoding="utf-8")


def test_the_page_says_second_what_a_poor_model_says(asked_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "poor"
    shutil.copytree(asked_run, copy)
    log = (copy / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in log]
    for poor in (False, True):
        for event in events:
            if event["event"] == "chatted":
                event |= {
                    "right": [0, 1] if event["stage"] == 0 or not poor else [2],
                    "dense": [0, 1] if event["stage"] else None,
                }
        (copy / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        text = page(read_record(copy))
        headings = re.findall(r"<h2[^>]*>(?:<[^>]+>)*([^<]+)", text)
        assert (headings.index("What it says") == headings.index("Anatomy") + 1) is poor, headings
        assert ("As an assistant it is poor" in text) is poor


def test_eval_asks_models_side_by_side(asked_run: Path, chat_folder: Path, ask: Any) -> None:
    status, out, err = ask("eval", str(chat_folder), str(asked_run / "model"), "--chat", "3", "--dtype", "float32")
    assert status == 0, err
    assert "right of 3" in out
    assert "of the first model's" in out
    status, out, err = ask("eval", str(chat_folder), "--chat", "3", "--dtype", "float32", "--json")
    assert json.loads(out)["chat"]["asked"] == 3
    assert ap.evaluate(str(chat_folder), chat=3, dtype="float32").chat == json.loads(out)["chat"]


def test_a_comparison_asks_if_it_is_told_to(chat_folder: Path, text_file: Path, tmp_path: Path, ask: Any) -> None:
    words = ["compare", chat_folder, "--methods", "magnitude-all", "--params", "90%", "--text", text_file, "-o", tmp_path / "out"]
    words += ["--draws", 1, "--window", 64, "--max-windows", 2, "--dtype", "float32", "--set", "evaluation.chat=3", "--json"]
    status, out, err = ask(*words)
    assert status == 0, err
    dense, row = json.loads(out)["rows"]
    assert dense["answers"] is None
    assert 0 <= row["answers"]["right"] <= row["answers"]["of"] <= 3
    assert "right answers" in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
