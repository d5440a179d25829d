"""The table of docs/scaling.md: what a run takes of each GPU, by the formulas that a dry run uses.

    python benchmarks/scaling_table.py [FOLDER …]

A FOLDER needs nothing but a config.json; by default Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B. Nothing is downloaded.
"""

import sys
from pathlib import Path
from typing import Any

from adapt_pruner.recipe import read
from adapt_pruner.run.forecast import dry_run

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
RUN: dict[str, Any] = {
    "method": "adapt-pruner",
    "budget": "50%",
    "stages": 10,
    "moments": "reset",
    "training": {
        "source": "text.jsonl.gz", "tokens": "10B", "batch_tokens": 2**20, "length": 4096, "micro_batch_tokens": 8192,
        "gradient_checkpointing": True,
    },
}  # fmt: skip
GIB = 2**30


def row(folder: str, processes: int, parallel: str) -> str:
    planned = dry_run(read(RUN | {"model": folder, "parallel": parallel}), processes=processes)
    pruning, training = (planned["memory"][phase]["bytes"] for phase in ("pruning", "training"))
    hours = planned["seconds"] / 3600
    mode = parallel.upper() if processes > 1 else "alone"
    return f"| {Path(folder).name} | {processes} | {mode} | {pruning / GIB:,.0f} | {training / GIB:,.0f} | {hours:,.0f} |"


def main() -> None:
    folders = sys.argv[1:] or [str(CONFIGS / name) for name in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")]
    print("| model | GPUs | mode | pruning, GiB a GPU | training, GiB a GPU | hours |")
    print("|---|---:|---|---:|---:|---:|")
    for folder in folders:
        for processes, modes in ((1, ["ddp"]), (8, ["ddp", "fsdp"]), (64, ["ddp", "fsdp"])):
            for mode in modes:
                print(row(folder, processes, mode))


if __name__ == "__main__":
    main()
