"""A process of ours takes no code from the current folder, answers in lines, and ends with its parent."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adapt_pruner
from adapt_pruner.core.system.processes import module, talking
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


PLANTED = (
    "accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "llama_cpp", "lm_eval", "numpy", "onnxruntime", "peft",
    "pydantic", "rich", "safetensors", "sitecustomize", "tokenizers", "torch", "transformers", "typer", "usercustomize", "vl_convert", "yaml",
)  # fmt: skip
SHADOWS = ("adapt_pruner", "json", "subprocess", "runpy", "typing", "ctypes", "signal")
"""What Python itself imports before our first line where it is started with -m and without -P; no program can keep these out."""

SOURCE = Path(adapt_pruner.__file__).parents[1]


@pytest.fixture
def planted(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of somebody else, with Python files and a program that leave a mark in a folder beside it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    (tmp_path / "marks").mkdir()
    for name in (*PLANTED, "modeling_llama"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'marks' / name)!r}, 'w').close()\nraise SystemExit('evil')\n")
    (folder / "git").write_text(f"#!/bin/sh\ntouch {tmp_path / 'marks' / 'git'}\n")
    (folder / "git").chmod(0o755)
    return folder


def started(folder: Path, *command: Any) -> str:
    """What a command prints that is run in a folder; nothing of that folder has left its mark."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert [path.name for path in (folder.parent / "marks").iterdir()] == [], done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = """
import glob, json, sys
from adapt_pruner import cli
from adapt_pruner.compare import turns

turns.LOADS = 1  # each is a process
for words in json.loads(sys.argv[1]):
    sys.argv = ["adapt-pruner", *(glob.glob(word)[0] if "*" in word else word for word in words)]
    try:
        cli.main()
    except SystemExit as left:
        if left.code:
            raise
"""
"""Several commands one after the other, without their starts; each imports what it needs and starts its own processes."""


def test_no_command_runs_a_file_of_the_current_folder(planted: Path, text_file: Path) -> None:
    """Nor do the processes that it starts, whatever name is planted."""
    for name in SHADOWS:
        shutil.copy(planted / "typer.py", planted / f"{name}.py")
    text = ["--text", text_file, "--window", 64, "--max-windows", 2, "--dtype", "float32"]
    quick = ["--batch", 1, "--prompt", 8, "--generate", 4, "--rounds", 1]
    compared = ["--methods", "magnitude-all", "--params", "80%", "-o", "../c", "--keep", *text, "--json"]
    pruned = "../c/models/*"
    commands: list[list[Any]] = [
        ["compare", ".", *compared],
        ["bench", pruned, "--against", ".", *quick, "--json"],
        ["export", pruned, "-o", "../padded", "--to", "padded"],
        ["verify", pruned, "../padded", "--json"],
    ]
    said = started(planted, "-P", "-c", COMMANDS, json.dumps([[str(word) for word in words] for words in commands]))
    assert all(word in said for word in ('"rows"', '"speeds"', "saved ../padded", '"passed": true')), "each has done its work"


def test_plain_python_m_takes_no_library_of_the_current_folder(planted: Path) -> None:
    started(planted, "-m", "adapt_pruner", "inspect", ".", "--json")


def test_processes_that_train_together_run_no_file_of_the_current_folder(planted: Path, text_file: Path) -> None:
    """As torchrun starts them: `python -m adapt_pruner` in the current folder."""
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32}
    asked = {"model": ".", "budget": "80%", "method": "magnitude-all", "training": training, "device": "cpu"}
    (planted / "recipe.yaml").write_text(json.dumps(asked))
    launch = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "adapt_pruner"]
    started(planted, *launch, "run", "recipe.yaml", "-o", planted.parent / "run")
    assert (planted.parent / "run" / "model" / "config.json").is_file()


def test_every_place_that_starts_a_process_is_known() -> None:
    """A new one is looked at: does it take code from the current folder, and does it end with its parent?"""
    known = {
        "core/system/processes.py": "the one place that starts Python: `module`, with -P, and `talking`",
        "compare/cells.py": "starts `module` in a session of its own, which Ctrl-C does not reach",
        "core/model/hot_experts.py": "a thread that reads the next expert, no process",
        "core/model/shelf.py": "a thread that reads the next layer, no process",
        "core/system/provenance.py": "git, in this package's own checkout",
    }
    starts = re.compile(
        r"^\s*(?:import|from) (?:subprocess|multiprocessing|concurrent|pty)\b|os\.(?:system|popen|exec|spawn|fork)", re.MULTILINE
    )
    package = SOURCE / "adapt_pruner"
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if starts.search(path.read_text())}
    assert found == set(known)
    python = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if "sys.executable" in path.read_text()}
    assert python == {"core/system/processes.py", "export/plain.py"}
    for name in python:
        assert all(
            'sys.executable, "-P"' in line for line in (package / name).read_text().splitlines() if "sys.executable" in line
        )


def test_no_file_reads_a_pickle() -> None:
    """Ours of a run in its middle are safetensors and JSON, and so is what is read of others."""
    reads = re.compile(
        r"torch\.load\b|\bpickle\b|allow_pickle|\bjoblib\b|\bdill\b|\bshelve\b|np\.load\b|weights_only|\beval\(|\bexec\(|marshal"
    )
    package = SOURCE / "adapt_pruner"
    for path in package.rglob("*.py"):
        code = "\n".join(
            re.sub(r"(?<!\w)\w+(\.\w+)*\.eval\(\)|\)\.eval\(\)|llama\.eval\(", "", line) for line in path.read_text().splitlines()
        )
        lines = [line for line in code.splitlines() if reads.search(line.partition("#")[0])]
        assert not [line for line in lines if '"""' not in line and not line.strip().startswith(("lm-eval", "transformers"))], (
            path
        )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_it_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; from adapt_pruner.core.system.processes import module; "
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
