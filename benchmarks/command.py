"""The `adapt-pruner` command, for benchmarks that are made of its calls."""

import subprocess
import sys

__all__ = ["command"]


def command(*words: object) -> str:
    """What a call printed; its progress is shown, and where it fails, which it has said itself, the benchmark ends with its status."""
    done = subprocess.run([sys.executable, "-m", "adapt_pruner", *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout
