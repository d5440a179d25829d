"""The processes of a launch on this machine: copies of one that has imported everything, which spares each ten seconds of work."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapt_pruner.cli import program
from conftest import HANGS

_FORKS: Any = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "adapt_pruner.report.with_card",
        "adapt_pruner.train.lowbit",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.fsdp",
    ]
)


@dataclass
class Said:
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def command(*words: str) -> None:
    """What a process does that runs a command."""
    sys.argv = ["adapt-pruner", *words]
    program()


def _process(folder: Path, rank: int, environment: Mapping[str, str], do: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ.update(environment)
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    do(*args)


class Forks:
    """Processes that work together, each with the environment that torchrun gives it; `only` has variables of single ones."""

    def __init__(
        self, size: int, folder: Path, do: Callable[..., None], *args: Any, only: Mapping[int, Mapping[str, str]] | None = None
    ) -> None:
        folder.mkdir()
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
                "CUDA_VISIBLE_DEVICES": "",
            }
        common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
        self._processes = []
        for rank in range(size):
            environment = common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | dict((only or {}).get(rank, {}))
            self._processes.append(_FORKS.Process(target=_process, args=(folder, rank, environment, do, args)))
            self._processes[-1].start()

    def said(self) -> list[Said]:
        """What each process said in the end."""
        deadline = time.monotonic() + HANGS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.end()  # processes that are out of step wait for each other; the next test need not
        return [
            Said(process.exitcode, *((self._folder / f"{rank}.{end}").read_text() for end in ("out", "err")))
            for rank, process in enumerate(self._processes)
        ]

    def end(self) -> None:
        """End what is left of it."""
        for process in self._processes:
            process.kill()
            process.join()
