"""`mope-clip` beside its controls on the small CLIP of benchmarks/shapes.py, before and after distillation.

    python benchmarks/shapes.py --folder DIR
    python benchmarks/towers.py [--folder DIR] [--sizes 70% 50% 30%] [--draws 3] [--tokens 2M] [--table]

A run prunes DIR/clip with one method to one size, measures retrieval among the 1,000 pairs of DIR/heldout, distils from the dense model on
DIR/train (`pairs.distil_towers`, 512 tokens a pair) and measures again. A draw is a seed: of the calibration pairs, of the random units, and of
the order of training. DIR/towers.jsonl gets a line for each run; a run that has its line is not made again. `--table` only prints the table.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.recipe import read
from adapt_pruner.run import loop

ROWS: dict[str, dict[str, Any]] = {
    "mope-clip": {"method": "mope-clip"},
    "llm-pruner": {"method": "llm-pruner", "chooser": "allocate.uniform"},
    "uniform": {"method": "uniform"},
    "random": {"method": "random"},
}
JUDGED = ("text→image R@1", "image→text R@1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "shapes")
    parser.add_argument("--sizes", nargs="+", default=["70%", "50%", "30%"], help="shares of the parameters")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=parse_count, default=parse_count("2M"), help="training tokens of a run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    kept = args.folder / "towers.jsonl"
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    for draw in () if args.table else range(args.draws):
        for size in args.sizes:
            for name in ROWS:
                if not any((line["name"], line["size"], line["draw"]) == (name, size, draw) for line in lines):
                    lines.append(result(args.folder, name, size, draw, tokens=args.tokens))
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(to_json(lines[-1]) + "\n")
                    print(to_json(lines[-1]), flush=True)
    print(table(lines))


def result(folder: Path, name: str, size: str, draw: int, *, tokens: int) -> dict[str, Any]:
    """Prune, measure, distil, measure."""
    train, out = str(folder / "train"), folder / "runs" / f"{name}-{size.removesuffix('%')}-{draw}"
    recipe = {
        "model": str(folder / "clip"), "budget": size, "seed": draw, "checkpoint_minutes": 10, "keep_checkpoints": 1,
        "calibration.source": train, "training.source": train, "training.tokens": tokens, "training.objective": "pairs.distil_towers",
        "evaluation.source": str(folder / "heldout"), "evaluation.window": 1000,
    }  # fmt: skip
    if name == "random":
        del recipe["calibration.source"]
    loop.run(read({}, values=recipe | ROWS[name]), out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [event for event in log if event["event"] == "evaluation"]
    dense, cut, trained = events[0], next(event for event in events if event["after_cuts"]), events[-1]
    found = {"dense": dense["judged"], "cut": cut["judged"], "trained": trained["judged"]}
    return {"name": name, "size": size, "draw": draw, "params": trained["params"], "tokens": tokens, **found}


def table(lines: list[dict[str, Any]]) -> str:
    """R@1 in percent, the mean of both directions and of the draws, ± half the distance between the draws' extremes."""
    sizes = sorted({line["size"] for line in lines}, reverse=True)
    columns = [(size, when) for size in sizes for when in ("cut", "trained")]
    text = ["| | " + " | ".join(f"{size}, {when}" for size, when in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in ROWS:
        cells = []
        for size, when in columns:
            of_draws = [
                100 * statistics.mean(line[when][way] for way in JUDGED)
                for line in lines
                if (line["name"], line["size"]) == (name, size)
            ]
            spread = (max(of_draws) - min(of_draws)) / 2 if of_draws else 0.0
            cells.append(f"{statistics.mean(of_draws):.1f} ± {spread:.1f} ({len(of_draws)})" if of_draws else "–")
        text.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
