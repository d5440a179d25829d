"""Where a command writes: nothing of somebody else is touched, and what cannot be written is refused before the work, in one sentence."""

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.checkpoint import save
from adapt_pruner.checkpoint.load import load
from adapt_pruner.compare import comparison
from adapt_pruner.core.system import files
from adapt_pruner.core.system.files import mark
from adapt_pruner.errors import RunError
from adapt_pruner.run import folder as runs
from conftest import HANGS
from test_cli import ask, one_sentence

__all__ = ["ask"]  # a fixture

Usage = namedtuple("Usage", "total used free")
COMMANDS = {
    "prune": ["prune", "TINY", "--params", "80%", "--method", "magnitude-all", "--set", "step=1", "-o"],
    "run": ["run", "RECIPE", "-o"],
    "compare": ["compare", "TINY", "--methods", "magnitude-all", "--params", "80%", "--text", "LONG", "--max-windows", "1", "-o"],
    "export": ["export", "TINY", "--to", "padded", "-o"],
}


@pytest.fixture
def words(tiny_folder: Path, text_file: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a command, without the place that it ends with."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "recipe.yaml").write_text(
        f"model: {tiny_folder}\nmethod: magnitude-all\nbudget: 80%\nstep: 1\nstages: 2\nevaluation: {{source: {text_file}, max_windows: 1}}\n"
    )
    things = {"TINY": str(tiny_folder), "LONG": str(text_file), "RECIPE": str(inputs / "recipe.yaml")}
    return lambda command: [things.get(word, word) for word in COMMANDS[command]]


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


THEIRS = {
    "a lock": {".lock": "12"},
    "a recipe": {"recipe.yaml": "budget: 80%\n"},
    "a log": {"log.jsonl": '{"event": "click"}\n'},
    "a recipe and a log": {"recipe.yaml": "budget: 80%\n", "log.jsonl": '{"event": "start", "page": "index"}\n'},
    "a recipe and a lock": {"recipe.yaml": "budget: 80%\n", ".lock": "12", "report.html": "<!doctype html>mine"},
    "checkpoints": {"checkpoints/stage-1/state.json": '{"stage": 1}', "recipe.yaml": "budget: 80%\n"},
    "cells": {"cells/a.json": "{}", ".lock": "12"},
    "figures": {"compare.json": '{"cells": []}', "models/.x.partial-0123abcd/weights": "…"},
    "another's mark": {".adapt-pruner": "adapt-pruner\n"},
}


@pytest.mark.parametrize("command", ["run", "run --dry-run", "compare"])
@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_of_somebody_is_not_taken_for_ours(
    case: str, command: str, ask: Any, words: Callable[[str], list[str]], tmp_path: Path
) -> None:
    place = tmp_path / "theirs"
    for name, text in THEIRS[case].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (place / "link").symlink_to("nowhere")
    before = contents(place)
    name, *more = command.split()
    status, _, err = ask(*words(name), place, *more)
    assert (status, "exists and is not empty; name another folder" in one_sentence(err)) == (2, True), err
    assert "loading" not in err
    assert contents(place) == before


def test_a_command_that_fails_leaves_what_somebody_put_beside_it(ask: Any, words: Any, tmp_path: Path) -> None:
    """In a folder of a run that was killed while it prepared."""
    place = tmp_path / "run"
    place.mkdir()
    mark(place, "run")
    (place / "notes.txt").write_text("mine")
    (place / "report.html").write_text("<!doctype html><p>mine")
    (place / ".lock").symlink_to("notes.txt")
    before = contents(place)
    for more in ([], ["--set", "budget=1000"]):
        status, _, err = ask(*words("run"), place, *more)
        assert (status, "cannot be locked (it is a link)" in one_sentence(err)) == (2, True), err
        assert contents(place) == before
    (place / ".lock").unlink()
    status, _, err = ask(*words("run"), place, "--set", "budget=1000")
    assert (status, "budget 1,000 is too small" in one_sentence(err)) == (2, True), err
    assert contents(place).keys() == {".adapt-pruner", "notes.txt", "report.html"}
    status, _, err = ask(*words("run"), place)
    assert (status, "report.html is not a page of adapt-pruner and stays as it is" in err) == (0, True), err
    assert (place / "report.html").read_text() == "<!doctype html><p>mine"


