"""A process of ours takes no code from the current folder, answers in lines, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapt_pruner.core.children import module, talking
from adapt_pruner.errors import RunError
from adapt_pruner.export import plain
from conftest import HANGS

ECHO = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "end":
        sys.exit(3)
    print(json.dumps(asked), flush=True)
"""


def test_it_answers_in_lines_and_an_end_without_a_word_is_said(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    with talking([sys.executable, "-P", str(tmp_path / "echo.py")], silent="it ended with {status}") as child:
        assert child.ask({"a": [1, 2]}) == {"a": [1, 2]}
        with pytest.raises(RunError, match="it ended with 3"):
            child.ask("end")
        with pytest.raises(RunError, match="it ended with 3"):
            child.ask("again")
        with pytest.raises(RunError, match="it ended with 3"):
            child.read(4)


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "timeit", "adapt_pruner"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(module("timeit", "-n1", "-r1", "import json"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_it_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; from adapt_pruner.core.children import module; "
        "child = subprocess.Popen(module('timeit', '-n1', '-r1', 'import time; time.sleep(60)')); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(1.0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child went on")


def test_it_ends_when_its_pipe_does(tmp_path: Path) -> None:
    """As where no system tells it that its parent has ended."""
    command = module("timeit", "-n1", "-r1", "import time; time.sleep(60)")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(b"not read by anybody")
        process.stdin.close()
        assert process.wait(timeout=HANGS) == -signal.SIGTERM


def test_a_stranger_ends_while_it_loads(tmp_path: Path) -> None:
    """Its model is a pipe that nobody writes to, as a disk that takes long."""
    os.mkfifo(tmp_path / "config.json")
    command = [sys.executable, "-P", str(Path(plain.__file__).with_name("stranger.py")), str(tmp_path), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        time.sleep(1.0)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=HANGS) == 1
