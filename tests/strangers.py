"""Processes that have stock transformers and cannot import this package; forked from one that has imported it, which takes seconds."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

SERVER = """
import sys
sys.modules["adapt_pruner"] = None
import json, os, traceback
import torch, torch._dynamo
import transformers.dynamic_module_utils
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(asked["folder"])
            for stream, path in ((1, asked["said"]), (2, asked["wrong"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            transformers.dynamic_module_utils.HF_MODULES_CACHE = asked["modules"]
            torch.set_num_threads(1)
            sys.argv = ["-c", *asked["words"]]
            exec(compile(asked["code"], "<stranger>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> "subprocess.Popen[str]":
    """The process that forks; it ends with this one, whose end it reads from is then closed."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nowhere",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def ask_a_stranger(code: str, *words: str | Path, folder: Path) -> str:
    """What `code` prints, run in `folder` with `words` as its arguments; remote code is cached there and nowhere else."""
    said, wrong = folder / "said.txt", folder / "wrong.txt"
    asked = {"code": code, "words": [str(word) for word in words], "modules": str(folder / "modules")}
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(asked | {"folder": str(folder), "said": str(said), "wrong": str(wrong)}), file=server.stdin, flush=True)
    status = server.stdout.readline()
    assert status, "the process that forks strangers is no more"
    assert int(status) == 0, f"status {int(status)}: {wrong.read_text(encoding='utf-8')[-3000:]}"
    return said.read_text(encoding="utf-8")
