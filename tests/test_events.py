"""An event is told as a plain dict with what was set, and comes back from it; what is none of ours is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from adapt_pruner.core import events
from adapt_pruner.core.events import Cut, Evaluation, Event, Other, Progress, Start, Step, Tasks, Warned, parse, parse_line
from adapt_pruner.report.screen import Screen
from adapt_pruner.run.folder import RunFolder

KINDS = dict(Event._kinds)
STEP = {
    "event": "step", "time": 1.5, "stage": 1, "step": 3, "tokens": 96, "loss": 2.5, "lr": 1e-3, "gradient_norm": 0.5,
    "tokens_per_second": 10.0, "peak_bytes": 7,
}  # fmt: skip


def test_what_is_told_has_what_was_set_and_nothing_else() -> None:
    cut = Cut(stage=1, iteration=2, params=90, target=80, loss=None, sizes={"layers.0.neurons": 4})
    told = cut.to_dict()
    assert told == {
        "event": "cut", "stage": 1, "iteration": 2, "params": 90, "target": 80, "loss": None, "sizes": {"layers.0.neurons": 4},
    }  # fmt: skip
    assert next(iter(told)) == "event"
    assert parse(told) == cut
    assert parse(json.loads(json.dumps(told))) == cut
    assert cut.figures() == {"params": 90}


def test_a_line_of_a_log_is_the_event() -> None:
    step = parse_line(json.dumps(STEP))
    assert isinstance(step, Step)
    assert step.to_dict() == STEP
    assert step.line() == "stage 1: training, 96 tokens, loss 2.500, lr 1.00e-03, 10 tokens/s"
    taught = step.model_copy(update={"loss_is": "KL to the dense model"})
    assert ", loss 2.500 (KL to the dense model), lr" in taught.line(), "which is no logarithm of a perplexity"


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("tokens", 96.0, True), ("tokens", 96.5, False), ("tokens", True, False), ("tokens", -1, False), ("tokens", 10**15, False),
        ("tokens", "96", False), ("tokens", None, False), ("loss", None, True), ("loss", 3, True), ("loss", "2.5", False),
        ("loss", True, False), ("loss", float("nan"), False), ("loss", float("inf"), False), ("loss", 10**400, False),
        ("time", "noon", False), ("time", None, True), ("stage", [], False), ("more", "of it", True),
    ],
)  # fmt: skip
def test_a_value_of_another_form_makes_a_line_none(key: str, value: Any, good: bool) -> None:
    assert (parse_line(json.dumps(STEP | {key: value})) is not None) == good


def test_what_json_may_say_is_read_and_what_it_may_not_is_none() -> None:
    """Half a surrogate pair is how JSON has a file name that is no UTF-8; a number may overflow without being called infinite."""
    warned = parse_line(json.dumps({"event": "warning", "message": "caf\udce9.txt"}))
    assert isinstance(warned, Warned)
    assert warned.message == "caf\udce9.txt"
    step = json.dumps(STEP)
    assert parse_line(step.replace("96", "96e400")) is None
    assert parse_line(step.encode()) == parse_line(step)
    for broken in (step[:-1], step + "x", "[" * 100_000, "7", "\ufeff" + step, step.replace("96", "096")):
        assert parse_line(broken) is None, broken[:20]


def test_a_live_figure_may_be_no_number_though_a_line_may_not() -> None:
    """A run tells what it finds, and its log says null."""
    step = parse(STEP | {"loss": float("nan")})
    assert isinstance(step, Step)
    assert "loss nan" in step.line()
    evaluation = Evaluation(stage=0, params=10, perplexity=float("inf"))
    assert evaluation.line("at the start") == "at the start: perplexity inf on held-out text, 10 parameters"


def test_a_kind_that_is_not_known_is_kept_as_it_is() -> None:
    told = {"event": "sun", "phase": 3, "time": 2.0}
    sun = parse(told)
    assert isinstance(sun, Other)
    assert sun.to_dict() == told
    assert sun.line() == ""
    assert all(parse(none) is None for none in ({}, {"event": ["a"]}, {"event": None}))


def test_a_log_of_an_older_version_lacks_keys() -> None:
    start = parse({"event": "start", "params": 10, "target": 5})
    assert isinstance(start, Start)
    assert start.line() == "pruning to 5 parameters, 50% of all, by "
    assert Start(params=5, target=5).line() == "keeping all 5 parameters"
    assert start.begun == "dense"
    assert [Start(params=10, now=9).begun, Start(dense=False).begun, Start(params=9, now=9).begun] == [
        "at the start", "at the start", "dense",
    ]  # fmt: skip
    assert Start(params=10, now=9).given == "dense"
    assert Cut(params=3).line() == "", "nothing is said where what it would say is not there"


def test_a_start_says_the_share_of_the_decoder_the_text_and_what_to_expect() -> None:
    start = Start(
        method="best", params=268_000_000, target=228_000_000, decoder=100_000_000, decoder_target=60_000_000, text="my.txt"
    )
    assert start.line() == "pruning to 228.0 M parameters, 85% of all and 60% of the decoder's, by best, calibrated on my.txt"
    less = start.model_copy(update={"decoder_target": 49_000_000, "text": "python-docs:train"})
    assert (
        "calibrated on python-docs:train (Python's language reference; text of your own gives a better model: --set calibration.source=FILE)"
        in less.line()
    )
    assert less.line().endswith(
        "without training, a model with so little of its decoder answers nonsense: train it (adapt-pruner run)"
    )
    assert "nonsense" not in less.model_copy(update={"training_tokens": 10**6}).line()


class Moon(Event, kind="moon"):
    """A kind that nothing but its class knows."""

    phase: float

    def line(self, begun: str = "dense") -> str:
        return f"the moon is at {self.phase:.1f}"

    def figures(self) -> dict[str, float]:
        return {"phase": self.phase}


class Cloud(Event, kind="cloud"):
    """One that no log keeps."""

    logged = False


def test_a_new_event_is_its_class(tmp_path: Path) -> None:
    """It is said, logged or not, and told to trackers, by code that does not name it."""
    shown = Screen(Console(file=io.StringIO(), width=100))
    folder = RunFolder(tmp_path)
    folder._begun = True
    for told in (Moon(phase=0.5), Cloud()):
        shown(told)
        folder.log(told)
    assert shown._console.file.getvalue() == "the moon is at 0.5\n"  # type: ignore[attr-defined]
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    moon = parse_line(line)
    assert isinstance(moon, Moon)
    assert moon.time is not None
    assert moon.figures() == {"phase": 0.5}


def test_a_writer_that_forgets_a_key_is_stopped() -> None:
    with pytest.raises(ValidationError):
        Tasks(stage=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Warned(message=3)  # type: ignore[arg-type]


def test_events_are_read_without_torch() -> None:
    code = f"import sys, {events.__name__}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_run_says_that_its_model_writes_the_text() -> None:
    line = Start(method="flap", params=100, target=80, text="self").line()
    assert "calibrated on self-written text (text of your own gives a better model: --set calibration.source=FILE)" in line
    assert Progress(phase="write", done=1, of=2).doing == "writing calibration text 1/2"
    assert Progress(phase="write", done=1, of=2, what="repair text").doing == "writing repair text 1/2"
