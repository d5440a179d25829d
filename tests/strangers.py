"""Processes forked from one that has imported stock transformers, which takes seconds, and has never seen this package.

`ask_a_stranger` runs code where this package cannot be imported; `command_of` runs the command line of a copy of this package.

Not the fork server of multiprocessing: there is one in a process, and that of test_resume has imported this package.
"""

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

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
            os.chdir(asked["folder"])
            for stream, path in ((1, asked["said"]), (2, asked["wrong"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
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


def _forked(code: str, *words: str | Path, folder: Path, package: Path | None = None, **environment: str) -> tuple[str, str, str]:
    """The exit status, stdout and stderr of a forked process; the status is empty if there was none."""
    said, wrong = folder / "said.txt", folder / "wrong.txt"
    asked = {
        "code": code, "words": [str(word) for word in words], "modules": str(folder / "modules"), "folder": str(folder),
        "said": str(said), "wrong": str(wrong), "package": package and str(package), "environment": environment,
    }  # fmt: skip
    server = _server()
    assert server.poll() is None, "the process that forks strangers is no more"
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(asked), file=server.stdin, flush=True)
    status = server.stdout.readline().strip()
    return status, *(path.read_text(encoding="utf-8") if path.exists() else "" for path in (said, wrong))
