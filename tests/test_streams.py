"""What others wrote is shown and steers no terminal: from names of files, errors, logs, templates, answers of models, libraries."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.cli.tables import print_table
from adapt_pruner.core.events import Progress, Warned
from adapt_pruner.core.events.comparison import CellBegun, CellLine
from adapt_pruner.core.system.terminal import filtered, one_line, visible
from adapt_pruner.evaluate import answer
from adapt_pruner.report.screen import screen
from conftest import read_json
from test_cli import call

STEERING = {
    "colour": "\x1b[31m", "title": "\x1b]0;evil\x07", "link": "\x1b]8;;http://evil\x1b\\", "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "bell": "\x07", "backspace": "\x08\x08", "return": "\rerror", "form feed": "\x0c", "C1 CSI": "\x9b31m", "C1 OSC": "\x9d0;evil\x9c",
    "DEL": "\x7f", "override": "\u202egpj.exe\u202c", "isolate": "\u2066x\u2069", "separator": "\u2028", "half": "\udc9b", "null": "\x00",
}  # fmt: skip
ALL = "".join(STEERING.values())
STEERS = set("".join(STEERING.values())) - set("[31m]0;evil8;;http://evil\\52;c;ZXZpbA==errorgpj.exex")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", STEERING)
def test_each_is_spelled_out_and_other_text_stays(name: str) -> None:
    assert not STEERS & set(visible(STEERING[name]))
    assert visible(visible(STEERING[name])) == visible(STEERING[name])
    assert not STEERS & set(one_line(f"a\nb{STEERING[name]}"))
    plain = "tab\tline\nÄ ± → ▁█ 日本 שלום \u200f\u200e 👩\u200d👩 \\x1b"
    assert visible(plain) == plain
    assert visible("\x1b[0m\u202e") == "\\x1b[0m\\u202e"


def test_a_name_in_an_error_and_a_broken_template(ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    status, out, err = ask("inspect", f"nowhere{ALL.replace(chr(0), '')}")
    assert (status, "does not exist" in err) == (2, True)
    assert not STEERS & set(out + err)
    folder = tmp_path / "evil\x1b]0;evil\x07"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('x\x1b[31m\u202e\x9b') }}", encoding="utf-8")
    for words in (["inspect", folder], ["chat", folder, "hello"], ["inspect", folder, "--bad\x1b[31m"], ["\x1b[31m"]):
        status, out, err = ask(*words)
        assert not STEERS & set(out + err), words
        assert out + err


def test_an_error_is_one_line_of_words(ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Whatever a name holds, and whatever kind of error another library raised and named in its sentence."""
    for words in (["watch", "\n"], ["inspect", "no\nwhere"], ["inspect", tiny_folder, "--no\nsuch"]):
        status, _, err = ask(*words)
        assert (status, err.count("\n"), len(err) > 20) == (2, 1, True)
    bad = tmp_path / "bad"
    for name, key, value in (("config.json", "bos_token_id", "1"), ("tokenizer_config.json", "eos_token", 0.5)):
        shutil.copytree(tiny_folder, bad, dirs_exist_ok=True)
        (bad / name).write_text(json.dumps(read_json(bad / name) | {key: value}), encoding="utf-8")
        status, _, err = ask("inspect", bad)
        assert (status, key in err) == (2, True)
        assert not re.search(r"<class|\w+Error\b", err)


@pytest.mark.parametrize("against", [False, True])
def test_an_answer_of_a_model(against: bool, ask: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: Any, on_text: Any = None, **others: Any) -> Any:
        if on_text is not None:
            for piece in ALL:
                on_text(piece)
        return answer.Answer(text=f"before {ALL} after", tokens=3, seconds=1.0, ended=True, templated=True)

    monkeypatch.setattr(answer, "answer", said)
    words = ["chat", tiny_folder, "hello", *(["--against", tiny_folder] if against else [])]
    status, out, err = ask(*words)
    assert status == 0
    assert not STEERS & set(out + err)
    assert "\\x1b]0;evil\\x07" in out.replace("\n", "")
    status, out, err = ask(*words, "--json")
    assert not STEERS & set(out + err)
    found = json.loads(out)
    assert (found["answers"][0] if against else found)["text"] == f"before {ALL} after", "JSON keeps it as it is"


@pytest.mark.parametrize("terminal", [False, True])
def test_events_tables_and_what_libraries_print(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal rich's own sequences come through, so what is looked for are those of the others."""
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    evil = f"[bold]{ALL}[/nothing]"
    with filtered():
        with screen() as listen:
            listen(Warned(message=evil))
            listen(CellLine(text=evil))
            listen(Progress(phase="task", task=evil, done=1, of=2))
            listen(CellBegun(cell=1, of=2, method=evil, size=9, draw=1, draws=2))
            listen.say(evil)
            print(evil)
            print(evil, file=sys.stderr)
            sys.stderr.writelines([evil])
        print_table([evil], [[evil]])
    told = stream.getvalue()
    for one in STEERING.values():
        if one not in ("\rerror", "\x1b[31m") or not terminal:
            assert one not in told, repr(one)
    assert "\\x1b]0;evil" in told
    assert not STEERS & set(told) or terminal


def test_a_log_of_somebody_else(ask: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text("model: x\n", encoding="utf-8")
    events = [{"event": "warning", "time": 1.0, "message": f"evil {ALL}"}, {"event": "said", "time": 2.0, "text": ALL}]
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    _, out, err = ask("watch", run)
    assert not STEERS & set(out + err)


def test_the_streams_are_as_before_afterwards(ask: Any, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    status, out, _ = ask("inspect", tiny_folder, "--json")
    assert (status, json.loads(out)["model"]) == (0, str(tiny_folder))
    assert (sys.stdout, sys.stderr) == before
    assert read_json(tiny_folder / "config.json")["model_type"] == "llama"
