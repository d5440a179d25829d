"""What a person sees at work: the phase and how far it is, the time, and no number that a line breaks."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapt_pruner.cli import tables
from adapt_pruner.compare.cells import prune_apart
from adapt_pruner.core.events import Cut, Evaluation, Event, Load, Progress, Start, Step
from adapt_pruner.core.events.comparison import CellBegun, CellDone, InCell
from adapt_pruner.core.events.progress import RunProgress
from adapt_pruner.core.events.run import Planned
from adapt_pruner.recipe import Recipe
from adapt_pruner.report import screen as screens
from adapt_pruner.report.screen import Screen
from conftest import as_dicts

LARGE = {
    f"layers.{layer}.{kind}": size
    for layer in range(30)
    for kind, size in {"neurons": 1536, "kv_heads": 3, "query_heads": 9}.items()
}
STAGES: list[Event] = [
    Start(
        method="best", stages=3, params=134_515_008, target=105_000_000, decoder=106_000_000, decoder_target=76_000_000,
        training_tokens=33_554_432, text="python-docs:train", began=LARGE, sizes=LARGE,
    ),
    Evaluation(stage=0, params=134_515_008, perplexity=123.456, nll=4.8),
    Cut(
        stage=2, iteration=12, params=120_483_264, target=114_838_336, loss=3.412,
        sizes={name: size // 2 for name, size in LARGE.items()},
    ),
    Step(stage=2, step=1200, tokens=12_345_678, loss=3.4567, lr=1e-4, tokens_per_second=12_345.6),
]  # fmt: skip
NUMBER = re.compile(r"\d[\d.,/]*\d|\d")


def seen(events: list[Event], *, width: int, began: float = 1000.0, each: float = 1.0) -> tuple[Screen, list[str]]:
    """A screen after these events, a second apart, and the lines that move then."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    shown = Screen(console, moves=True)
    for number, event in enumerate(events):
        shown(event.model_copy(update={"time": began + each * number}))
    with console.capture() as captured:
        console.print(shown.render())
    return shown, captured.get().splitlines()


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens.time, "time", lambda: 1064.0)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_too_wide_and_none_breaks_a_number(width: int) -> None:
    phases = [
        Progress(phase="repair", done=12, of=60, stage=2, iteration=13),
        Progress(phase="write", done=15_360, of=16_256),
        Progress(phase="task", task="leaderboard_mmlu_professional_psychology", done=1_024, of=12_256),
        Progress(phase="choose", done=0, of=0, stage=2, iteration=13),
    ]
    whole = set(NUMBER.findall(" ".join(visible_words(seen([*STAGES, phase], width=1000)[1]) for phase in phases)))
    assert {"12/60", "15,360/16,256", "1,024/12,256", "120.5", "12.3"} <= whole
    for phase in phases:
        shown, lines = seen([*STAGES, phase], width=width)
        assert all(len(line) <= width for line in lines), lines
        assert set(NUMBER.findall(visible_words(lines))) <= whole
        assert NUMBER.findall(visible_words(lines)) == NUMBER.findall(visible_words(seen([*STAGES, phase], width=1000)[1]))
        permanent = shown._console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert all(len(line) <= width for line in permanent), "what stays on the screen is wrapped between words"


def visible_words(lines: list[str]) -> str:
    return " ".join(line.rstrip() for line in lines).replace("\u00a0", " ")


def test_the_bar_says_phase_count_time_so_far_and_time_left() -> None:
    item: Any = {"stage": 1, "times": 4, "repeats": True}
    plan = Planned(
        targets=[50], tokens=[0], items=[{"phase": "score", "flops": 1e9, **item}, {"phase": "repair", "flops": 1e9, **item}]
    )
    phases = [(phase, done) for phase in ("score", "repair") for done in range(0, 61, 12)]
    events: list[Event] = [Load(model="m"), plan, Start(params=100, target=50)]
    events += [Progress(phase=phase, done=done, of=60 if done else 0, stage=1, iteration=1) for phase, done in phases]
    _, lines = seen(events[:-4], width=100, each=4.0)  # it is the 64th second: 4 events of repairing, no more heard since 40
    assert "stage 1, iteration 1: repairing 12/60" in lines[-2]
    assert "1 min 04 s so far, " in lines[-1]
    assert lines[-1].rstrip().endswith("left")
    assert "━" in lines[-1]
    _, wide = seen(events[:-4], width=120, each=4.0)
    assert "repairing 12/60" in wide[-1]
    assert "━" in wide[-1]
    _, narrow = seen(events[:-4], width=46, each=4.0)
    assert "━" not in "".join(narrow), "there is no room"
    assert "repairing 12/60" in "".join(narrow)
    assert "1 min 04 s" in "".join(narrow)


def test_before_anything_is_measured_nothing_is_promised() -> None:
    plan = Planned(targets=[50], tokens=[0], items=[{"phase": "write", "stage": 0, "times": 1, "flops": None, "repeats": False}])
    assert "starting" in seen([], width=80)[1][-2]
    assert "loading m" in seen([Load(model="m")], width=80)[1][-2]
    _, lines = seen([Load(model="m"), plan, Progress(phase="write", done=0, of=64)], width=80)
    assert lines[-1].rstrip().endswith("estimating")


