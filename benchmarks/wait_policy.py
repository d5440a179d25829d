"""How fast torch's threads read, score and train while they spin or sleep when they wait for each other.

    python benchmarks/wait_policy.py [--model smollm2-135m-instruct] [--busy 0 1] [--repeats 2]

Each line is a fresh process that measures the model as `shrink` does (`run.probe`), beside so many busy processes. Speeds are tokens
a second. `spin` is what the OpenMP library does by itself, `sleep` is OMP_WAIT_POLICY=passive. `spin 1000` is GOMP_SPINCOUNT=1000: a
thread turns so often in a loop before it sleeps.
Call it on a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

POLICIES = {
    "spin": {},
    "sleep": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
}

MEASURE = """
import json, sys
from adapt_pruner.recipe import read
from adapt_pruner.run.probe import probed
from adapt_pruner.run.shrink import tokens_a_second
speed, work = probed(read({"model": sys.argv[1], "budget": "90%"}), listen=lambda event: None)
print(json.dumps([*(tokens_a_second(speed, work, phase) for phase in ("read", "score", "train")), speed.words]))
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    print("| busy processes beside | threads that wait | reading | scoring | training | |\n|---:|---|---:|---:|---:|---|")
    for count in asked.busy:
        for name, settings in POLICIES.items():
            plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
            with busy(count):
                runs = [
                    json.loads(subprocess.run(
                        [sys.executable, "-c", MEASURE, asked.model], capture_output=True, text=True, check=True, env=plain | settings
                    ).stdout)
                    for _ in range(asked.repeats)
                ]  # fmt: skip
            speeds = " | ".join(f"{median(run[index] for run in runs):,.0f}" for index in range(3))
            print(f"| {count} | {name} | {speeds} | {runs[0][3]} |", flush=True)


if __name__ == "__main__":
    main()
