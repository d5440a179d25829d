"""Several processes make a smaller model which none of them holds whole: it is pruned from disk, and trained in shares."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapt_pruner.cli import program
from conftest import HANGS, printed

FORKS: Any = multiprocessing.get_context("forkserver")  # each process is a copy of one that has imported everything
FORKS.set_forkserver_preload(["adapt_pruner.report.with_card", "transformers.models.llama.modeling_llama", Path(__file__).stem])
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@dataclass
class Said:
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def _process(folder: Path, rank: int, words: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    sys.argv = ["adapt-pruner", *words]
    program()


def launched(size: int, folder: Path, *words: Any, only: Mapping[int, Mapping[str, str]] | None = None) -> list[Said]:
    """What the processes of a command say that torchrun started; `only` has environment variables of single ones."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "CUDA_VISIBLE_DEVICES": ""}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
    processes = []
    for rank in range(size):
        environment = common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | dict((only or {}).get(rank, {}))
        processes.append(FORKS.Process(target=_process, args=(folder, rank, list(map(str, words)), environment)))
        processes[-1].start()
    for process in processes:
        process.join(HANGS)
    return [
        Said(process.exitcode, *((folder / f"{rank}.{end}").read_text() for end in ("out", "err")))
        for rank, process in enumerate(processes)
    ]


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


@pytest.mark.parametrize("size", [2, 4])
def test_processes_prune_from_disk_as_one(size: int, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each reads all layers and its share of the text. Sums in float32 are rounded differently, so no two scores may be equal."""
    settings = words(text_file, **{"step": 0.5, "calibration.self_generated": 0}) + ["--calibration", text_file]
    printed("prune", tiny_folder, "-o", tmp_path / "one", *settings, "--offload", "none")
    said = launched(size, tmp_path / "launch", "prune", tiny_folder, "-o", tmp_path / "many", *settings, "--offload", "disk")
    assert [process.status for process in said] == [0] * size, said[0].err + said[-1].err
    assert_same(tmp_path / "one", tmp_path / "many")
    assert f"on {size} processes" in said[0].err
    assert said[0].out.count("saved ") == 1
    assert {process.out + process.err for process in said[1:]} == {""}


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
