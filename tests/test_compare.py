"""Methods side by side: equal terms, nothing run twice, a failure that stops nothing, and a page with a picture that says it."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import cli
from adapt_pruner.compare import comparison, picture
from adapt_pruner.compare.cells import prune_apart
from adapt_pruner.compare.request import Request
from adapt_pruner.compare.table import label, rows_of, table
from conftest import VOCAB, byte_tokenizer, read_json, tiny_model
from test_cli import call, one_sentence

COMMAND = [sys.executable, "-m", "adapt_pruner"]
Ask = Any


def words(model: Path, text: Path, out: Path, *more: Any, methods: str = "magnitude,random", params: str = "80%") -> list[Any]:
    usual = {"--window": 64, "--max-windows": 4, "--dtype": "float32"}
    rest = [word for option, value in usual.items() if option not in more for word in (option, value)]
    return ["compare", model, "--methods", methods, "--params", params, "--text", text, "-o", out, *rest, *more]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return lambda *words: call(monkeypatch, capsys, *words)


@pytest.fixture
def pruned_here(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Cells are pruned in this process and nothing is drawn, which takes seconds less; the commands that were given."""
    asked: list[Sequence[str]] = []

    def here(command: Sequence[str], path: Path, *, listen: Any) -> None:
        asked.append(command)
        with contextlib.redirect_stdout(io.StringIO()):
            cli.app(args=[*command, "-o", str(path), "--json"], standalone_mode=False)

    monkeypatch.setattr(comparison, "prune_apart", here)
    monkeypatch.setattr(comparison, "draw", lambda *_, **__: False)
    return asked


