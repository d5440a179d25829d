"""What a run's model answers at the start and the end: in its log, its figures and on its page; and conversations."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.errors import RunError
from adapt_pruner.evaluate import answer as answers
from adapt_pruner.evaluate.answer import PROMPTS, answer
from adapt_pruner.report import page, with_card
from adapt_pruner.report.record import read_record
from adapt_pruner.run import results
from conftest import as_dicts, read_json
from test_cli import ask
from test_report import Seen, small_recipe

__all__ = ["ask"]  # a fixture


def chatting(tiny_folder: Path, to: Path) -> Path:
    """The tiny model with a template that tells turns apart."""
    shutil.copytree(tiny_folder, to)
    (to / "chat_template.jinja").write_text("{% for one in messages %}[{{ one.role }}]{{ one.content }}{% endfor %}")
    return to


def answering(model: Path, text: Path, **evaluation: Any) -> recipe.Recipe:
    """Pruned once and trained for two steps."""
    training = {"source": str(text), "tokens": 256, "batch_tokens": 128, "length": 64}
    return small_recipe(
        model,
        text,
        stages=1,
        step=1,
        training=training,
        evaluation={"source": str(text), "window": 64, "max_windows": 2} | evaluation,
    )


def test_the_page_has_the_answers_of_both_beside_each_other(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["Line 7:", "the quick"]
    outcome = with_card.run(answering(tiny_folder, text_file, prompts=asked), tmp_path / "run")
    assert outcome is not None
    first, last = outcome.figures["answers"]
    assert (first["stage"], last["stage"]) == (0, 1)
    assert [one["prompt"] for one in first["answers"]] == [one["prompt"] for one in last["answers"]] == asked
    assert first["answers"] != last["answers"], "two models, two answers"
    assert read_json(tmp_path / "run" / "model" / "pruning.json")["figures"]["answers"] == [first, last]
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert {"said-1", "said-2"} <= set(Seen(text).figures)
    assert "tokens/s" not in text.partition('class="tiles"')[2].partition("</dl>")[0], "one pass says nothing of speed"
    for folder in (tmp_path, tiny_folder.parent, text_file.parent):
        assert str(folder) not in text, "a page that is sent to others tells no folder of the machine"
    monkeypatch.chdir(tmp_path)
    assert "adapt-pruner run run/recipe.yaml -o again" in page.page(read_record(Path("run")))


def test_only_a_model_that_chats_is_asked_unasked(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    silent = with_card.prune(recipe.read({"method": "random", "model": str(tiny_folder), "budget": "80%"}), tmp_path / "silent")
    assert "answers" not in silent.figures
    chats = chatting(tiny_folder, tmp_path / "chats")
    asked = with_card.prune(recipe.read({"method": "random", "model": str(chats), "budget": "80%"}), tmp_path / "asked")
    assert [one["prompt"] for one in asked.figures["answers"][1]["answers"]] == list(PROMPTS)
    none = recipe.read({"method": "random", "model": str(chats), "budget": "80%", "evaluation": {"prompts": []}})
    assert "answers" not in with_card.prune(none, tmp_path / "none").figures


def test_a_model_that_cannot_answer_is_no_error(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(*_: Any, **__: Any) -> Any:
        raise RunError("no answer can be read from logits of nan")

    monkeypatch.setattr(results, "answer", ruined)
    told: list[dict[str, Any]] = []
    asked = recipe.read({"method": "random", "model": str(tiny_folder), "budget": "80%", "evaluation": {"prompts": ["Line"]}})
    outcome = with_card.prune(asked, tmp_path / "out", listen=as_dicts(told.append))
    assert "answers" not in outcome.figures
    warned = [event["message"] for event in told if event["event"] == "warning"]
    assert warned == ["the prompts were not answered: no answer can be read from logits of nan"] * 2


def test_no_answer_of_the_result_is_not_the_dense_model_s(
    ask: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = results.answer, []

    def ruined_by_pruning(*words: Any, **how: Any) -> Any:
        asked.append(words)
        if len(asked) > 1:
            raise RunError("no answer can be read from logits of nan")
        return real(*words, **how)

    monkeypatch.setattr(results, "answer", ruined_by_pruning)
    words = ["--params", "80%", "--method", "random", "--set", "evaluation.prompts=[Line]"]
    status, said, _ = ask("prune", tiny_folder, "-o", tmp_path / "out", *words)
    assert status == 0
    (row,) = [line for line in said.splitlines() if line.startswith("Line")]
    assert row.split()[-1] == "–"


def test_a_conversation_remembers_what_was_said(
    tiny_folder: Path, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = chatting(tiny_folder, tmp_path / "chats"), []
    real = answers.answer

    def heard(*words: Any, **how: Any) -> Any:
        said = real(*words, **how)
        told.append((words[2], list(how["before"]), said.text))
        return said

    monkeypatch.setattr(answers, "answer", heard)
    monkeypatch.setattr("sys.stdin", io.StringIO("Line 7\nLine 8\n\nnot read\n"))
    assert ask("chat", folder, "--max-new-tokens", 4, "--dtype", "float32")[0] == 0
    (first, before, text), (second, then, _) = told
    assert (first, before) == ("Line 7", [])
    assert (second, then) == ("Line 8", [("Line 7", text)])


def test_what_was_said_before_stands_before_the_prompt(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for folder in (tiny_folder, chatting(tiny_folder, tmp_path / "chats")):
        loaded = load(str(folder))
        monkeypatch.setattr(
            loaded.model,
            "generate",
            lambda ids, of=loaded.tokenizer, **_: read.append(of.decode(ids[0])) or torch.cat([ids, ids], 1),
        )
        answer(loaded.model, loaded.tokenizer, "And then?", before=[("Who?", "A fox.")], max_new_tokens=4)
    assert "Who?\nA fox.\nAnd then?" in read[0]
    assert "[user]Who?[assistant]A fox.[user]And then?" in read[1]


def test_a_conversation_too_long_for_the_model_begins_anew(
    tiny_folder: Path, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chatting(tiny_folder, tmp_path / "chats")
    limit = load(str(folder)).model.config.max_position_embeddings
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'a' * (limit - 40)}\n{'b' * (limit - 40)}\n"))
    status, _, told = ask("chat", folder, "--max-new-tokens", 4)
    assert status == 0
    assert "the model forgets the conversation so far" in " ".join(told.split())


def test_json_needs_a_prompt(tiny_folder: Path, ask: Any) -> None:
    status, _, said = ask("chat", tiny_folder, "--json")
    assert status == 2
    assert "--json prints the answer to a prompt, and there is none" in said
