"""The `adapt-pruner` command, for benchmarks that are made of its calls."""

import json
import subprocess
import sys
from typing import Any


def command(*words: object) -> str:
    """What a call printed; its progress is shown, and where it fails, which it has said itself, the benchmark ends with its status."""
    done = subprocess.run([sys.executable, "-m", "adapt_pruner", *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def evaluated(model: object, text: str, *more: object, windows: int = 40) -> dict[str, Any]:
    """The figures of `eval` on so many windows of a text, in the precision that the machine has."""
    return dict(json.loads(command("eval", model, "--text", text, "--max-windows", windows, "--dtype", "auto", "--json", *more)))
