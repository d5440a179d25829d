"""Seeing a run live, in its own terminal or from its log alone; and asking a model something, beside another."""

import fcntl
import io
import json
import operator
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from adapt_pruner.core.events import Cut, Start, parse, parse_line
from adapt_pruner.core.events.progress import RunProgress
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.answer import answer
from adapt_pruner.report import with_card
from adapt_pruner.report.record import read_progress
from adapt_pruner.report.screen import Bars, Screen
from adapt_pruner.run import folder
from conftest import as_dicts, byte_tokenizer, tiny_model
from test_cli import call
from test_report import small_recipe

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def heard(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A finished run and what it told its listener."""
    events: list[dict[str, Any]] = []
    folder = tmp_path_factory.mktemp("runs") / "run"
    with_card.run(small_recipe(tiny_folder, text_file), folder, listen=as_dicts(events.append))
    return folder, events


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


def test_all_that_a_run_tells_is_an_event_with_no_key_beside(heard: tuple[Path, list[dict[str, Any]]]) -> None:
    assert {"load", "start", "progress", "cut", "step", "evaluation", "saved"} <= {told["event"] for told in heard[1]}
    for told in heard[1]:
        event = parse(told)
        assert event is not None, told
        assert event.to_dict() == told
    for line in (heard[0] / "log.jsonl").read_text().splitlines():
        event = parse_line(line)
        assert event is not None
        assert event.to_dict() == json.loads(line)


def test_every_phase_that_a_run_tells_was_planned(heard: tuple[Path, list[dict[str, Any]]]) -> None:
    (planned,) = [told for told in heard[1] if told["event"] == "planned"]
    ahead = {(item["phase"], item["stage"]): item["times"] for item in planned["items"]}
    told = {(told["phase"], told.get("stage", 0)) for told in heard[1] if told["event"] == "progress"}
    assert told - {("read", 0)} <= ahead.keys()
    assert ahead.keys() - told <= {("heads", 1), ("heads", 2)}, "and what was planned came"
    for stage in (1, 2):
        cuts = sum(event["event"] == "cut" and event["stage"] == stage for event in heard[1])
        assert abs(ahead["cut", stage] - cuts) <= 2, "units of a tiny model are coarse"


def test_bars_are_as_high_as_what_is_left() -> None:
    bars = Bars()
    assert bars.lines(80) == [""], "before anything is known"
    began = {
        "layers.0.neurons": 8,
        "layers.0.kv_heads": 2,
        "layers.1.neurons": 8,
        "layers.1.kv_heads": 2,
        "layers": 2,
        "residual": 16,
    }
    bars.hear(Start(began=began, sizes=began, layers_left=None))
    assert bars.lines(80) == ["neurons ██ 100%"]
    bars.hear(Cut(params=9, sizes={"layers.0.neurons": 4, "layers.1.neurons": 8, "layers.1.kv_heads": 1}))
    assert bars.lines(80) == ["neurons ▄█ 75%  KV heads █▄ 75%"]
    assert bars.lines(20) == ["neurons ▄█ 75%", "KV heads █▄ 75%"]
    bars.hear(Cut(params=5, sizes={"layers": 1}, layers_left=[1]))
    assert bars.lines(80) == ["neurons  █ 50%  KV heads  ▄ 25%"], "the layer that is gone leaves its place empty"
    bars.hear(Cut(params=2, sizes={"layers.0.neurons": 1}, layers_left=[1]))
    assert bars.lines(80)[0].startswith("neurons  ▁ 6%"), "what is layer 0 now was layer 1"


def test_a_run_that_goes_on_shows_what_it_had_lost() -> None:
    bars = Bars()
    began = {"layers.0.neurons": 8, "layers.1.neurons": 8}
    bars.hear(Start(began=began, sizes={"layers.0.neurons": 2}, layers_left=[1]))
    assert bars.lines(80) == ["neurons  ▂ 12%"]


def test_a_terminal_shows_stage_parameters_loss_speed_and_time_left(heard: tuple[Path, list[dict[str, Any]]]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    shown = Screen(console, moves=True)
    middle = next(i for i, event in enumerate(heard[1]) if event["event"] == "step" and event["stage"] == 2)
    now = time.time()
    for number, event in enumerate(heard[1][: middle + 1]):
        shown(parse(event | {"time": now + number - middle}))
    with console.capture() as captured:
        console.print(shown.render())
    anatomy, figures, bar = captured.get().replace("\u00a0", " ").splitlines()
    step, cut = heard[1][middle], [event for event in heard[1][:middle] if event["event"] == "cut"][-1]
    assert anatomy.startswith("neurons ")
    for words in (
        "stage 2 of 2",
        f"{cut['params']:,} of 50,784 parameters",
        f"loss {step['loss']:.3f}",
        f"{step['tokens_per_second']:,.0f} tokens/s",
    ):
        assert words in figures
    assert f"stage 2: training {step['tokens']:,}/" in bar
    assert " left" in bar


def test_a_run_says_where_it_stands_as_long_as_it_works(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_EVERY", 0.0)
    monkeypatch.setattr(folder.RunFolder, "log", lambda *_: None)
    seen: list[tuple[str, str]] = []

    def listen(event: dict[str, Any]) -> None:
        if (stands := read_progress(tmp_path / "run")) is not None:
            seen.append((stands[0].where, stands[0].doing))
            assert abs(stands[1] - time.time()) < 60

    with_card.run(
        small_recipe(tiny_folder, text_file).model_copy(update={"stages": 1}), tmp_path / "run", listen=as_dicts(listen)
    )
    assert ("", "reading text") in seen, "before the log has a line"
    told = {(where, doing.split(" ")[0]) for where, doing in seen if "/" in doing}
    assert {("stage 1, iteration 1", "scoring"), ("stage 1", "training"), ("stage 1", "evaluating")} <= told
    assert read_progress(tmp_path / "run") is None, "it goes when the run does"


def test_watching_names_the_phase(
    heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the run says last; what is no such thing, as where it is just being written, is passed over."""
    whole, stands = (
        (heard[0] / "log.jsonl").read_bytes(),
        RunProgress("repairing 12/60", "stage 2", 75.0, 60.0, 60.0, 60.0, ends=True),
    )
    for said, shown in ((json.dumps({"time": time.time(), **asdict(stands)}), True), ('{"time": 1.0, "doing": "rep', False)):
        (tmp_path / "progress.json").write_text(said)
        (tmp_path / "log.jsonl").write_bytes(whole[: len(whole) // 2])
        works_while_watched(tmp_path, [b"", whole], monkeypatch)
        status, _, err = ask("watch", tmp_path)
        assert status == 0, err
        assert ("stage 2: repairing 12/60, 1 min 15 s so far, 1 min 00 s left" in err) == shown


def test_watching_a_finished_run_says_so(heard: tuple[Path, list[dict[str, Any]]], ask: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in heard[0].rglob("*")}
    status, out, err = ask("watch", heard[0])
    assert status == 0
    assert "the run is finished" in out
    assert "stage 2 of 2" in err
    assert {path: path.stat().st_mtime_ns for path in heard[0].rglob("*")} == before, "nothing is changed"


def test_a_run_is_finished_whatever_its_log_says_last(heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(heard[0], tmp_path / "run"))
    whole = (run / "log.jsonl").read_text()
    warned = whole + json.dumps({"time": time.time(), "event": "warning", "message": "there is no report"}) + "\n"
    for log in (warned, "", whole[: len(whole) // 2]):
        (run / "log.jsonl").write_text(log)
        status, out, err = ask("watch", run)
        assert (status, "the run is finished" in out) == (0, True), err
    (run / "log.jsonl").unlink()
    assert ask("watch", run)[0] == 0
    shutil.rmtree(run / "model")
    (run / "log.jsonl").write_text(warned)
    assert ask("watch", run)[0] == 0, "a warning does not undo the end"
    (run / "log.jsonl").write_text(
        warned + json.dumps({"event": "resumed", "path": "p", "stage": 1, "step": 1, "pruned": True}) + "\n"
    )
    assert ask("watch", run)[0] == 1, "work that begins again does"


def works_while_watched(run: Path, logs: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody works in `run` whose log is the next of `logs` whenever the watcher has looked and waits; after the last he is gone."""
    lock = (run / ".lock").open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    coming = iter(logs)

    def wait(seconds: float) -> None:
        if log := next(coming, b""):
            (run / "log.jsonl").write_bytes(log)
        if operator.length_hint(coming) == 0:
            lock.close()

    monkeypatch.setattr(sys.modules["adapt_pruner.cli.watch"], "time", SimpleNamespace(sleep=wait, time=time.time))


def test_a_run_that_prepares_is_waited_for(
    heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for log, wanted in (
        (b"", (1, "ended before its first step")),
        ((heard[0] / "log.jsonl").read_bytes(), (0, "stage 2: perplexity")),
    ):
        works_while_watched(tmp_path, [b"", b"", log], monkeypatch)
        status, _, err = ask("watch", tmp_path)
        assert (status, wanted[1] in err) == (wanted[0], True), err
        assert err.count("is preparing") == 1
        assert "recipe.yaml" not in err, "there is none to go on with"


def test_watching_a_run_that_was_killed_says_how_to_go_on(
    heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(heard[0], tmp_path / "run"))
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    shutil.rmtree(run / "model")
    status, out, err = ask("watch", run)
    assert (status, out) == (1, "")
    assert "no process works in" in err
    assert f"adapt-pruner run {run}/recipe.yaml -o {run}" in err


def test_watching_follows_a_run_to_its_end(
    heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines come in pieces, and the log is cut back once, as by a run that goes on from a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    whole = (heard[0] / "log.jsonl").read_bytes()
    half = len(whole) // 2
    (run / "log.jsonl").write_bytes(whole[:half])
    works_while_watched(run, [whole[: half // 2], whole[: half // 2 + 7], whole], monkeypatch)
    status, out, err = ask("watch", run)
    assert status == 0, err
    assert "the run is finished" in out
    assert "stage 2: perplexity" in err, "what came while watching is said line by line"


def test_a_log_with_foreign_or_broken_lines_is_watched_all_the_same(
    heard: tuple[Path, list[dict[str, Any]]], ask: Any, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(heard[0], tmp_path / "run"))
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[3:3] = [b"\xff{\n", b"[1]\n", b'{"event": "step"}\n', b'{"event": "cut", "params": null}\n', b"[" * 10**5 + b"\n"]
    lines += [b'{"event": "warning", "time": "noon", "message": "x"}\n', b'{"event": "cut", "params": 9, "sizes": ["a"]}\n']
    lines += [b'{"event": "vocabulary", "tokens": "x", "tokens_before": "y"}\n']
    (run / "log.jsonl").write_bytes(b"".join(lines))
    status, out, _ = ask("watch", run)
    assert (status, "the run is finished" in out) == (0, True)


def test_an_answer_is_what_greedy_generation_gives() -> None:
    model, tokenizer = tiny_model(vocab_size=259), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    told: list[str] = []
    state = torch.get_rng_state()
    said = answer(model, tokenizer, "Why?", system="Be short.", max_new_tokens=8, on_text=told.append)
    ids = tokenizer("[system]Be short.[user]Why?[assistant]", return_tensors="pt", add_special_tokens=False).input_ids
    wanted = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=2)[0, ids.shape[1] :]
    assert said.text == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert "".join(told).strip() == said.text
    assert (said.tokens, said.templated) == (len(wanted), True)
    assert torch.equal(torch.get_rng_state(), state), "the random state is left as found"


def test_draws_follow_the_seed_and_a_model_without_template_goes_on_with_the_prompt() -> None:
    model, tokenizer = tiny_model(vocab_size=259), byte_tokenizer()
    texts = [answer(model, tokenizer, "Why?", max_new_tokens=12, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert not answer(model, tokenizer, "Why?", max_new_tokens=2).templated


def test_prompts_that_cannot_be_answered_are_refused() -> None:
    model, tokenizer = tiny_model(vocab_size=259), byte_tokenizer()
    with pytest.raises(UsageError, match="prompt is empty"):
        answer(model, tokenizer, "  ")
    with pytest.raises(UsageError, match="shorten it, or lower --max-new-tokens"):
        answer(model, tokenizer, "long " * 50, max_new_tokens=model.config.max_position_embeddings)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UsageError, match="no system here"):
        answer(model, tokenizer, "Why?", system="x", max_new_tokens=2)


def test_both_models_answer_side_by_side(heard: tuple[Path, list[dict[str, Any]]], tiny_folder: Path, ask: Any) -> None:
    pruned = heard[0] / "model"
    status, out, _ = ask("chat", pruned, "Line 7:", "--against", tiny_folder, "--max-new-tokens", 6, "--json")
    answers = json.loads(out)["answers"]
    assert status == 0
    assert [one["model"] for one in answers] == [str(pruned), str(tiny_folder)]
    assert answers[0]["params"] < answers[1]["params"]
    status, out, _ = ask("chat", pruned, "Line 7:", "--against", tiny_folder, "--max-new-tokens", 6)
    assert status == 0
    assert "6 tokens" in out
    assert out.count("parameters") == 2
    status, out, err = ask("chat", pruned, "Line 7:", "--max-new-tokens", 6)
    assert (status, "6 tokens" in err) == (0, True)
    assert out.removesuffix("\n"), "one answer alone comes as it is written"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["  "], "prompt is empty"),
        (["hi", "--against", "no/such", "--max-new-tokens", "4"], "no/such"),
        (["hi", "--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
def test_chat_refuses_in_a_sentence(tiny_folder: Path, ask: Any, words: list[str], says: str) -> None:
    status, _, err = ask("chat", tiny_folder, *words)
    assert status == 2
    assert says in err
    assert "Traceback" not in err


def test_a_seed_without_a_draw_is_refused(ask: Any, tiny_folder: Path) -> None:
    status, _, err = ask("chat", tiny_folder, "hello", "--seed", 5)
    assert status == 2
    assert "--seed 5 has no effect at temperature 0, which draws nothing; add --temperature" in err
