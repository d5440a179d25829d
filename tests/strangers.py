"""Processes forked from one that has imported stock transformers, which takes seconds, and has never seen this package.

`ask_a_stranger` runs code where this package cannot be imported; `command_of` runs the command line of a copy of this package;
`talking_to_a_fork` is the process of `verify`.

Not the fork server of multiprocessing: there is one in a process, and that of test_resume has imported this package.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from adapt_pruner.core.system.processes import Child

SERVER = """
import sys
sys.modules["adapt_pruner"] = None  # no import takes it along
import json, os, signal, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever an import prints is no answer
import torch, torch._dynamo
import transformers.dynamic_module_utils
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(900)
            os.chdir(asked["at"])
            for stream, path in ((1, asked["said"]), (2, asked["wrong"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            if asked["asked"]:
                os.dup2(os.open(asked["asked"], os.O_RDONLY), 0)
            transformers.dynamic_module_utils.HF_MODULES_CACHE = asked["modules"]
            torch.set_num_threads(1)
            sys.argv = ["-c", *asked["words"]]
            os.environ.update(asked["environment"])
            if asked["package"]:
                del sys.modules["adapt_pruner"]
                sys.path.insert(0, asked["package"])
            exec(compile(asked["code"], "<stranger>", "exec"), {"__name__": "__main__"})
            sys.stdout.flush()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@cache
def _server() -> "subprocess.Popen[str]":
    """The process that forks; it ends with this one."""
    home = tempfile.mkdtemp(prefix="strangers-")
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate, timeout=60)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return server


def ask_a_stranger(code: str, *words: str | Path, folder: Path) -> str:
    """What `code` prints, run in `folder` with `words` as its arguments; remote code is cached there and nowhere else."""
    status, said, wrong = _forked(code, *words, folder=folder)
    assert status == "0", f"status {status or 'none'}: {wrong[-3000:]}"
    return said


def command_of(source: Path, *words: str, folder: Path, **environment: str) -> tuple[int, str]:
    """The exit status and the stderr of `adapt-pruner WORDS` in `folder`, with the package that lies in `source`."""
    code = "import runpy; runpy.run_module('adapt_pruner', run_name='__main__', alter_sys=True)"
    status, _, wrong = _forked(code, *words, folder=folder, package=source, **environment)
    return int(status), wrong


@contextmanager
def talking_to_a_fork(command: Sequence[str], *, silent: str) -> Iterator[Child]:
    """As `processes.talking` with the command of `verify`, PYTHON -P FILE WORDS …: the same file with the same words, forked."""
    _, _, file, *words = command
    with tempfile.TemporaryDirectory() as folder:
        said, asked = Path(folder) / "said.txt", Path(folder) / "asked"
        os.mkfifo(said)
        os.mkfifo(asked)
        code = f"import runpy; runpy.run_path({file!r}, run_name='__main__')"
        server = _begun(code, *words, folder=Path(folder), asked=asked)
        with said.open("rb") as answers, asked.open("wb") as questions:
            wait = cache(lambda: server.stdout.readline().strip())
            try:
                yield Child(cast(Any, SimpleNamespace(stdin=questions, stdout=answers, wait=wait)), silent)
            finally:
                with suppress(BrokenPipeError):  # it may have ended before it read the last question
                    questions.close()
                wait()


def _forked(code: str, *words: str | Path, folder: Path, package: Path | None = None, **environment: str) -> tuple[str, str, str]:
    """The exit status, stdout and stderr of a forked process; the status is empty if there was none."""
    status = _begun(code, *words, folder=folder, package=package, **environment).stdout.readline().strip()
    texts = (path.read_text(encoding="utf-8") if path.exists() else "" for path in (folder / "said.txt", folder / "wrong.txt"))
    return status, *texts


def _begun(
    code: str, *words: str | Path, folder: Path, package: Path | None = None, asked: Path | None = None, **environment: str
) -> Any:
    """The server, which has been told to fork; it says the exit status in a line. A process that is `asked` is in the current folder."""
    question = {
        "code": code, "words": [str(word) for word in words], "modules": str(folder / "modules"), "at": str(Path.cwd() if asked else folder),
        "said": str(folder / "said.txt"), "wrong": str(folder / "wrong.txt"), "package": package and str(package),
        "asked": asked and str(asked), "environment": environment,
    }  # fmt: skip
    server = _server()
    assert server.poll() is None, "the process that forks strangers is no more"
    print(json.dumps(question), file=server.stdin, flush=True)
    return server
