"""Comparisons that are stopped, killed or asked for what cannot be: nothing is lost, and each is said in a sentence."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.compare import comparison
from adapt_pruner.compare.cells import prune_apart
from adapt_pruner.core.system import files
from adapt_pruner.recipe import Recipe
from conftest import HANGS, byte_tokenizer, read_json
from test_cli import one_sentence
from test_compare import COMMAND, Ask, ask, pruned_here, words

__all__ = ["ask", "pruned_here"]  # fixtures


def test_an_interrupt_keeps_what_is_finished(
    ask: Ask,
    pruned_here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    here = comparison.prune_apart

    def interrupted(recipe: Recipe, path: Path, **options: Any) -> None:
        if len(pruned_here) == 1:
            raise KeyboardInterrupt
        here(recipe, path, **options)

    monkeypatch.setattr(comparison, "prune_apart", interrupted)
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 2))
    assert (status, said) == (1, "")
    assert "1 of 4 cells are finished; the same command continues from there" in err
    assert "interrupted" in one_sentence(err)
    assert len(read_json(out / "compare.json")["cells"]) == 1, "what is finished can be read meanwhile"
    monkeypatch.setattr(comparison, "prune_apart", here)
    files._beside(out / "models" / "x", files._WRITTEN).mkdir()
    status, _, err = ask(*words(tiny_folder, text_file, out, "--draws", 2))
    assert status == 0
    assert "1 of 4 cells are finished and used again" in err
    assert len(pruned_here) == 4
    assert not (out / "models").exists(), "what a killed process left goes"


def test_ctrl_c_ends_the_process_of_the_cell(ask: Ask, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Until then nobody else can use the folder."""
    slow = ["--set", "step=0.0005", "--calibration", text_file, "--set", "calibration.length=64", "--draws", 1]
    command = [*COMMAND, *map(str, words(tiny_folder, text_file, tmp_path / "out", *slow, methods="uniform", params="60%"))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if "cell 1 of 1" in line:
            break
    while not (children := _children(process.pid)) or not _prunes(children[0]):
        assert process.poll() is None, seen
        time.sleep(0.01)  # until the cell's process works in earnest
    assert len(children) == 1, seen
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1))
    assert (status, f"in use by process {process.pid}" in one_sentence(err)) == (2, True)
    process.send_signal(signal.SIGINT)
    said, rest = process.communicate(timeout=HANGS)
    assert process.returncode == 1, seen + rest
    assert "interrupted" in one_sentence(seen + rest)
    assert said == ""
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not list((tmp_path / "out").rglob("*.partial-*"))
    assert list((tmp_path / "out" / "models").iterdir()) == []


def _prunes(process: int) -> bool:
    """Whether a process is past its start: until it begins its own program it is a copy of its parent, libraries and all."""
    began = b"\0prune\0" in Path(f"/proc/{process}/cmdline").read_bytes()
    return began and "libtorch" in Path(f"/proc/{process}/maps").read_text()