def test_all_are_measured_on_equal_terms(ask: Ask, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Figures are those that `eval` and `prune` give of the same models, each pruned in a process of its own."""
    out = tmp_path / "out"
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 2, "--keep", "--json", params="80%"))
    assert status == 0, err
    result = json.loads(said)
    dense, *rows = result["rows"]
    measure = ["--text", text_file, "--window", 64, "--max-windows", 4, "--json"]
    own = json.loads(ask("eval", tiny_folder, *measure)[1])
    assert (dense["method"], dense["params"], dense["removed"]) == ("dense", own["params"], 0)
    assert dense["texts"][str(text_file)]["perplexity"] == pytest.approx(own["perplexity"], rel=1e-6)
    assert {row["method"] for row in rows} == {"magnitude", "random"}
    for row in rows:
        models = sorted((out / "models").glob(f"{row['method']}-*"))
        assert [read_json(model / "pruning.json")["figures"]["seed"] for model in models] == [0, 1]
        found = [json.loads(ask("eval", model, *measure)[1]) for model in models]
        figures = [read_json(model / "pruning.json")["figures"] for model in models]
        its = row["texts"][str(text_file)]
        perplexities = [each["perplexity"] for each in found]
        assert its["perplexity"] == pytest.approx(statistics.median(perplexities), rel=1e-5)
        assert (its["low"], its["high"]) == pytest.approx((min(perplexities), max(perplexities)), rel=1e-5)
        assert its["ratio"] == pytest.approx(its["perplexity"] / own["perplexity"], rel=1e-5)
        assert row["params"] == max(each["params"] for each in found) <= row["size"] == int(0.8 * own["params"])
        assert row["removed"] == pytest.approx(1 - found[0]["decoder_params"] / own["decoder_params"])
        assert row["seconds"] == pytest.approx(statistics.median(each["seconds"] for each in figures))
        assert row["peak_bytes"] == max(each["peak_bytes"] for each in figures)
        assert 0.3 < row["speed_up"] < 3
        cells = [cell for cell in result["cells"] if cell["method"] == row["method"]]
        assert [cell["draw"] for cell in cells] == [0, 1]
    random = next(row for row in rows if row["method"] == "random")["texts"][str(text_file)]
    assert random["low"] < random["high"], "draws differ"
    assert re.search(r"^cell 4 of 4: random to [\d,]+, draw 2 of 2, about [^:]+ left$", err, re.MULTILINE)
    assert {path.name for path in out.iterdir()} >= {"compare.json", "compare.md", "compare.svg", "compare.png", "cells"}
    written = read_json(out / "compare.json")
    assert written == {key: value for key, value in result.items() if key != "path"}
    assert "torch" in written["made_by"]
    assert written["arguments"]["draws"] == 2


def test_what_is_finished_is_not_run_again(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"input_ids": [[5, 6, 7, 8]] * 4}))

    def run(*more: Any, **kinds: Any) -> tuple[int, str]:
        pruned_here.clear()
        status, _, err = ask(*words(tiny_folder, text_file, out, *more, **kinds))
        assert status == 0, err
        return len(pruned_here), err

    assert run("--draws", 1)[0] == 2
    before = read_json(out / "compare.json")
    assert not (out / "models").exists(), "checkpoints are large, figures are what is kept"
    again, err = run("--draws", 1)
    assert again == 0
    assert "2 of 2 cells are finished and used again" in err
    assert read_json(out / "compare.json") == before
    assert run("--draws", 2)[0] == 2, "the second draw of each"
    assert run("--draws", 1, methods="magnitude,uniform", params="80%")[0] == 1, "a method more"
    assert run("--draws", 1, params="80%,70%")[0] == 2, "a size more"
    assert run("--draws", 1, "--set", "metric=weights.magnitude(norm=l2)")[0] == 2, "another recipe"
    assert run("--draws", 1, "--max-windows", 3)[0] == 2, "other windows"
    assert run("--draws", 1, "--dtype", "bfloat16")[0] == 2, "another precision"
    assert run("--calibration-ids", ids, methods="uniform")[0] == 1
    assert run("--calibration-ids", ids, methods="uniform")[0] == 0
    ids.write_text(json.dumps({"input_ids": [[5, 6, 7, 9]] * 4}))
    assert run("--calibration-ids", ids, methods="uniform")[0] == 1, "other tokens under the same name"
    for path in (out / "cells").glob("magnitude-*"):
        path.write_text('{"half')
    assert run("--draws", 1)[0] == 1, "figures that cannot be read are no figures"
    for path in (out / "cells").glob("random-*"):
        path.write_text(json.dumps(read_json(path) | {"made_by": "adapt-pruner 0.0.1"}))
    count, err = run("--draws", 1)
    assert count == 0
    assert "other versions (adapt-pruner 0.0.1)" in err


def test_checkpoints_that_are_kept_are_measured_on_another_text(
    ask: Ask, pruned_here: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for text in (text_file, "python-docs:heldout"):
        assert ask(*words(tiny_folder, text, out, "--draws", 1, "--keep", methods="magnitude"))[0] == 0
    assert len(pruned_here) == 1
    assert len(list((out / "models").iterdir())) == 1


def test_another_model_under_the_same_name_is_another(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    for seed in (0, 1):
        tiny_model(vocab_size=VOCAB, seed=seed).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        assert ask(*words(model, text_file, tmp_path / "out", "--draws", 1, methods="magnitude"))[0] == 0
    assert len(pruned_here) == 2


def test_each_file_of_ids_is_a_draw(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.json")
        ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(number)).tolist()
        files[-1].write_text(json.dumps({"input_ids": ids}))
    given = [word for file in files for word in ("--calibration-ids", file)]
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *given, "--set", "step=0.2", methods="uniform"))
    assert status == 0, err
    assert [command[command.index("--calibration-ids") + 1] for command in pruned_here] == list(map(str, files))
    assert [command[command.index("--set") + 1] for command in pruned_here] == ["step=0.2"] * 3
    result = read_json(tmp_path / "out" / "compare.json")
    found = [math.exp(cell["nll"][str(text_file)]) for cell in result["cells"]]
    row = result["rows"][1]["texts"][str(text_file)]
    assert row["perplexity"] == pytest.approx(sorted(found)[1])
    assert len(set(found)) > 1
    assert "spread" in said
    moved = [word for file in files for word in ("--calibration-ids", file.rename(file.with_suffix(".moved.json")))]
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *moved, "--set", "step=0.2", methods="uniform"))
    assert status == 0, err
    assert len(pruned_here) == 3, "the same ids in another place are the same draw"


def test_a_failure_is_a_row_and_the_others_go_on(
    ask: Ask,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A size that nothing can reach, in a real process: its own sentence is the reason."""
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="magnitude", params="20k,80%"))
    assert status == 1
    assert "1 of 2 cells failed" in one_sentence(err)
    failed = next(line for line in said.splitlines() if "is below the" in line)
    assert failed.startswith("magnitude")
    assert "–" in failed
    assert [row["error"] is None for row in read_json(tmp_path / "out" / "compare.json")["rows"]] == [True, True, False]
    assert "the nearest that can be had is" in (tmp_path / "out" / "compare.md").read_text(), "in full"
    assert not list((tmp_path / "out").rglob("*.partial-*"))


