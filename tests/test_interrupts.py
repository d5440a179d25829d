"""Ctrl-C and SIGTERM in the middle of training: a checkpoint is written first, and what goes on from it is the same to the last bit."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.core.system.processes import deferred
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import run
from adapt_pruner.run import loop, resume, training
from conftest import as_dicts, assert_same_model, log_of, read_json


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "magnitude-all", "model": str(tiny_folder), "budget": "80%", "dtype": "float32",
        "training": {"source": str(text_file), "tokens": 2_000, "batch_tokens": 256, "length": 64, "lr": 3e-3},
    })  # fmt: skip


@pytest.fixture
def raising() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as on the command line."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("raising")
def test_an_interrupted_run_keeps_the_step_it_was_in(sent: signal.Signals, recipe: Recipe, tmp_path: Path) -> None:
    before = signal.getsignal(sent)
    heard: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), sent)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", listen=as_dicts(listen))
    assert max(event["step"] for event in heard if event["event"] == "step") == 3
    assert heard[-1]["event"] == "interrupted"
    assert heard[-1]["message"].startswith(f"the last complete checkpoint is {tmp_path}/run/checkpoints/stage-1-step-3; the same")
    assert signal.getsignal(sent) is before
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "whole")
    assert_same_model(tmp_path / "run", tmp_path / "whole")


def assert_ends_like_a_whole_run(recipe: Recipe, folder: Path) -> None:
    """Go on with the run in `folder`/run, and compare it with one that nothing stopped."""
    run(recipe, folder / "run")
    run(recipe, folder / "whole")
    assert_same_model(folder / "run", folder / "whole")
    both = [read_json(folder / name / "model" / "pruning.json")["figures"]["perplexities"] for name in ("run", "whole")]
    assert both[0] == both[1]
    for kind in ("step", "evaluation"):
        told = [[(line["stage"], line.get("step")) for line in log_of(folder / name, kind)] for name in ("run", "whole")]
        assert told[0] == told[1], "each once"
    assert len(log_of(folder / "run", "step")) == 8


def test_an_interrupt_in_a_measurement_loses_no_training_and_the_run_measures_again(
    recipe: Recipe, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"evaluation": {"source": str(text_file), "window": 64, "max_windows": 2}, "stages": 2}
    recipe, measure = read(recipe.model_dump() | measured), loop.results.measure_text
    for stage in (1, 2):

        def interrupted(work: Any, *, stage: int, after_cuts: bool = False, at: int = stage) -> None:
            measure(work, stage=stage, after_cuts=after_cuts)
            if stage == at and not after_cuts:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop.results, "measure_text", interrupted)
            run(recipe, tmp_path / "run")
        assert (tmp_path / "run" / "checkpoints" / f"stage-{stage}").is_dir()
    assert_ends_like_a_whole_run(recipe, tmp_path)


def test_an_interrupt_right_after_the_last_step_loses_no_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def ended_by_ctrl_c() -> Iterator[None]:
        yield
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "keeping_freed", ended_by_ctrl_c)
        run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "stage-1").is_dir()
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "whole")
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    assert len(log_of(tmp_path / "run", "step")) == 8


@pytest.mark.parametrize(("place", "full"), [("measure_text", False), ("write", False), ("measure_text", True)])
def test_an_error_after_training_loses_no_training_and_is_the_one_that_is_raised(
    place: str, full: bool, recipe: Recipe, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the checkpoint cannot be written: then the run goes on from an older one."""
    recipe = read(recipe.model_dump() | {"evaluation": {"source": str(text_file), "window": 64, "max_windows": 2}})
    at, heard = loop.results, list[dict[str, Any]]()
    done = getattr(at, place)

    def failing(*given: Any, stage: int = 1, after_cuts: bool = False, **how: Any) -> None:
        if stage and not after_cuts:
            raise RuntimeError("CUDA out of memory")
        done(*given, stage=stage, after_cuts=after_cuts, **how)

    def save_state(*given: Any, **how: Any) -> None:
        if given[1].name == "stage-1":
            raise OSError("the disk is full")
        save(*given, **how)

    save = resume.save_state
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="^CUDA out of memory$"):
        patch.setattr(at, place, failing)
        if full:
            patch.setattr(resume, "save_state", save_state)
        run(recipe, tmp_path / "run", listen=as_dicts(heard.append))
    newest = tmp_path / "run" / "checkpoints" / ("stage-1-pruned" if full else "stage-1")
    assert heard[-1]["message"].startswith(f"the last complete checkpoint is {newest}; the same command")
    assert_ends_like_a_whole_run(recipe, tmp_path)


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    seen: list[object] = []
    with pytest.raises(KeyboardInterrupt), deferred() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(signals.pending)
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("it waited")
    assert seen == [True]


def test_a_signal_that_nobody_asked_for_comes_when_the_context_ends() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        done = True
    assert done


def test_what_the_system_handles_is_left_to_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with deferred():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    handler = signal.getsignal(signal.SIGINT)
    with deferred(when=False):
        assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_hold_nothing() -> None:
    seen: list[Any] = []

    def work() -> None:
        with suppress(ValueError), deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
