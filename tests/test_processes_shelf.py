"""Several processes make a smaller model which none of them holds whole: it is pruned from disk, and trained in shares."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner.recipe import read
from adapt_pruner.run.loop import run
from conftest import VOCAB, log_of, printed, saved, tiny_model
from forks import Forks, Said, command

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def launched(size: int, folder: Path, *words: Any, only: Mapping[int, Mapping[str, str]] | None = None) -> list[Said]:
    """What the processes of a command say."""
    return Forks(size, folder, command, *map(str, words), only=only).said()


def words(text: Path, **settings: Any) -> list[Any]:
    settings = {"calibration.samples": 8, "calibration.length": 16, **settings}
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--params", "70%", "--device", "cpu", "--dtype", "float32", *given]


def assert_same(one: Path, other: Path) -> None:
    """The same units, and the same weights but for rounding."""
    assert (one / "mask.json").read_text() == (other / "mask.json").read_text()
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.allclose(weights[name], others[name], **CLOSE)] == []


def test_two_processes_prune_from_disk_as_one(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each reads all layers and its share of the text. Sums in float32 are rounded differently, so no two scores may be equal."""
    settings = words(text_file, **{"step": 0.5, "calibration.self_generated": 0}) + ["--calibration", text_file]
    printed("prune", tiny_folder, "-o", tmp_path / "one", *settings, "--offload", "none")
    said = launched(2, tmp_path / "launch", "prune", tiny_folder, "-o", tmp_path / "many", *settings, "--offload", "disk")
    assert [process.status for process in said] == [0, 0], said[0].err + said[1].err
    assert_same(tmp_path / "one", tmp_path / "many")
    assert "on 2 processes" in said[0].err
    assert said[0].out.count("saved ") == 1
    assert said[1].out + said[1].err == ""


def recipe_of(folder: Path, text: Path, path: Path, **keys: Any) -> Path:
    """Two stages, each with a cut and training, and every checkpoint kept."""
    training = {"source": str(text), "tokens": 256, "length": 32, "batch_tokens": 128, "lr": 0.01, **keys.pop("training", {})}
    recipe = {
        "model": str(folder), "method": "flap", "budget": "70%", "device": "cpu", "dtype": "float32", "multiple_of": 8, "step": 0.5,
        "stages": 2, "checkpoint_minutes": 0, "keep_checkpoints": 99, "training": training,
        "calibration": {"source": str(text), "samples": 8, "length": 16}, **keys,
    }  # fmt: skip
    path.write_text(read({}, values=recipe).to_yaml())
    return path


def go_on_from(whole: Path, copy: Path, checkpoint: str) -> Path:
    """A copy of a finished run, as if it had been stopped after a checkpoint."""
    shutil.copytree(whole, copy, ignore=lambda folder, names: {"model"} & set(names) if Path(folder) == whole else set())
    last = (whole / "checkpoints" / checkpoint).stat().st_mtime
    for path in (whole / "checkpoints").iterdir():
        if path.stat().st_mtime > last:
            shutil.rmtree(copy / "checkpoints" / path.name)
    return copy


def test_four_processes_train_a_model_that_stays_on_disk(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """They make the run of one, in which rows of weights do not divide evenly, and two go on with what they began."""
    recipe = recipe_of(tiny_folder, text_file, tmp_path / "recipe.yaml", multiple_of=1)
    run(read(str(recipe)), tmp_path / "one")
    how = ["--set", "parallel=fsdp", "--set", "offload=disk"]
    said = launched(4, tmp_path / "launch", "run", recipe, "-o", tmp_path / "four", *how)
    assert [process.status for process in said] == [0] * 4, said[0].err + said[-1].err
    assert_same(tmp_path / "one" / "model", tmp_path / "four" / "model")
    for file in ("model", "optimizer"):
        one, four = (load_file(tmp_path / name / "checkpoints/stage-1" / f"{file}.safetensors") for name in ("one", "four"))
        assert [key for key in one if not torch.allclose(one[key], four[key], **CLOSE)] == []
    copied = go_on_from(tmp_path / "four", tmp_path / "two", "stage-2-pruned")
    said = launched(2, tmp_path / "again", "run", recipe, "-o", copied, *how, "--force-recipe")
    assert [process.status for process in said] == [0, 0], said[0].err + said[1].err
    assert [event["stage"] for event in log_of(copied, "resumed")] == [2]
    assert_same(tmp_path / "one" / "model", copied / "model")
    assert not list(tmp_path.glob("*/.weights-*"))


def test_shares_in_fewer_bits(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    """Weights in bfloat16 and moments of 8 bits; a run that was stopped right after a training, or within it, ends in the same bytes."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    folder = saved(tmp_path / "model", tiny_model(vocab_size=VOCAB, hidden_size=96, intermediate_size=256), tokenizer)
    narrow = {"weights": "bfloat16", "optimizer": "adamw8bit", "batch_tokens": 64}
    keys = {"parallel": "fsdp", "offload": "disk", "dtype": "bfloat16", "multiple_of": 16, "training": narrow}
    recipe = recipe_of(folder, text_file, tmp_path / "recipe.yaml", **keys)
    run(read(str(recipe), overrides=["offload=none"]), tmp_path / "one")
    for number, checkpoint in enumerate(["", "stage-1-step-2", "stage-2-step-3"]):
        place = go_on_from(tmp_path / "whole", tmp_path / checkpoint, checkpoint) if checkpoint else tmp_path / "whole"
        said = launched(2, tmp_path / f"launch-{number}", "run", recipe, "-o", place)
        assert [process.status for process in said] == [0, 0], said[0].err + said[1].err
        assert (place / "model" / "model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()
    codes = "exp_avg.codes.model.layers.0.mlp.up_proj.weight"
    shapes = [
        load_file(tmp_path / name / "checkpoints/stage-1-step-1/optimizer.safetensors")[codes].shape for name in ("one", "whole")
    ]
    assert shapes[0] == shapes[1]
    one, two = ([step["loss"] for step in log_of(tmp_path / name, "step")] for name in ("one", "whole"))
    assert two[:2] == pytest.approx(one[:2], rel=2e-3), "but for what is rounded at random"


def test_two_processes_shrink(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """They take the main process's measure of the machine, and its plan."""
    settings = [*words(text_file, **{"evaluation.max_windows": 2, "step": 1.0}), "--tokens", "4k", "--text", text_file]
    said = launched(2, tmp_path / "launch", "shrink", tiny_folder, "-o", tmp_path / "small", *settings)
    assert [process.status for process in said] == [0, 0], said[0].err + said[1].err
    assert "machine: 2 processes, each with 1 thread" in said[0].err
    assert "parameters, trained on 4.1" in said[0].out
    assert said[1].out + said[1].err == ""
    assert (tmp_path / "small" / "model" / "mask.json").exists()


def test_one_process_that_fails_ends_all(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each in one sentence; nothing is left."""
    settings = words(text_file, **{"calibration.self_generated": 0}) + ["--calibration", text_file, "--offload", "disk"]
    missing = {"ADAPT_PRUNER_SCRATCH": str(tmp_path / "missing")}
    said = launched(2, tmp_path / "launch", "prune", tiny_folder, "-o", tmp_path / "out", *settings, only={1: missing})
    assert [process.status for process in said] == [1, 2]
    assert said[1].err.startswith(f"error in process 1: {tmp_path / 'missing'} is no folder")
    assert said[0].err.splitlines()[-1].startswith("error: another process has ended or cannot be reached")
    assert [process.err.count("error: ") + process.err.count("error in process") for process in said] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launch"]