def test_what_a_method_adds_is_not_free(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A checkpoint above the size is no result, whatever its pruning said of it; nor is one that reads other tokens."""

    def whole(command: Sequence[str], path: Path, *, listen: Any) -> None:
        given = list(command)
        given[given.index("--params") + 1] = "100%"
        with contextlib.redirect_stdout(io.StringIO()):
            cli.app(args=[*given, "-o", str(path), "--json"], standalone_mode=False)
        if "random" in given:
            tokenizer = byte_tokenizer()
            tokenizer.add_tokens(["more"])
            tokenizer.save_pretrained(path)

    monkeypatch.setattr(comparison, "prune_apart", whole)
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="magnitude", params="90%"))
    assert status == 1
    assert "more than asked for" in err
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="random", params="100%"))
    assert (status, "another tokenizer" in err) == (1, True), err


def test_a_loss_beyond_numbers_stops_nothing(
    ask: Ask,
    pruned_here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """exp of a loss above 709 is no float; the dense model's may be as large."""
    out = tmp_path / "out"
    measured = comparison.measure_beside
    monkeypatch.setattr(comparison, "draw", picture.draw)
    monkeypatch.setattr(
        comparison,
        "measure_beside",
        lambda *args, **kinds: (its := measured(*args, **kinds)) | {"nll": dict.fromkeys(its["nll"], 800.0)},
    )
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 1))
    assert status == 0, err
    assert err.count(": perplexity ∞") == 2
    assert said.count("∞") >= 2
    assert ask("report", out)[0] == 0
    monkeypatch.setattr(
        comparison,
        "measure",
        lambda dense, windows, **_: {"params": 1000, "decoder_params": 800, "nll": dict.fromkeys(windows, 800.0)},
    )
    shutil.rmtree(out)
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 1))
    assert status == 0, err
    assert "nan" not in said
    assert "| ∞ | – |" in (out / "compare.md").read_text(), "there is nothing to be a multiple of"
    assert ask("report", out)[0] == 0


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

    def interrupted(command: Sequence[str], path: Path, *, listen: Any) -> None:
        if len(pruned_here) == 1:
            raise KeyboardInterrupt
        here(command, path, listen=listen)

    monkeypatch.setattr(comparison, "prune_apart", interrupted)
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 2))
    assert (status, said) == (1, "")
    assert "1 of 4 cells are finished; the same command goes on from there" in err
    assert "interrupted" in one_sentence(err)
    assert len(read_json(out / "compare.json")["cells"]) == 1, "what is finished can be read meanwhile"
    monkeypatch.setattr(comparison, "prune_apart", here)
    (out / "models" / ".x.partial-0123abcd").mkdir()
    status, _, err = ask(*words(tiny_folder, text_file, out, "--draws", 2))
    assert status == 0
    assert "1 of 4 cells are finished and used again" in err
    assert len(pruned_here) == 4
    assert not (out / "models").exists(), "what a killed process left goes"


def test_ctrl_c_ends_the_process_of_the_cell(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
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
    process.send_signal(signal.SIGINT)
    said, rest = process.communicate(timeout=60)
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
        prune_apart(["prune", "nothing", "--params", "1M"], tmp_path / "out", listen=lambda _: None)
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
    monkeypatch.setattr("adapt_pruner.compare.cells.sys.executable", str(script))
    status, said, _ = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="magnitude"))
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
    _, _, err = ask(*words(tiny_folder, text, tmp_path / "out", *more, methods="uniform"))
    assert err.count("look of one kind") == 1
    _, _, err = ask(*words(tiny_folder, text, tmp_path / "out", *more, methods="magnitude"))
    assert "one kind" not in err
    _, _, err = ask(*words(tiny_folder, tmp_path / "wiki.valid.txt", tmp_path / "out", *more, methods="uniform"))
    assert "share a document" in err


