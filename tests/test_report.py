"""The report: a page of whatever a run's folder holds, figures that are the run's own, and one sentence for what is no run.

One file, though long, since all pages are of one run that is made once.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import statistics
import struct
import xml.etree.ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events import Cut, Warned
from adapt_pruner.core.events.words import compact, duration, shown, tick, ticks
from adapt_pruner.core.model.axes import Axis, Gate, Mask
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError
from adapt_pruner.evaluate.anatomy import anatomy
from adapt_pruner.reduce.choose.cutline import QUARTER_OCTAVES, cut_line
from adapt_pruner.report import charts, page, paper, with_card
from adapt_pruner.report.advice import advice
from adapt_pruner.report.figures import Row, Trained, figures_of, fit_slope, sizes_of
from adapt_pruner.report.record import read_record
from adapt_pruner.report.screen import Bars
from adapt_pruner.report.svg import drawing
from conftest import VOCAB, as_dicts, byte_tokenizer, read_json, suited, tiny_model
from test_cli import call


def small_recipe(model: Path, text: Path, **changes: Any) -> recipe.Recipe:
    base = {
        "method": "adapt-pruner", "model": str(model), "budget": "70%", "stages": 2, "step": 0.1, "dtype": "float32",
        "calibration": {"source": str(text), "samples": 4, "length": 32},
        "training": {"source": str(text), "tokens": 3000, "batch_tokens": 128, "length": 64, "lr": 3e-3},
        "evaluation": {"source": str(text), "window": 64, "max_windows": 4},
    }  # fmt: skip
    return suited(base | changes)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two stages that has come to its end."""
    folder = tmp_path_factory.mktemp("runs") / "tiny & <small>"  # a name that HTML must not take as its own
    with_card.run(small_recipe(tiny_folder, text_file), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stopped(copied: Path) -> Path:
    """The same run killed after its first stage's training: no result, and a log that ends in the middle of a line."""
    shutil.rmtree(copied / "model")
    (copied / "report.html").unlink()
    lines = (copied / "log.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"stage": 2' in line and '"step"' in line)
    (copied / "log.jsonl").write_text("".join(lines[: last + 1]) + lines[last + 1][:40])
    return copied


def unbroken(text: str) -> str:
    """A page whose commands are not split into words."""
    return re.sub("</?span>", "", text)


class Seen(HTMLParser):
    """What a page holds: tags that are open, addresses that it would ask, pictures by their names."""

    _VOID = frozenset(["meta", "link", "input", "br", "hr", "img"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.figures: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.addresses += [value for key, value in given.items() if key in ("href", "src", "action") and value]
        if tag == "figure":
            self.figures.append(given["id"])
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_writes_its_report_and_the_page_stands_by_itself(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    seen = Seen(text)
    assert {"anatomy", "importance", "sparsity", "costs", "perplexity", "loss", "lr", "speed", "memory"} <= set(seen.figures)
    assert all(address.startswith(("#", "data:")) for address in seen.addresses), "nothing is asked of a network"
    assert not re.search(r"url\(|@import|https?://", text), "nor by the style or the script"
    assert "tiny &amp; &lt;small&gt;" in text
    assert "tiny & <small>" not in text
    figures = read_json(finished / "model" / "pruning.json")["figures"]
    for params in (figures["params_before"], figures["params_after"]):
        assert f"{params:,}" in text
    for value in (figures["perplexities"][0], figures["perplexities"][-1]):
        assert shown(value, "perplexity") in text
    assert "finished" in text
    assert "chooser: allocate.adaptive" in text, "the whole recipe"


def test_figures_are_those_of_the_run(finished: Path) -> None:
    record = read_record(finished)
    figures = figures_of(record)
    own = read_json(finished / "model" / "pruning.json")["figures"]
    rows = {row.name: row for row in figures.rows}
    assert (rows["parameters"].before, rows["parameters"].now) == (own["params_before"], own["params_after"])
    assert (rows["in decoder layers"].before, rows["in decoder layers"].now) == (
        own["decoder_params_before"],
        own["decoder_params_after"],
    )
    assert rows["weights on disk"].now == (finished / "model" / "model.safetensors").stat().st_size
    assert (rows["perplexity"].before, rows["perplexity"].now) == (own["perplexities"][0], own["perplexities"][-1])
    assert rows["perplexity"].after_cuts == own["perplexities_after_cuts"][-1]
    assert f"{shown(rows['perplexity'].after_cuts, 'perplexity')} by the cuts and to" in page.page(record)
    assert figures.seconds["train"] == own["seconds_train"]
    assert sum(figures.seconds.values()) == pytest.approx(own["seconds"])
    assert figures.tokens["train"] == own["trained_tokens"]
    assert figures.tokens["score"] == own["iterations"] * 4 * 32
    assert (figures.status, figures.notes) == ("finished", [])


def test_the_anatomy_is_that_of_the_checkpoint(finished: Path) -> None:
    mask = Mask.from_json(read_json(finished / "model" / "mask.json"))
    picture = charts.anatomy(figures_of(read_record(finished)))
    assert picture is not None
    for panel, kind in zip(picture.panels, ("neurons", "kv_heads"), strict=True):
        for layer in picture.layers:
            keep = mask[f"layers.{layer}.{kind}"]
            assert (panel.total[layer], panel.left[layer]) == (keep.numel(), int(keep.sum()))
            assert panel.left[layer] + sum(gone[layer] for gone in panel.gone) == panel.total[layer], "what went, by stage"
    assert [name for name, _ in picture.groups] == ["stage 1", "stage 2"]


def test_a_name_in_a_log_that_is_no_axis_is_of_no_layer() -> None:
    sizes = {"layers.x.neurons": 3, "layers.0.neurons": 5, "text.layers.1.neurons": 7}
    layers, wide = sizes_of(sizes, None, {"": 0})
    assert layers == {0: {"neurons": 5}, 1: {"neurons": 7}}
    assert wide == {"layers.x.neurons": 3}
    assert sizes_of({"layers.1.neurons": 4}, [0, 5], {})[0] == {5: {"neurons": 4}}, "of a log without the layers at the start"


def test_layers_that_went_keep_their_numbers(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Two of three layers go one by one; the log numbers those that are left anew, the report does not."""
    asked = small_recipe(
        tiny_folder, text_file, method="shortgpt", budget="50%", stages=2, training={}, axes=["layers"], step=1.0
    )  # fmt: skip
    with_card.run(asked, tmp_path / "run")
    mask = Mask.from_json(read_json(tmp_path / "run" / "model" / "mask.json"))
    left = mask["layers"].nonzero().flatten().tolist()
    assert len(left) == 1
    figures = figures_of(read_record(tmp_path / "run"))
    assert sorted(figures.states[-1].layers) == left
    picture = charts.anatomy(figures)
    assert picture is not None
    for layer in picture.layers:
        assert (picture.panels[0].left[layer] > 0) == (layer in left)


@pytest.mark.parametrize(
    ("axes", "budget"),
    [(["attentions", "mlps"], "75%"), (["attentions", "neurons"], "70%")],
    ids=["blocks", "attentions and neurons"],
)
def test_what_goes_with_a_whole_block_is_gone(
    tiny_folder: Path, text_file: Path, tmp_path: Path, axes: list[str], budget: str
) -> None:
    asked = small_recipe(
        tiny_folder, text_file, chooser="depth.drop_layers", axes=axes, budget=budget, training={}, distance="blocks.block_influence", head_metric=None,
        **({"metric": "weights.magnitude"} if "neurons" in axes else {}),
    )  # fmt: skip
    with_card.run(asked, tmp_path / "run")
    loaded = load(str(tmp_path / "run" / "model"))
    left = {layer["layer"]: layer for layer in anatomy(loaded.model)["layers"]}
    record = read_record(tmp_path / "run")
    figures = figures_of(record)
    assert {layer: sizes["neurons"] for layer, sizes in figures.states[-1].layers.items()} == {
        layer: sizes["neurons"] for layer, sizes in left.items()
    }
    assert [sizes["kv_heads"] == 0 for sizes in figures.states[-1].layers.values()] == [
        not own["kv_heads"] for own in left.values()
    ]
    assert not all(own["kv_heads"] and own["neurons"] for own in left.values()), "a block went"
    bars = Bars()
    for event in record.events:
        bars.hear(event)
    shown_neurons = sum(own["neurons"] for own in left.values()) / 120
    assert f"{shown_neurons:.0%}" in bars.lines(200)[0].partition("KV heads")[0]
    if any(not own["kv_heads"] for own in left.values()):
        assert "Attention is untouched" not in page.page(record)

    # a second run begins with a model whose first layer may lack a block
    asked = small_recipe(tmp_path / "run" / "model", text_file, budget="90%", training={}, axes=["neurons"], stages=1)
    with_card.run(asked, tmp_path / "again")
    again = figures_of(read_record(tmp_path / "again"))
    assert "neurons" in again.kinds
    assert again.begun == "at the start"
    assert ">dense" not in page.page(read_record(tmp_path / "again")), "what the second run began with is not dense"


def test_importance_is_drawn_at_the_layers_there_were(text_file: Path, tmp_path: Path) -> None:
    """Several layers go in a stage, one a cut; each row of the picture has the layers that were left before its cut."""
    tiny_model(vocab_size=VOCAB, num_hidden_layers=8).save_pretrained(tmp_path / "deep")
    byte_tokenizer().save_pretrained(tmp_path / "deep")
    asked = small_recipe(tmp_path / "deep", text_file, method="shortgpt", budget="40%", stages=2, training={}, step=0.05)
    with_card.run(asked, tmp_path / "run")
    record = read_record(tmp_path / "run")
    picture = charts.importance(figures_of(record))
    assert picture is not None
    before = [list(range(8)), *(cut.layers_left for cut in record.of(Cut)[:-1])]
    assert len(before) > 2
    assert any(layers != list(range(len(layers))) for layers in before), "not the first ones alone"
    for values, layers in zip(picture.values, before, strict=True):
        assert [int(picture.columns[i]) for i, value in enumerate(values) if value is not None] == layers


def test_the_bill_counts_the_calibration_text_that_was_read(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": [[5] * 20] * 3}))
    asked = small_recipe(tiny_folder, text_file, calibration={"ids": str(tmp_path / "ids.json")}, training={}, stages=1)
    with_card.run(asked, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert figures_of(record).tokens["score"] == record.figures["calibration_tokens"] == 60 * len(record.of(Cut))
    shutil.rmtree(tmp_path / "run" / "model")
    assert figures_of(read_record(tmp_path / "run")).tokens["score"] == 60 * len(record.of(Cut)), "from the log alone"


def test_a_run_that_was_killed_shows_what_there_is(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stopped.parent)
    text = page.page(read_record(stopped))
    seen = Seen(text)
    assert "stopped before its end" in text
    assert "the last line of log.jsonl is broken off" in text
    assert "adapt-pruner run run/recipe.yaml -o run" in unbroken(text)
    assert {"anatomy", "loss"} <= set(seen.figures)
    assert "after stage 1" in text, "perplexity is of the stage that it was measured after"


def test_the_bill_of_a_stopped_run_adds_up(stopped: Path) -> None:
    """Its seconds are those of a checkpoint, its tokens those of the log: what was done since has tokens alone."""
    shutil.rmtree(stopped / "checkpoints" / "stage-1")
    (pruned,) = (stopped / "checkpoints").iterdir()
    state = read_json(pruned / "state.json")
    state["spent"].pop("train")
    (pruned / "state.json").write_text(json.dumps(state))
    record = read_record(stopped)
    tokens = figures_of(record).tokens
    bill = re.findall(
        r'<tr><th scope="row">([a-z ]+)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>',
        page.page(record).partition("Time and tokens by phase")[2],
    )
    rows = {phase: cells for phase, *cells in bill}
    assert rows["training"] == ["–", "–", compact(tokens["train"])]
    assert rows["together"][2] == compact(sum(tokens.values()))
    assert {name for name, cells in rows.items() if cells[2] != "–"} == {"scoring", "training", "evaluation", "together"}


def test_a_run_at_work_is_told_from_one_that_was_stopped(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stopped.parent)
    assert read_record(stopped).status == "stopped"
    with (stopped / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_record(stopped).status == "running"
        text = page.page(read_record(stopped))
    assert "still running" in text
    assert "adapt-pruner watch run" in unbroken(text)


def test_a_glance_at_the_lock_does_not_stop_a_run_from_beginning(tmp_path: Path) -> None:
    from threading import Timer

    from adapt_pruner.core.system.locks import locked

    glance = (tmp_path / ".lock").open("a+")
    fcntl.flock(glance, fcntl.LOCK_SH)
    Timer(0.02, glance.close).start()
    locked(tmp_path / ".lock").close()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.11, 0.3, 0.57, 0.83, 0.999])
def test_a_log_cut_off_anywhere_gives_a_page(copied: Path, share: float) -> None:
    log = copied / "log.jsonl"
    log.write_bytes(log.read_bytes()[: int(share * log.stat().st_size)])
    Seen(page.page(read_record(copied)))
    shutil.rmtree(copied / "model")
    Seen(page.page(read_record(copied)))
    shutil.rmtree(copied / "checkpoints")
    Seen(page.page(read_record(copied)))


@pytest.mark.parametrize("missing", ["log.jsonl", "recipe.yaml", "checkpoints", "model/mask.json", "model/pruning.json"])
def test_what_is_missing_is_said_and_the_rest_is_shown(copied: Path, missing: str) -> None:
    gone = copied / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    text = page.page(read_record(copied))
    Seen(text)
    assert missing == "checkpoints" or f"{missing} " in text


def test_lines_that_are_no_events_are_left_out_and_counted(copied: Path) -> None:
    log = copied / "log.jsonl"
    log.write_bytes(b"not json\n" + log.read_bytes() + b'{"time": 1}\n\xff\xfe\n{"event": "step", "tok')
    record = read_record(copied)
    count = len(log.read_bytes().split(b"\n"))
    assert record.trouble == [
        "the last line of log.jsonl is broken off: the run was killed while writing it, or is writing it now",
        f"lines of log.jsonl that are not events were left out (3): 1, {count - 2}, {count - 1}",
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "tasks", "stage": 2}',
        '{"event": "tasks", "stage": 2, "scores": [{"task": "arc"}]}',
        '{"event": "tasks", "stage": 2, "scores": [{"task": "arc", "metric": "acc", "value": 0.4, "items": 9, "shots": 0}]}',
        '{"event": "cut", "stage": 2, "iteration": 26, "params": "many"}',
        '{"event": "cut", "params": 35000, "sizes": ["a"]}',
        '{"event": "cut", "params": 35000, "sizes": {"layers.0.neurons": 32.5}}',
        '{"event": "start", "params": {}}',
        '{"event": "step", "stage": [], "tokens": 10, "loss": 1.0}',
        '{"event": "evaluation", "stage": 1, "tokens": "all"}',
        '{"event": "warning", "message": "x", "time": "noon"}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:60],
)
def test_an_event_without_what_its_kind_has_is_none(copied: Path, line: str) -> None:
    with (copied / "log.jsonl").open("a") as log:
        log.write(f"{line}\n" + '{"event": "warning", "message": "the last"}\n')
    record = read_record(copied)
    Seen(page.page(record))
    assert record.events[-1] == Warned(message="the last")
    assert len(record.trouble) == 1
    assert "lines of log.jsonl that are not events were left out (1)" in record.trouble[0]


@pytest.mark.parametrize(
    "wrong",
    ["calibration: 5", "step: abc", "training: {tokens: [1]}", "axes: 3", "evaluation: {source: {a: b}}", "amplitude: {}"],
)
def test_what_of_a_recipe_makes_no_sense_is_left_out(copied: Path, wrong: str) -> None:
    (copied / "recipe.yaml").write_text(f"model: m\nseed: 3\n{wrong}\n")
    shutil.rmtree(copied / "model")
    record = read_record(copied)
    Seen(page.page(record))
    assert (record.recipe["seed"], record.trouble) == (
        3,
        [f"recipe.yaml has no usable {wrong.partition(':')[0]}, which was left out"],
    )


def test_a_run_that_prepares_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(monkeypatch, capsys, "report", tmp_path, "-o", tmp_path.with_suffix(".html"))[0] == 0
        text = tmp_path.with_suffix(".html").read_text()
        assert "the run is preparing" in text
        assert "still running" in text
        (tmp_path / "cells").mkdir()
        status, _, err = call(monkeypatch, capsys, "report", tmp_path)
        assert (status, "neither recipe.yaml nor log.jsonl" in err) == (2, True), "a comparison"


def test_what_is_no_run_is_refused_with_a_hint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder, hint in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "neither recipe.yaml nor log.jsonl"),
        (finished.parent, f"did you mean {finished}?"),
        (finished / "model", f"name the run's folder, {finished}"),
    ):
        for command in ("report", "watch"):
            status, out, err = call(monkeypatch, capsys, command, folder)
            assert (status, out) == (2, "")
            assert hint in err
            assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_the_page_goes_where_it_is_asked_to(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "report.html").unlink()
    target = tmp_path / "new" / "mine.html"
    status, out, _ = call(monkeypatch, capsys, "report", copied, "-o", target, "--json")
    assert (status, json.loads(out)) == (0, {"written": [str(target)]})
    assert not (copied / "report.html").exists()
    status, _, err = call(monkeypatch, capsys, "report", copied, "-o", tmp_path)
    assert status == 2
    assert "name the page" in err


@pytest.mark.parametrize(
    "name", ["log.jsonl", "model/model.safetensors", "notes.html", "index.html", "pipe.html", "model/new.txt"]
)
def test_a_page_takes_the_place_of_nothing_but_a_page(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "notes.html").write_text("what I thought of it")
    (copied / "index.html").write_text("<!doctype html><p>a page of somebody else")
    os.mkfifo(copied / "pipe.html")  # to read it would take forever
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    status, out, err = call(monkeypatch, capsys, "report", copied, "-o", copied / name)
    assert (status, out) == (2, "")
    assert str(copied / name) in err
    assert "name another file" in err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    (copied / "old.HTM").write_text("<!DOCTYPE html><p>an older page<footer>Written by adapt-pruner on a day")
    assert call(monkeypatch, capsys, "report", copied, "-o", copied / "old.HTM")[0] == 0
    assert "anatomy" in (copied / "old.HTM").read_text()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = (copied / "report.html").read_bytes()
    monkeypatch.setattr("adapt_pruner.core.system.files.sync", full)
    status, _, err = call(monkeypatch, capsys, "report", copied)
    assert status == 1
    assert "the disk is full" in err
    assert (copied / "report.html").read_bytes() == before
    assert not list(copied.glob(".*.partial-*"))


def test_run_names_its_report_only_where_it_wrote_one(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(small_recipe(tiny_folder, text_file, training={}, stages=1, step=1.0).to_yaml())

    def last(name: str) -> str:
        status, out, err = call(monkeypatch, capsys, "run", tmp_path / "recipe.yaml", "-o", tmp_path / name)
        assert status == 0, err
        return out.splitlines()[-1]

    said = last("run")
    assert said.endswith(f", the report {tmp_path / 'run' / 'report.html'}")
    assert last("run") == said, "a run that was finished says the same again"
    (tmp_path / "run" / "report.html").unlink()
    assert ", the report" not in last("run")
    monkeypatch.setattr(page, "write_page", lambda *_: (_ for _ in ()).throw(RuntimeError("no page today")))
    assert ", the report" not in last("other")


def test_a_run_whose_report_fails_is_a_run_all_the_same(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Any
) -> None:
    heard, listen = events

    def broken(*_: Any) -> Any:
        raise RuntimeError("no page today")

    monkeypatch.setattr(page, "write_page", broken)
    with_card.run(
        small_recipe(tiny_folder, text_file, training={}, stages=1, step=1.0), tmp_path / "run", listen=as_dicts(listen)
    )
    assert (tmp_path / "run" / "model").is_dir()
    assert "no page today" in heard[-1]["message"]


@pytest.mark.skipif(importlib.util.find_spec("vl_convert") is None, reason="vl-convert is not installed")
def test_pictures_for_papers(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(monkeypatch, capsys, "report", copied, "--png", "--json")
    written = [Path(path) for path in json.loads(out)["written"]]
    assert status == 0
    assert {"anatomy.png", "importance.png", "loss.png", "perplexity.png"} <= {path.name for path in written}
    for path in written[1:]:
        chunks = png_chunks(path.read_bytes())
        assert struct.unpack(">I", chunks[b"IHDR"][:4]) == (1333,)
        assert chunks[b"tEXt"] == b"Software\0adapt-pruner"
        assert len(set(zlib.decompress(chunks[b"IDAT"]))) > 9, "it is not blank"
    assert call(monkeypatch, capsys, "report", copied, "--png")[0] == 0, "what is ours is written again"
    written[1].write_bytes(written[1].read_bytes().replace(b"Software", b"software"))
    assert call(monkeypatch, capsys, "report", copied, "--png")[0] == 2, "and nothing else"


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """What a PNG file consists of; the check sum of each part is right."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(name + content),)
        chunks[name] = chunks.get(name, b"") + content
        at += 12 + size
    return chunks


def test_a_picture_for_papers_has_the_words_and_marks_of_the_page(finished: Path) -> None:
    svg = "{http://www.w3.org/2000/svg}"
    for chart in page.pictures(figures_of(read_record(finished))):
        text = paper.picture(chart)
        assert "var(" not in text, "a file has no page to take colours from"
        tree = xml.etree.ElementTree.fromstring(text)
        words = {element.text for element in tree.iter(f"{svg}text")}
        assert chart.title in words
        plots = drawing(chart).plots
        assert [len(inner.findall(f"{svg}rect")) for inner in tree.iter(f"{svg}svg")][1:] == [len(plot.rects) for plot in plots]
        assert {word for plot in plots for _, word in plot.xs} <= words
        if isinstance(chart, charts.Lines):
            assert {chart.x_label, f"{chart.y_label} (log scale)" if chart.log else chart.y_label} <= words
        else:
            assert {word for plot in plots for _, word in plot.ys} <= words


def test_without_vl_convert_pictures_are_refused_in_a_sentence_and_the_page_is_not(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(paper.importlib.util, "find_spec", lambda name: None if name == "vl_convert" else found(name))
    (copied / "report.html").unlink()
    status, _, err = call(monkeypatch, capsys, "report", copied, "--png")
    assert status == 2
    assert to_install("plot") in err
    assert not (copied / "report.html").exists(), "nothing is done by halves"
    assert call(monkeypatch, capsys, "report", copied)[0] == 0


def test_scores_about_the_cut_line_are_counted_in_quarter_octaves() -> None:
    axis = Axis("layers.0.neurons", 6, 1, Gate("m"))
    other = Axis("layers.1.neurons", 2, 1, Gate("m"))
    below = Axis("layers.1.kv_heads", 2, 1, Gate("m"))
    scores = {
        "layers.0.neurons": torch.tensor([4.0, 2.0, 1.9, 1.0, 0.0, 70.0]),
        "layers.1.neurons": torch.tensor([1.0, 2.0]),
        "layers.1.kv_heads": torch.tensor([-1.0, -2.0]),
    }
    mask = Mask({
        "layers.0.neurons": torch.tensor([True, True, False, False, False, True]),
        "layers.1.neurons": torch.tensor([True, True]),
        "layers.1.kv_heads": torch.tensor([True, False]),
    })  # fmt: skip
    found = cut_line([axis, other, below], scores, mask)
    assert set(found) == {"neurons"}, "below 0 there is no line to be a share of"
    middle = QUARTER_OCTAVES // 2
    kept = {i: count for i, count in enumerate(found["neurons"]["kept"]) if count}
    removed = {i: count for i, count in enumerate(found["neurons"]["removed"]) if count}
    assert kept == {middle: 1, middle + 4: 1, middle + 20: 1}, (
        "2, 4 and 70 over the line 2; the layer that loses nothing is not counted"
    )
    assert removed == {middle - 1: 1, middle - 4: 1, 0: 1}, "1.9, 1 and 0"


def test_every_cut_says_how_its_scores_lie(finished: Path) -> None:
    cuts = read_record(finished).of(Cut)
    scores: list[dict[str, Any]] = [dict(cut.scores or {}) for cut in cuts]
    assert all(sum(one["neurons"]["removed"]) for one in scores if "neurons" in one)
    assert any("neurons" in one for one in scores)
    for one in scores:
        counts = one.get("neurons", {"kept": [], "removed": []})
        half = len(counts["kept"]) // 2
        assert not any(counts["kept"][:half]), "nothing that stays scores below the line"
        assert not any(counts["removed"][half + 1 :])


def test_layers_of_a_stopped_run_that_narrows_the_model_are_not_guessed(stopped: Path) -> None:
    """What left the residual stream left the embedding, too."""
    row = {row.name: row for row in figures_of(read_record(stopped)).rows}["in decoder layers"]
    assert row.now is not None
    for key, value in (("axes", ["neurons", "residual"]), ("reduce", "slice")):
        record = read_record(stopped)
        record.recipe[key] = value
        assert {row.name: row for row in figures_of(record).rows}["in decoder layers"].now is None


def test_advice_follows_the_figures(finished: Path, stopped: Path) -> None:
    def said(folder: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> str:
        record = read_record(folder)
        figures = figures_of(record)
        for key, value in changes.items():
            object.__setattr__(figures, key, value)
        return " ".join(one.text for one in advice(figures, record.recipe | (recipe or {}), folder="F", checkpoint=None))

    falling = [Trained(1, 10 * i, 5 - 0.01 * i + 0.001 * (-1) ** i) for i in range(1, 60)]
    level = [Trained(1, 10 * i, 5 + 0.1 * (-1) ** i) for i in range(1, 60)]
    assert "still falling" in said(finished, steps=falling)
    assert "still falling" not in said(finished, steps=level)
    line = [Trained(1, 16 * i, 64.0 - i) for i in range(1, 60)]
    assert "over 1,000 times its standard error" in said(finished, steps=line), "a perfect line has no error at all"
    assert "still falling" not in said(stopped, steps=falling), "it did not come to its end"
    assert "Nothing was trained" not in said(stopped, steps=[])
    assert "was not reached" in said(finished, target=1000)
    assert "was not reached" not in said(finished)
    assert "are unused" in said(finished, target=10**6)
    assert "Nothing was trained" in said(finished, steps=[])
    assert "Nothing was trained" not in said(finished)
    assert "No held-out text" in said(finished, evaluations=[])
    assert "was stopped" in said(stopped)
    assert "was stopped" not in said(finished)
    figures = figures_of(read_record(finished))
    assert figures.began is not None
    whole = {
        layer: {**figures.states[-1].layers[layer], "kv_heads": sizes["kv_heads"]}
        for layer, sizes in figures.began.layers.items()
    }
    state = type(figures.states[-1])("stage 2", 1, whole)
    assert "Attention is untouched" in said(finished, states=[state])
    waiting = {"chooser": "allocate.adaptive(heads_after=0.5)"}
    assert "Attention is untouched" not in said(finished, waiting, states=[state]), "heads wait, as asked"
    assert "heads were not allowed to" in said(finished, waiting | {"axes": ["neurons"]}, states=[state])
    spent = {"score": 300.0, "repair": 400.0, "train": 100.0}
    assert "88% of the time went into scoring and repair" in said(finished, seconds=spent)
    assert "of the time went into" not in said(finished, seconds=spent | {"train": 900.0})
    fewer = {layer: {**sizes, "query_heads": sizes["query_heads"] - 1} for layer, sizes in whole.items()}
    asked = {"neurons", "kv_heads", "query_heads"}
    assert "Attention is untouched" not in said(finished, states=[type(state)("stage 2", 1, fewer)], asked=asked)


def test_a_slope_is_a_slope_only_beyond_its_noise() -> None:
    slope, error = fit_slope([(0.0, 1.0), (1.0, 0.0), (2.0, -1.0)])
    assert (slope, error) == (-1.0, 0.0)
    assert fit_slope([(0.0, 1.0)])[1] == float("inf")
    assert fit_slope([(0.1, 1.0), (0.1, 2.0), (0.1, 3.0)]) == (0.0, float("inf")), "all at one place"


def test_a_slope_takes_no_longer_than_its_points_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    mean = statistics.fmean
    monkeypatch.setattr(statistics, "fmean", lambda values: asked.append(None) or mean(values))
    fit_slope([(float(x), 1.0) for x in range(50)])
    assert len(asked) <= 2


def test_an_older_log_without_sizes_at_the_start_takes_them_from_the_mask(copied: Path) -> None:
    events = [json.loads(line) for line in (copied / "log.jsonl").read_text().splitlines()]
    for event in events:
        for key in ("began", "sizes", "layers_left", "scores") if event["event"] == "start" else ("layers_left", "scores"):
            event.pop(key, None)
    (copied / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    picture = charts.anatomy(figures_of(read_record(copied)))
    assert picture is not None
    assert picture.panels[0].total == [40, 40, 40]
    shutil.rmtree(copied / "model")
    shutil.rmtree(copied / "checkpoints")
    assert "largest after the first cut" in page.page(read_record(copied))


def test_numbers_are_short_and_whole() -> None:
    narrow = "\u00a0"
    assert shown(134_515_008, "params") == f"134.5{narrow}M"
    assert shown(1_005_461_760, "params") == f"1.01{narrow}B"
    assert shown(50_784, "params") == "50,784"
    assert shown(float("inf"), "perplexity") == "∞"
    assert shown(None, "bits") == "–"
    assert duration(7265) == f"2{narrow}h{narrow}01{narrow}min"
    assert [tick(value, form) for value, form in ((4.0, "loss"), (130e6, "params"), (1e5, "count"), (2e-4, "lr"), (1.0, "ratio"))] == [
        "4", f"130{narrow}M", f"100{narrow}k", "2e-4", "1×",
    ]  # fmt: skip
    assert ticks(0, 10, most=5) == [0, 2, 4, 6, 8, 10]
    assert ticks(10, 1000, log=True) == [10, 100, 1000]


def test_a_size_above_what_there_was_is_drawn_as_all_of_it(copied: Path) -> None:
    with (copied / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "cut", "stage": 2, "params": 35000, "sizes": {"layers.0.kv_heads": 10**12}}) + "\n")
    picture = charts.anatomy(figures_of(read_record(copied)))
    assert picture is not None
    assert max(picture.panels[1].left) == max(picture.panels[1].total)


def test_write_page_says_what_is_wrong_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"):
        page.write_page(tmp_path / "file" / "page.html", "x")


def test_the_loss_before_the_first_cut_stands_at_the_size_that_was_scored(copied: Path) -> None:
    """A run may have removed tokens before; the peak of memory may come after the last step."""
    events = [json.loads(line) for line in (copied / "log.jsonl").read_text().splitlines()]
    start = next(event for event in events if event["event"] == "start")
    start["now"] = start["params"] - 1000
    for event in events:
        if event["event"] == "step":
            event["peak_bytes"] = 2**30
    (copied / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    pruning = read_json(copied / "model" / "pruning.json")
    pruning["figures"]["peak_bytes"] = 2**31
    (copied / "model" / "pruning.json").write_text(json.dumps(pruning))
    figures = figures_of(read_record(copied))
    assert figures.began is not None
    assert figures.began.params == start["params"] - 1000
    assert figures.peak_bytes == 2**31


@pytest.mark.parametrize(
    ("step", "said"), [("1.0", "A stage removes all at once."), ("0.1", "Each iteration removes about 10.0%.")]
)
def test_a_step_of_all_is_not_called_an_iteration_of_100_percent(step: str, said: str, copied: Path) -> None:
    recipe = copied / "recipe.yaml"
    recipe.write_text(re.sub(r"(?m)^step: .*$", f"step: {step}", recipe.read_text()))
    assert said in page.page(read_record(copied))


def test_a_score_that_is_no_accuracy_is_neither_good_nor_bad() -> None:
    fall = {form: Row("a task", 0.4, 0.2, form).tone for form in ("plain", "right", "perplexity")}
    assert fall == {"plain": "", "right": "bad", "perplexity": "good"}
