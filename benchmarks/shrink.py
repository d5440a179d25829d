"""`shrink` against what a person would type instead, in the same minutes, on SmolLM2-135M-Instruct.

    python benchmarks/shrink.py [--minutes 15] [--params 105M] [--seeds 0 1 2] [--arms shrink smollm2-105m …] [-o runs/shrink]

Four arms: `shrink`; the default method alone, which takes as long as it takes; `llm-pruner` and then training for what is left of the time; the
recipe smollm2-105m cut to the time. All read the same text, C4, and no arm sees WikiText-2. Call it from the project's folder, with ../shared/data
beside it, on a machine that does nothing else: tokens count by the clock. A job that is done is skipped, and each writes
OUT/ARM-PARAMS-MINUTES-SEED/figures.json; the table of all that is there goes to stdout at the end.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command import command, evaluated

MODEL = "smollm2-135m-instruct"
TEXT = "../shared/data/corpus/web_c4/*.jsonl.gz"
MEASURED = {
    "WikiText-2": "../shared/data/wikitext2/test_public.txt",
    "C4": f"{TEXT}#heldout",
    "web text": TEXT.replace("c4", "owt") + "#heldout",
}

_TRAINED = (
    "--set", f"calibration.source={TEXT}#train", "--set", f"training.source={TEXT}#train", "--set", "evaluation.source=null",
    "--set", "evaluation.prompts=[]",
)  # fmt: skip


def words(arm: str, *, minutes: float, params: str, seed: int, out: Path) -> list[object]:
    """The command of an arm."""
    tokens = f"{max(1, round(minutes / 15))}M"  # more than fit, so that the clock ends training
    keys = {"minutes": f"{minutes:g}", "training.tokens": tokens, "budget": params, "seed": seed}
    timed = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return {
        "shrink": ["shrink", MODEL, "--params", params, "--text", TEXT, "--minutes", minutes, "--seed", seed, "-o", out],
        "default method alone": ["prune", MODEL, "--params", params, "--calibration", f"{TEXT}#train", "--seed", seed, "-o", out / "model"],
        "llm-pruner, then trained": ["run", "smollm2-105m", "--set", "method=llm-pruner", "--set", "calibration.samples=64", *_TRAINED, *timed, "-o", out],
        "smollm2-105m": ["run", "smollm2-105m", *_TRAINED, *timed, "-o", out],
    }[arm]  # fmt: skip


ARMS = ("shrink", "llm-pruner, then trained", "smollm2-105m", "default method alone")


def _job(arm: str, *, minutes: float, params: str, seed: int, out: Path) -> dict[str, Any]:
    """The figures of an arm; worked out unless they are there."""
    folder = out / f"{arm}-{params}-{minutes:g}-{seed}".replace(", ", "-").replace(" ", "-")
    told = folder / "figures.json"
    if told.exists():
        return dict(json.loads(told.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)  # its minutes would not be those of one go
    began = time.perf_counter()
    run = json.loads(command(*words(arm, minutes=minutes, params=params, seed=seed, out=folder), "--json"))
    took = time.perf_counter() - began
    found = {name: evaluated(folder / "model", text) for name, text in MEASURED.items()}
    figures = {
        "arm": arm, "asked": minutes, "size": params, "seed": seed, "minutes": took / 60, "params": run["params_after"], "trained": run.get("trained_tokens", 0),
        **{key: {name: each[key] for name, each in found.items()} for key in ("nll", "bits_per_byte")},
    }  # fmt: skip
    told.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return figures


def _table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Perplexities, the geometric mean over seeds, and the mean bits per byte, as Markdown."""
    yield f"| to | arm | asked | minutes taken | tokens trained | {' | '.join(MEASURED)} |"
    yield "|---:|---|---:|---:|---:|" + "---:|" * len(MEASURED)
    for size, arm, asked in dict.fromkeys((line["size"], line["arm"], line["asked"]) for line in lines):
        its = [line for line in lines if (line["size"], line["arm"], line["asked"]) == (size, arm, asked)]
        nll, bits = ([sum(line[key][name] for line in its) / len(its) for name in MEASURED] for key in ("nll", "bits_per_byte"))
        texts = " | ".join(f"{math.exp(nats):.2f} · {each:.3f}" for nats, each in zip(nll, bits, strict=True))
        each = [sum(line[key] for line in its) / len(its) for key in ("minutes", "trained")]
        yield f"| {size} | {arm} | {asked:g} | {each[0]:.1f} | {each[1]:,.0f} | {texts} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--params", default="105M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/shrink"))
    asked = parser.parse_args()
    for seed in asked.seeds:
        for arm in asked.arms:
            _job(arm, minutes=asked.minutes, params=asked.params, seed=seed, out=asked.output)
    print(
        "\n".join(_table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.output.glob("*/figures.json"))]))
    )


if __name__ == "__main__":
    main()