def test_where_there_is_no_terminal_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text that the model writes, too, which takes minutes before a run begins."""
    clock = [0.0]
    monkeypatch.setattr(screens.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=80)
    shown = Screen(console)
    for second in range(100):
        clock[0] = 100.0 + second
        shown(Progress(phase="write", done=64 * second, of=16_256, time=1000.0 + second))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 10
    assert lines[0] == "writing calibration text 0/16,256"
    assert lines[1] == "writing calibration text 640/16,256 (10 s so far)"


def test_a_cell_of_a_comparison_says_how_far_it_is(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    calibration = {"source": str(text_file), "samples": 4, "length": 32, "self_generated": 0}
    recipe = Recipe(model=str(tiny_folder), budget="80%", calibration=calibration)
    prune_apart(recipe, tmp_path / "cell", listen=as_dicts(heard.append))
    inner = [one["said"] for one in heard if one["event"] == "in_cell"]
    assert {"planned", "progress", "cut"} <= {one["event"] for one in inner}
    where: dict[str, Any] = {"cell": 2, "of": 4, "method": "best", "size": 113_300_000, "draw": 1, "draws": 1}
    scoring = InCell(said=Progress(phase="score", done=3, of=8, stage=1, iteration=2).to_dict())
    _, lines = seen([CellBegun(**where, seconds_left=900.0, seconds_here=300.0), scoring], width=100)
    assert "cell 2 of 4: best to 113.3 M" in visible_words(lines)
    assert "scoring 3/8" in visible_words(lines)
    assert "13 min 56 s left" in visible_words(lines), "a minute and four seconds after 15 minutes"
    _, lines = seen([CellBegun(**where, seconds_left=900.0, seconds_here=30.0), scoring], width=100)
    assert "14 min 30 s left" in visible_words(lines), "a cell that is late takes nothing off the others"
    assert CellBegun(**where, sparsity="2:4").name == "cell 2 of 4: best with 2:4 zeros"
    _, lines = seen([CellBegun(**where), scoring], width=100)
    assert "left" not in visible_words(lines), "nobody knows before a cell is done"
    item: Any = {"stage": 1, "times": 1, "repeats": True, "flops": 1e9}
    plan = Planned(targets=[50], tokens=[0], items=[{"phase": "score", **item}])
    half = [
        InCell(said={**event.to_dict(), "time": 1001.0 + 20 * n})
        for n, event in enumerate([plan, Progress(phase="score", done=0, of=0, stage=1)])
    ]
    half.append(InCell(said={**Progress(phase="score", done=5, of=10, stage=1).to_dict(), "time": 1063.9}))
    _, lines = seen([CellBegun(**where, seconds_left=60.0, seconds_here=30.0), *half], width=100)
    assert "1 min 13 s left" in visible_words(lines), (
        "what the cell itself says, where it takes longer: 43 s, and 30 s for the others"
    )
    assert "left" not in visible_words(seen([CellBegun(**where), scoring, CellDone(**where, nll=1.0)], width=100)[1])


def test_a_watched_run_stands_where_it_says() -> None:
    shown, _ = seen(STAGES, width=120)
    shown.show_progress(RunProgress("repairing 12/60", "stage 2", 50.0, 100.0, 100.0, 100.0, ends=True, share=0.3), 1060.0)
    with shown._console.capture() as captured:
        shown._console.print(shown.render())
    line = captured.get().splitlines()[-1]
    assert "stage 2: repairing 12/60" in line
    assert "54 s so far, 1 min 36 s left" in line, "it is four seconds later"


HEADER = [
    "method",
    "parameters",
    "removed",
    "perplexity",
    "spread",
    "× dense",
    "bits/byte",
    "seconds",
    "peak memory",
    "speed-up",
    "failed",
]
TABLE = [
    ["dense", "134,515,008", "0.0%", "27.33", "27.33–27.33", "1.00", "1.0345", "–", "–", "1.00×", ""],
    [""] * 11,
    ["at most 113.3 M", *[""] * 10],
    [
        "adapt-pruner",
        "113,295,744",
        "20.0%",
        "1,234.56",
        "1,200.10–1,300.77",
        "45.17",
        "1.9876",
        "1,234.5",
        "1.5 GiB",
        "1.21×",
        "",
    ],
    ["magnitude-all", "–", "–", "–", "–", "–", "–", "–", "–", "–", "3 of 3 draws: the loss is infinite"],
]


@pytest.mark.parametrize("columns", [slice(0, 4), slice(0, 11)])
@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_no_table_breaks_a_number(columns: slice, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(tables, "console", lambda **_: Console(file=out, force_terminal=True, width=width, color_system=None))
    tables.print_table(HEADER[columns], [row[columns] for row in TABLE])
    lines = out.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines), lines
    words = {word for line in lines for word in line.split()}
    assert {word for row in TABLE for cell in row[columns] for word in cell.split()} - {"–"} <= words
    assert {word for name in HEADER[columns][1:] for word in name.split()} <= words
    headed = next(index for index, line in enumerate(lines) if line.strip() == "at most 113.3 M")
    assert "adapt-pruner" in lines[headed + 1]
