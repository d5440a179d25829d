"""Training a model that has zeros: AST's four arms, and zeros beside removed units, on equal tokens. SmolLM2-135M-Instruct.

    python benchmarks/sparse_training.py [--tokens 500k] [--seed 0] [-o runs/sparse_training]
    python benchmarks/sparse_training.py --tokens 200k --arms "units, trained" "zeros, trained" "units and zeros, trained"

Masks of 2:4 come from magnitudes or from Wanda, and they stay (static) or are chosen anew as the model trains (moving). "magnitude moving" is the row
`ast`; one arm adds SLoRB to it. Without `--arms` these arms are run, the static ones also untrained. Further arms without training: zeros (SparseGPT's
2:4), units (`adaptive-ls-v1`), units and zeros (both ways). All have about 81.1 M parameters that are not zero. The same arms "trained" learn from the
dense model, and their masks stay.

Settings are those of benchmarks/sparse_training.yaml, the objective that of the row `ast`. A run that was stopped goes on, an arm that is done is
skipped, and each writes OUT/ARM-TOKENS-SEED/figures.json: perplexity on 40 windows of 512 tokens of each text. 500k tokens take about 80 minutes of
one core. The table of all that is there goes to stdout at the end.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command import command, evaluated

MODEL = "smollm2-135m-instruct"
CORPUS = "../shared/data/corpus/{}/*.jsonl.gz#heldout"
TEXTS = {
    "WikiText-2": "../shared/data/wikitext2/test_public.txt",
    "C4": CORPUS.format("web_c4"),
    "web text": CORPUS.format("web_owt"),
}
IDS = "../shared/data/calibration_c4_64x128.json"

UNTRAINED = {  # the calls of `prune`, one after the other
    "magnitude static": ["--method magnitude-sparse --sparsity 2:4"],
    "wanda static": ["--method wanda --sparsity 2:4"],
    "zeros": ["--method sparsegpt --sparsity 2:4"],
    "units": ["--method adaptive-ls-v1 --params 81.4M --set calibration.self_generated=0"],
    "units and zeros": [
        "--method adaptive-ls-v1 --params 113.3M --set calibration.self_generated=0",
        "--method sparsegpt --sparsity 37.5%",
    ],
}
AST = {
    "magnitude moving": [],
    "wanda moving": ["--set", "reduce=sparse_training(scores=wanda)"],
    "magnitude moving, SLoRB": ["--set", "reduce=sparse_training(slorb=16)", "--trust-remote-code"],
}
ARMS = [*UNTRAINED, *(f"{arm}, trained" for arm in UNTRAINED), *AST]
FOUR = [arm for scores in ("magnitude", "wanda") for arm in (f"{scores} static", f"{scores} static, trained")]
HELD = {"reduce": "units", "sparsity": "null", "budget": "100%", "training.teacher": MODEL}  # zeros stay zero, nothing is cut


def _place(arm: str, *, tokens: str, seed: int, out: Path) -> Path:
    """The folder of an arm; what is not trained is the same for every number of tokens."""
    counted = f"-{tokens}" if arm not in UNTRAINED else ""
    return out / f"{arm}{counted}-{seed}".replace(", ", "-").replace(" ", "-")


def _pruned(arm: str, folder: Path, *, seed: int) -> dict[str, Any]:
    """Call `prune` as often as the arm asks for; the figures of the last call, and the seconds of all."""
    model, run, seconds = MODEL, {}, 0.0
    for number, words in enumerate(UNTRAINED[arm], 1):
        place = folder / ("model" if number == len(UNTRAINED[arm]) else f"model-{number}")
        if not place.exists():
            read = [] if "magnitude-sparse" in words else ["--calibration-ids", IDS]
            command("prune", model, *words.split(), *read, "--seed", seed, "-o", place, "--json")
        run = json.loads((place / "pruning.json").read_text(encoding="utf-8"))["figures"]
        model, seconds = str(place), seconds + run["seconds"]
    return run | {"seconds": seconds}


def _job(arm: str, *, tokens: str, seed: int, out: Path) -> dict[str, Any]:
    """The figures of an arm; worked out unless they are there."""
    folder = _place(arm, tokens=tokens, seed=seed, out=out)
    told = folder / "figures.json"
    if told.exists():
        return dict(json.loads(told.read_text(encoding="utf-8")))
    trusted = ["--trust-remote-code"] if "SLoRB" in arm or "units" in arm else []
    if arm in UNTRAINED:
        run = _pruned(arm, folder, seed=seed)
    else:
        words = ["run", "benchmarks/sparse_training.yaml", "--set", f"training.tokens={tokens}", "--set", f"seed={seed}"]
        untrained = arm.removesuffix(", trained")
        if untrained in UNTRAINED:
            _job(untrained, tokens=tokens, seed=seed, out=out)
            held = HELD | {"model": str(_place(untrained, tokens=tokens, seed=seed, out=out) / "model")}
            words += [word for key, value in held.items() for word in ("--set", f"{key}={value}")] + trusted
        run = json.loads(command(*words, *AST.get(arm, []), "-o", folder, "--json"))
    if arm.removesuffix(", trained") != "units":  # which has no zeros to prove
        command("verify", folder / "model", *trusted)
    read = {name: evaluated(folder / "model", text, *trusted) for name, text in TEXTS.items()}
    counts = next(iter(read.values()))
    figures = {
        "arm": arm, "tokens": run.get("trained_tokens", 0), "params": counts["params"], "nonzero": counts["nonzero"],
        "seconds": run["seconds"], "peak_bytes": run["peak_rss_bytes"], "seed": seed,
        "perplexity": {name: math.exp(its["nll"]) for name, its in read.items()},
    }  # fmt: skip
    told.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def _table(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| arm | tokens | parameters not zero | {' | '.join(TEXTS)} | seconds | peak memory |"
    yield "|---|---:|---:|" + "---:|" * (len(TEXTS) + 2)
    for line in lines:
        measured = " | ".join(f"{line['perplexity'][name]:.2f}" for name in TEXTS)
        yield (
            f"| {line['arm']} | {line['tokens']:,} | {line['nonzero']:,} | {measured} | {line['seconds']:,.0f} | "
            f"{line['peak_bytes'] / 2**30:.1f} GiB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*FOUR, *AST])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sparse_training"))
    asked = parser.parse_args()
    for arm in asked.arms:
        _job(arm, tokens=asked.tokens, seed=asked.seed, out=asked.output)
    print(
        "\n".join(_table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.output.glob("*/figures.json"))]))
    )


if __name__ == "__main__":
    main()