# The table.

DENSE = {"params": 1000, "decoder_params": 800, "nll": {"a": math.log(10), "b": math.log(20)}}


def cell(method: str, size: int, nll: float, **more: Any) -> dict[str, Any]:
    figures = {
        "method": method, "size": size, "params": size - 3, "decoder_params": size - 203, "nll": {"a": nll, "b": nll + 1},
        "seconds": nll, "peak_bytes": 2**30, "speed_up": 1.5,
    }  # fmt: skip
    return figures | more


def test_rows_are_medians_by_size_with_the_best_first() -> None:
    cells = [cell("poor", 900, math.log(value)) for value in (90, 30, 50)]
    cells += [cell("good", 900, math.log(value), params=899) for value in (40, 12, 41)]
    cells += [{"method": "lame", "size": 900, "error": "it cannot; do otherwise"}, cell("good", 800, 4.0), cell("poor", 800, 3.0)]
    cells += [{"method": "good", "size": 800, "error": "once"}]
    rows = rows_of(cells, DENSE)
    order = [("dense", None), ("good", 900), ("poor", 900), ("lame", 900), ("poor", 800), ("good", 800)]
    assert [(row["method"], row["size"]) for row in rows] == order
    good, poor, lame = rows[1:4]
    assert (good["params"], poor["params"], lame["params"]) == (899, 897, None)
    assert good["texts"]["a"] == pytest.approx({"perplexity": 40, "low": 12, "high": 41, "ratio": 4})
    assert poor["texts"]["b"]["ratio"] == pytest.approx(50 * math.e / 20)
    assert poor["removed"] == pytest.approx(1 - 697 / 800)
    assert (poor["draws"], lame["draws"], lame["failed"], lame["error"]) == (3, 0, 1, "it cannot; do otherwise")
    header, lines = table(rows)
    assert header.count("spread") == 2
    assert header[3] == "perplexity, a"
    words = [line for line in lines if line[0]]
    assert [line[0] for line in words] == ["dense", "at most 900", "good", "poor", "lame", "at most 800", "poor", "good"]
    assert words[2][1:6] == ["899", "12.9%", "40.00", "12.00–41.00", "4.00"]
    assert words[4][-1] == "it cannot", "a few words"
    assert words[7][-1] == "1 of 2 draws: once"
    assert "failed" not in table(rows_of(cells[:3], DENSE))[0]


def test_labels_tell_texts_apart() -> None:
    texts = ["/data/wiki/test.jsonl.gz", "/other/books", "python-docs:heldout", "/a/x/same.txt", "/b/x/same.txt"]
    wanted = ["wiki/test", "other/books", "python-docs:heldout", "/a/x/same.txt", "/b/x/same.txt"]
    assert [label(text, texts) for text in texts] == wanted


def test_the_first_draw_of_all_comes_before_the_second_of_any() -> None:
    asked = Request(model="m", methods=("random", "magnitude"), params=("50%", "90", "50"), texts=("t",), draws=2).checked()
    order = [(each.draw, each.size, each.method) for each in asked.cells(100)]
    wanted = [(draw, size, method) for draw in (0, 1) for size in (90, 50) for method in ("random", "magnitude")]
    assert order == wanted
    for each in asked.cells(100):
        assert each.recipe.seed == int(each.words[each.words.index("--seed") + 1]) == each.draw
        assert each.recipe.budget == each.words[each.words.index("--params") + 1] == str(each.size)
    assert not any("--trust-remote-code" in each.words for each in asked.cells(100))
    assert all("--trust-remote-code" in each.words for each in replace(asked, trust_remote_code=True).cells(100))


# The picture.


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [{"text": text, "windows": 4, "tokens": 252} for text in ("a", "b")]
    return {"rows": rows, "texts": texts, "precision": "float32", "arguments": {"model": "some/model", "window": 64}}


