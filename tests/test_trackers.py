"""Trackers are told what the log says, at the step it belongs to, and never stand in a run's way."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner import cli
from adapt_pruner.core.events import Start, Tasks, parse
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import run
from adapt_pruner.run import trackers
from conftest import as_dicts
from test_resume import log_of

Told = list[tuple[dict[str, Any], int]]


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "adapt-pruner",
        "model": str(tiny_folder), "budget": "80%", "stages": 2, "step": 0.1, "dtype": "float32", "checkpoint_minutes": 0,
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "training": {"source": str(text_file), "tokens": 2_560, "batch_tokens": 512, "length": 64, "lr": 3e-3},
        "evaluation": {"source": str(text_file), "window": 64, "max_windows": 2},
    })  # fmt: skip


def reporting_to(recipe: Recipe, *names: str) -> Recipe:
    return read(recipe.model_dump() | {"report_to": list(names)})


def tracked(recipe: Recipe, folder: Path, listen: Callable[[dict[str, Any]], None] = lambda event: None) -> None:
    run(recipe, folder, listen=as_dicts(listen))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads from a run's event files: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "trackers" / "run").glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install '.[tensorboard]'",
)


class Fake:
    """A tracker that writes down what it is told, and fails where it is asked to."""

    requires_logging_directory = False
    fails_at = ""
    told: Told
    configuration: dict[str, Any]
    started: list[str]
    finished: list[str]

    def __init__(self, name: str) -> None:
        self.name = name
        type(self).told, type(self).started, type(self).finished = [], [name], []

    def _at(self, what: str) -> None:
        if self.fails_at == what:
            raise ConnectionError("the tracker's server is away\nand more")

    def start(self) -> None:
        self._at("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        type(self).configuration = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self._at("log")
        self.told.append((values, step))

    def finish(self) -> None:
        self.finished.append(self.name)
        self._at("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    found = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: found("json") if name == "wandb" else found(name))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    for key, value in {"fails_at": "", "told": [], "started": [], "finished": [], "configuration": {}}.items():
        monkeypatch.setattr(Fake, key, value, raising=False)
    return Fake


@needs_tensorboard
def test_tensorboard_is_told_what_the_log_says(recipe: Recipe, tmp_path: Path) -> None:
    """Also by a run that was stopped and goes on; and the result is what it is without a tracker."""

    def stop(event: dict[str, Any]) -> None:
        ends = event["event"] == "evaluation" and event["stage"] == 1 and not event["after_cuts"]
        if ends:  # the first thing that is told again
            raise KeyboardInterrupt

    asked = reporting_to(recipe, "tensorboard")
    with pytest.raises(KeyboardInterrupt):
        tracked(asked, tmp_path / "run", stop)
    assert set(scalars(tmp_path / "run")["step/loss"]) == {1, 2}
    tracked(asked, tmp_path / "run")
    assert len(list((tmp_path / "run" / "trackers" / "run").glob("events.out.tfevents.*"))) == 2
    told, log = scalars(tmp_path / "run"), log_of(tmp_path / "run")
    said: dict[str, dict[int, float]] = {}
    step = 0
    for event in filter(None, map(parse, log)):
        step = getattr(event, "step", step)
        for name, figure in event.figures().items():
            said.setdefault(f"{event.kind}/{name}", {})[step] = figure
    assert told.keys() == said.keys()
    assert all(told[name] == pytest.approx(said[name], rel=1e-6) for name in said)
    assert {name.partition("/")[0] for name in told} == {"step", "evaluation", "cut"}
    assert set(told["step/loss"]) == {1, 2, 3, 4, 5}

    run(recipe, tmp_path / "alone")
    weights, alone = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(weights[name], alone[name]) for name in alone)


def test_scores_on_tasks_are_told_by_their_average(recipe: Recipe, fake: type[Fake], tmp_path: Path) -> None:
    with trackers.reporting(reporting_to(recipe, "wandb"), tmp_path, lambda event: None) as tell:
        tell(Start())
        tell(Tasks(stage=0, average=0.5, params=3, scores=[]))
        tell(Tasks(stage=1, average=None, params=2, scores=[]))
    assert [values for values, _ in fake.told] == [{"tasks/average": 0.5, "tasks/params": 3}, {"tasks/params": 2}]


def test_the_recipe_is_told_flat(recipe: Recipe, fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    tracked(reporting_to(recipe, "wandb"), Path())
    assert fake.finished == ["mine"], "the folder's name, also where it is called `.`"
    assert fake.configuration["training.lr"] == 3e-3
    assert fake.configuration["axes"] == str(["neurons", "kv_heads"])
    assert all(isinstance(value, int | float | str | bool) for value in fake.configuration.values())
    assert [step for values, step in fake.told if "step/loss" in values] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_on_the_way_does_not_stop_the_run(
    where: str, recipe: Recipe, fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fails_at", where)
    heard: list[dict[str, Any]] = []
    tracked(reporting_to(recipe, "wandb"), tmp_path / "run", heard.append)
    assert (tmp_path / "run" / "model").is_dir()
    warnings = [event["message"] for event in heard if event["event"] == "warning" and "wandb" in event["message"]]
    assert warnings == ["wandb failed and receives no more figures of this run: the tracker's server is away"]


def test_a_tracker_that_cannot_be_started(
    recipe: Recipe, fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fails_at", "start")
    heard: list[dict[str, Any]] = []
    with pytest.raises(
        UsageError, match="report_to wandb cannot be started .the tracker's server is away.; set it up, or leave it out"
    ):
        tracked(reporting_to(recipe, "wandb"), tmp_path / "run", heard.append)
    assert not [event for event in heard if event["event"] in ("cut", "step", "evaluation")], "before any work"


def test_a_run_that_fails_finishes_its_trackers(recipe: Recipe, fake: type[Fake], tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracked(reporting_to(recipe, "wandb"), tmp_path / "run", fail)
    assert fake.finished == ["run"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed(
    name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence before any work, and nothing is left."""
    found = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    words = ["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "run"), "--set", f"report_to=[{name}]"]
    monkeypatch.setattr(sys, "argv", ["adapt-pruner", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said == f"error: report_to {name} needs the package {name}; {to_install(name)}\n"
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_leaves_nothing_with_a_tracker(recipe: Recipe, fake: type[Fake], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget 1,000 is too small"):
        tracked(read(recipe.model_dump() | {"budget": "1000", "report_to": ["wandb"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert fake.started == []


def test_an_unknown_tracker() -> None:
    with pytest.raises(UsageError, match="report_to"):
        read({"report_to": ["tensorbord"]})