def test_ctrl_c_while_the_process_is_made_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[subprocess.Popen[str]] = []
    true = subprocess.Popen

    def slow(*args: Any, **kwargs: Any) -> "subprocess.Popen[str]":
        made.append(true(*args, **kwargs))
        signal.raise_signal(signal.SIGINT)
        return made[0]

    monkeypatch.setattr(subprocess, "Popen", slow)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        prune_apart(Recipe(model="nothing", budget="1M"), tmp_path / "out", listen=lambda _: None, trust_remote_code=True)
    assert "--trust-remote-code" in made[0].args
    assert made[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def _children(parent: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{parent}/task").iterdir() for child in (task / "children").read_text().split()]


def test_a_killed_process_is_a_reason(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """What the system kills, mostly for its memory, cannot say why it ended."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr("adapt_pruner.core.system.processes.sys.executable", str(script))
    status, said, _ = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="magnitude-all"))
    assert status == 1
    assert "killed by signal 9" in said


def test_text_of_the_same_kind_is_said(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Once, and of methods that look at text only."""
    (tmp_path / "wiki.valid.txt").write_text(text_file.read_text()[:4000])
    text = tmp_path / "wiki.test.txt"
    text.write_text(text_file.read_text()[4000:9000])
    more = [
        "--calibration", tmp_path / "wiki.valid.txt", "--set", "calibration.samples=4", "--set", "calibration.length=16",
        "--set", "step=1", "--draws", 2,
    ]  # fmt: skip
    status, _, err = ask(*words(tiny_folder, text, tmp_path / "out", *more, methods="uniform"))
    assert (status, err.count("look like the same kind of text")) == (0, 1)
    status, _, err = ask(*words(tiny_folder, text, tmp_path / "out", *more, methods="magnitude-all"))
    assert (status, "would be ignored, since method 'magnitude-all' reads no calibration text" in err) == (2, True)
    status, _, err = ask(*words(tiny_folder, tmp_path / "wiki.valid.txt", tmp_path / "out", *more, methods="uniform"))
    assert (status, "the calibration text contains 1 of the 1 passage of the evaluation text" in err) == (0, True)


def test_ids_of_the_text_that_is_measured_are_said(
    ask: Ask, pruned_here: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Of methods that look at text only; the tokens tell, since ids have no name of a kind."""
    ids = byte_tokenizer()(text_file.read_text()[:2000]).input_ids
    (tmp_path / "its.json").write_text(json.dumps({"input_ids": [ids[5:105], ids[90:190], [*range(3, 43)]]}))
    few = ids[10:41]  # 31 tokens may be shared by chance
    (tmp_path / "others.json").write_text(json.dumps({"input_ids": [[*range(3, 43)], [*range(4, 44)], few, few[:2]]}))
    more = ["--set", "step=1", "--calibration-ids", tmp_path / "others.json", "--calibration-ids", tmp_path / "its.json"]
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *more, methods="uniform"))
    assert (status, "its.json', 2 of 3 sequences share text with" in err, "others.json', " in err) == (0, True, False)
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *more, methods="magnitude-all"))
    assert (status, "calibration.ids would be ignored" in err) == (2, True)


BAD = {
    "unknown method": ({"methods": "magnitude-all,randon"}, [], "did you mean 'random'"),
    "no method": ({"methods": " ,"}, [], "--methods is empty"),
    "no size": ({"params": ""}, [], "--params is empty"),
    "size that is no number": ({"params": "80%,much"}, [], "'much' is neither a count nor a share"),
    "size above the model": ({"params": "80%,1B"}, [], "above the"),
    "unknown key": ({}, ["--set", "stepp=1"], "did you mean 'step'"),
    "key that is compare's": ({}, ["--set", "seed=3"], "use --draws"),
    "training": ({}, ["--set", "training.source=x", "--set", "training.tokens=5k"], "does not train"),
    "two calibrations": (
        {"methods": "uniform"},
        ["--calibration", "x", "--calibration-ids", "IDS"],
        "calibration.ids fixes every token",
    ),
    "draws of files": ({}, ["--draws", 2, "--calibration-ids", "IDS"], "--draws 2 would be ignored"),
    "no draws": ({}, ["--draws", 0], "greater than or equal to 1"),
    "no such ids": ({"methods": "uniform"}, ["--calibration-ids", "no.json"], "do not exist"),
    "no such text": ({}, ["--text", "no.txt"], "text 'no.txt' does not exist"),
    "text of its own": ({}, ["--text", "self"], "its own text"),
    "no such calibration": ({"methods": "uniform"}, ["--calibration", "no.txt"], "text 'no.txt' does not exist"),
    "unknown precision": ({}, ["--dtype", "int3"], "dtype"),
    "unknown device": ({}, ["--device", "abacus"], "device 'abacus'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str,
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    kinds, more, wanted = BAD[case]
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": [[5, 6, 7, 8]]}))
    given = [tmp_path / "ids.json" if word == "IDS" else word for word in more]
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *given, **kinds))
    assert wanted in one_sentence(err)
    assert (status, said, pruned_here) == (2, "", [])
    assert not (tmp_path / "out").exists()


def test_bad_places_and_no_text(
    ask: Ask,
    pruned_here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "precious").write_text("…")
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path))
    assert (status, "exists and is not empty" in one_sentence(err), "loading" in err) == (2, True, False)
    status, _, err = ask("compare", tiny_folder, "--methods", "random", "--params", "80%", "-o", tmp_path / "out")
    assert (status, "Missing option '--text'" in one_sentence(err)) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out"))
    assert (
        status,
        "it times each method in a process of its own, and 2 were started; start it without torchrun" in one_sentence(err),
    ) == (2, True)
    assert pruned_here == []
