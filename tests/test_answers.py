"""What a run's model answers at the start and the end: in its log, its figures and on its page."""

from pathlib import Path
from typing import Any

import pytest

from adapt_pruner import recipe
from adapt_pruner.errors import RunError
from adapt_pruner.evaluate.answer import PROMPTS
from adapt_pruner.report import documented, page
from adapt_pruner.report.record import read_record
from adapt_pruner.run import results
from conftest import read_json
from test_report import Seen, small_recipe


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
    outcome = documented.run(answering(tiny_folder, text_file, prompts=asked), tmp_path / "run")
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
    silent = documented.prune(recipe.read({"method": "random", "model": str(tiny_folder), "budget": "80%"}), tmp_path / "silent")
    assert "answers" not in silent.figures
    chats = tmp_path / "chats"
    for path in tiny_folder.iterdir():
        (chats / path.name).parent.mkdir(exist_ok=True)
        (chats / path.name).write_bytes(path.read_bytes())
    (chats / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}{% endfor %}")
    asked = documented.prune(recipe.read({"method": "random", "model": str(chats), "budget": "80%"}), tmp_path / "asked")
    assert [one["prompt"] for one in asked.figures["answers"][1]["answers"]] == list(PROMPTS)
    none = recipe.read({"method": "random", "model": str(chats), "budget": "80%", "evaluation": {"prompts": []}})
    assert "answers" not in documented.prune(none, tmp_path / "none").figures


def test_a_model_that_cannot_answer_is_no_error(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(*_: Any, **__: Any) -> Any:
        raise RunError("no answer can be read from logits of nan")

    monkeypatch.setattr(results, "answer", ruined)
    told: list[dict[str, Any]] = []
    asked = recipe.read({"method": "random", "model": str(tiny_folder), "budget": "80%", "evaluation": {"prompts": ["Line"]}})
    outcome = documented.prune(asked, tmp_path / "out", listen=told.append)
    assert "answers" not in outcome.figures
    warned = [event["message"] for event in told if event["event"] == "warning"]
    assert warned == ["the prompts were not answered: no answer can be read from logits of nan"] * 2
