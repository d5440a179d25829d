"""A process of a run that stands still or dies is given up by the others within minutes, one that works alone is waited for."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from conftest import HANGS

PROGRAM = """
import os, sys, time
from adapt_pruner.core.system import world as heartbeat, world

heartbeat.SILENCE, heartbeat._BEAT = 3.0, 0.2

def end(sentence):
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)

try:
    with world.joined(lost=end):
        world.on_main(lambda: time.sleep(float(os.environ["ALONE"])))
        print("met", flush=True)
        while True:
            world.agreed(1)
            time.sleep(0.02)
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr, flush=True)
    sys.exit(1)
"""


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two processes; the first works alone for the seconds of the parameter before they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "CUDA_VISIBLE_DEVICES": "",
            "ALONE": str(getattr(request, "param", 0)),
        }
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], env=os.environ | common | {"RANK": str(rank)}, **how)  # type: ignore[call-overload]
        for rank in range(2)
    ]
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("stopped", "pair"), [(0, 8), (1, 0)], indirect=["pair"])
def test_a_process_that_is_stopped_is_given_up(stopped: int, pair: list["subprocess.Popen[str]"]) -> None:
    """The store of all is with the first process, which in one case worked alone before for longer than silence may last."""
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n", process.communicate()
    pair[stopped].send_signal(signal.SIGSTOP)
    other = pair[1 - stopped]
    _, said = other.communicate(timeout=HANGS)
    assert other.returncode == 1
    assert f"process {stopped} has sent nothing for 3 s: it was stopped, or its machine is gone" in said


def test_a_process_that_is_killed_is_given_up_at_once(pair: list["subprocess.Popen[str]"]) -> None:
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n", process.communicate()
    pair[1].kill()
    _, said = pair[0].communicate(timeout=HANGS)
    assert pair[0].returncode == 1
    assert "RunError another process has ended or cannot be reached" in said