BAD = {
    "a name too long": ("x" * 256, "has 256 bytes, and "),
    "a name too long on the way": ("y" * 300 + "/out", "has 300 bytes, and "),
    "a path too long": ("/".join(["z" * 200] * 20), "bytes, and at most 3,840 are possible"),
    "a link to nothing": ("dangling", "dangling is a link to nowhere, which does not exist"),
    "a link to nothing on the way": ("dangling/out", "dangling is a link to nowhere, which does not exist"),
    "a link to itself": ("circle", "circle is a link to circle, which does not exist"),
    "proc": ("/proc/x", "/proc is not writable"),
    "sys": ("/sys/x/y", "/sys is not writable"),
    "a file on the way": ("/dev/null/x", "/dev/null is a file"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="places of Linux")
@pytest.mark.parametrize("command", [*COMMANDS, "run --dry-run", "export --to gguf"])
@pytest.mark.parametrize("case", BAD)
def test_a_place_that_cannot_be_is_refused_first(case: str, command: str, ask: Any, words: Any, tmp_path: Path) -> None:
    name, wanted = BAD[case]
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = contents(tmp_path)
    first, *more = command.split()
    status, _, err = ask(*words(first), tmp_path / name, *(() if "gguf" in more else more))
    assert (status, wanted in one_sentence(err)) == (2, True), err
    assert "loading" not in err
    assert contents(tmp_path) == before


def test_a_page_is_refused_where_it_cannot_be(ask: Any, words: Any, tmp_path: Path) -> None:
    assert ask(*words("run"), tmp_path / "run")[0] == 0
    for name in ("x" * 256, "/proc/x.html", "/dev/null/x.html"):
        status, _, err = ask("report", tmp_path / "run", "-o", tmp_path / name)
        assert status == 2, err
        one_sentence(err)


def test_a_folder_that_is_a_link_is_filled_where_it_leads(ask: Any, words: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    status, _, err = ask(*words("prune"), tmp_path / "link")
    assert status == 0, err
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "pruning.json").is_file()


@pytest.mark.parametrize("command", [*COMMANDS, "export to gguf"])
def test_a_disk_without_room_is_said_before_the_work(
    command: str, ask: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    given = words(command.split()[0])
    if "gguf" in command:
        pytest.importorskip("gguf")
        given = [*given[:2], "--to", "gguf", "-o"]
    monkeypatch.setattr(comparison, "prune_apart", _nothing)
    status, out, err = ask(*given, tmp_path / "out.gguf")
    assert "iteration" not in err
    assert "the disk is full: it has 1,000 bytes left" in (out + err)
    assert status == (2 if command in ("prune", "run", "compare") else 1)
    assert [path.name for path in tmp_path.iterdir() if path.name != "inputs"] == []


def _nothing(*_: Any, **__: Any) -> None:
    raise AssertionError("a cell was begun")


WRAPPED = {
    "full": OSError(errno.ENOSPC, "…"),
    "quota": OSError(errno.EDQUOT, "…"),
    "too large": OSError(errno.EFBIG, "…"),
    "quota, in Rust": ValueError(f"Error while serializing: I/O error: … (os error {errno.EDQUOT})"),
    "too large, in Rust": ValueError(f"… (os error {errno.EFBIG})"),
    "full, in numpy": OSError("4096 requested and 512 written"),
}
SAID = {
    "full": "the disk is full",
    "quota": "the disk quota is used up",
    "too large": "the file is larger than a file may be there",
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("command", ["prune", "run", "export"])
def test_what_finds_no_room_on_the_way_leaves_nothing_half_written(
    command: str, case: str, ask: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, folder: Path, *_: Any, as_named: bool) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise WRAPPED[case]

    monkeypatch.setattr(save, "_save_weights", fails)
    status, _, err = ask(*words(command), tmp_path / "out")
    assert (status, SAID[case.partition(",")[0]] in one_sentence(err)) == (1, True), err
    assert not list(tmp_path.rglob("*.partial-*"))
    assert not (tmp_path / "out" / "model").exists()
    assert (tmp_path / "out").exists() == (command == "run")


def test_a_log_that_finds_no_room_is_said_so(ask: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise WRAPPED["quota"]

    monkeypatch.setattr(runs.RunFolder, "_append", fails)
    status, _, err = ask(*words("run"), tmp_path / "out")
    assert (status, "log.jsonl could not be written: the disk quota is used up" in one_sentence(err)) == (1, True), err


LIMITED = """
import importlib, os, sys
from adapt_pruner import cli
from adapt_pruner.checkpoint import save
def told():
    try:
        cli.main()
    except SystemExit as left:
        print(left.code, *os.listdir(os.path.dirname(sys.argv[-1])))
told()
print("=====", file=sys.stderr)
save.lacks_disk_space = lambda *_, **__: None  # the system's own limit, met while writing
importlib.import_module("adapt_pruner.run.loop").check_result = lambda *_: None
told()
"""


def test_a_limit_on_the_size_of_files(words: Any, tmp_path: Path) -> None:
    """Seen before any work, or met while writing."""
    command = [sys.executable, "-P", "-c", LIMITED, *words("prune"), str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["2 inputs", "1 inputs"]), done.stderr
    early, late = done.stderr.split("=====\n")
    assert "a file may have 40,960 bytes (ulimit -f)" in one_sentence(early)
    assert "the file is larger than a file may be there" in one_sentence(late)
    assert ("iteration" in early, "iteration" in late) == (False, True)


def test_a_gguf_file_takes_no_place_that_was_filled_meanwhile(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("adapt_pruner.export.gguf")

    def slow(library: Any, loaded: Any, path: Path, *_: Any) -> list[str]:
        (tmp_path / "m.gguf").write_text("theirs")
        path.write_text("ours")
        return []

    monkeypatch.setattr(gguf, "_write", slow)
    with pytest.raises(RunError, match=r"another program wrote .* meanwhile; the complete result is in .*/m-[0-9a-f]{8}\.gguf"):
        gguf.write(load(str(tiny_folder)), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "theirs"
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["ours", "theirs"]


# A terminal that closes.


def _hung_up(times: int) -> Callable[..., None]:
    def hung_up(model: Any, folder: Path, *_: Any, as_named: bool) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGHUP)

    return hung_up


@pytest.fixture
def hangs_up() -> Any:
    """SIGHUP as a command finds it, and as it was afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("command", ["prune", "run", "export"])
def test_a_terminal_that_closes_leaves_nothing_half_written(
    command: str, ask: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: None
) -> None:
    """The shell and the terminal both tell it; the second time it is tidying up."""
    remove = files.shutil.rmtree

    def while_tidying(*given: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        remove(*given, **more)

    monkeypatch.setattr(save, "_save_weights", _hung_up(1))
    monkeypatch.setattr(files.shutil, "rmtree", while_tidying)
    status, _, err = ask(*words(command), tmp_path / "out")
    assert (status, "interrupted" in one_sentence(err)) == (1, True)
    assert not list(tmp_path.rglob("*.partial-*"))


def test_nohup_is_heeded(ask: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = save._save_weights

    def told(*given: Any, as_named: bool) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        original(*given, as_named=as_named)

    monkeypatch.setattr(save, "_save_weights", told)
    assert ask(*words("prune"), tmp_path / "out")[0] == 0