def test_the_picture_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [cell(name, size, math.log(2000 / size) + k + lift) for k, name in enumerate(("one", "two"))
             for size in (900, 800) for lift in (0, 0.2)]  # fmt: skip
    seen = []
    for _ in range(2):
        assert picture.draw(result_of(rows_of(cells, DENSE)), tmp_path, warn=pytest.fail)
        seen.append((tmp_path / "compare.svg").read_bytes())
    assert seen[0] == seen[1]
    xml.etree.ElementTree.fromstring(seen[0])
    for name in ("one", "two", "dense 10", "perplexity (log scale)"):
        assert f"<!-- {name} -->".encode() in seen[0], "matplotlib writes what glyphs say beside them"
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"compare.svg", "compare.png"}
    far = [*cells, cell("ruin", 900, 9.0)]
    assert picture.draw(result_of(rows_of(far, DENSE)), tmp_path, warn=pytest.fail)
    svg = (tmp_path / "compare.svg").read_text()
    assert "Beyond 100 times the dense model, and not shown: ruin at 900." in svg
    assert "<!-- ruin -->" not in svg
    lone = [cell("one", 900, 800.0), cell("two", 900, 3.0)]
    assert picture.draw(result_of(rows_of(lone, DENSE)), tmp_path, warn=pytest.fail), "a perplexity that overflows is left out"
    assert not picture.draw(result_of(rows_of([], DENSE)), tmp_path, warn=pytest.fail)
    assert not picture.draw(result_of(rows_of(lone[:1], DENSE)), tmp_path, warn=pytest.fail), "an empty frame says nothing"


def test_names_are_apart_and_inside() -> None:
    assert picture._spread([0.1, 0.5]) == [0.1, 0.5]
    assert picture._spread([0.1, 0.1]) == pytest.approx([0.1, 0.155])
    high = picture._spread([0.9, 0.95, 0.97, 0.99])
    assert high[-1] == 0.98
    assert all(b - a == pytest.approx(0.055) for a, b in itertools.pairwise(high))


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    warnings: list[str] = []
    assert not picture.draw(result_of(rows_of([cell("one", 900, 3.0)], DENSE)), tmp_path, warn=warnings.append)
    assert len(warnings) == 1
    assert "pip install 'adapt-pruner[plot]'" in warnings[0]
    assert list(tmp_path.iterdir()) == []


# Bad input.

BAD = {
    "unknown method": ({"methods": "magnitude,randon"}, [], "did you mean 'random'"),
    "no method": ({"methods": " ,"}, [], "--methods names none"),
    "no size": ({"params": ""}, [], "--params names none"),
    "size that is no number": ({"params": "80%,much"}, [], "'much' is not a count"),
    "size above the model": ({"params": "80%,1B"}, [], "above the"),
    "unknown key": ({}, ["--set", "stepp=1"], "did you mean 'step'"),
    "key that is compare's": ({}, ["--set", "seed=3"], "use --draws"),
    "training": ({}, ["--set", "training.source=x", "--set", "training.tokens=5k"], "does not train"),
    "two calibrations": ({}, ["--calibration", "x", "--calibration-ids", "IDS"], "leave one out"),
    "draws of files": ({}, ["--draws", 2, "--calibration-ids", "IDS"], "--draws 2 would be ignored"),
    "no draws": ({}, ["--draws", 0], "greater than or equal to 1"),
    "no such ids": ({}, ["--calibration-ids", "no.json"], "do not exist"),
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
    assert (status, "without torchrun" in one_sentence(err)) == (2, True)
    monkeypatch.delenv("WORLD_SIZE")
    command = [*COMMAND, *map(str, words(tiny_folder, text_file, tmp_path / "out", "--draws", 1))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)
    while not (tmp_path / "out" / ".lock").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)
    status, _, err = ask(*words(tiny_folder, text_file, tmp_path / "out", "--draws", 1))
    assert (status, f"in use by process {process.pid}" in one_sentence(err)) == (2, True)
    process.terminate()
    process.wait(timeout=60)
    assert pruned_here == []
