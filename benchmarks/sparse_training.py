"""AST beside static masks, on equal tokens: SmolLM2-135M-Instruct with 2:4 zeros.

    python benchmarks/sparse_training.py [--tokens 500k] [--seed 0] [--arms ast "static, trained" …] [-o runs/sparse_training]

Four arms: Wanda's masks without training; the same masks, trained with distillation from the dense model; AST, whose masks change as it trains; AST
with SLoRB. Settings are those of benchmarks/sparse_training.yaml, the objective that of the row `ast`. A run that was stopped goes on, an arm that
is done is skipped, and each writes OUT/ARM-TOKENS-SEED/figures.json: perplexity on 40 windows of 512 tokens of each text. About 80 minutes of one core
an arm. The table of all that is there goes to stdout at the end.
"""

import argparse
import json
import math
import shutil
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

_HELD = (
    f"--set reduce=units --set sparsity=null --set budget=100% --set training.teacher={MODEL}"  # zeros stay zero, nothing is cut
)
ARMS = {
    "static": "",
    "static, trained": "--set model={static}/model " + _HELD,
    "ast": "",
    "ast with SLoRB": "--set reduce=sparse_training(slorb=16) --trust-remote-code",
}


def _job(arm: str, *, tokens: str, seed: int, out: Path) -> dict[str, Any]:
    """The figures of an arm; worked out unless they are there."""
    folder = out / f"{arm}-{tokens}-{seed}".replace(", ", "-").replace(" ", "-")
    told = folder / "figures.json"
    if told.exists():
        return dict(json.loads(told.read_text(encoding="utf-8")))
    if arm == "static":
        shutil.rmtree(folder, ignore_errors=True)
        words = f"prune {MODEL} --method wanda --sparsity 2:4 --calibration-ids {IDS}".split()
        place = folder / "model"
    else:
        words = f"run benchmarks/sparse_training.yaml --set training.tokens={tokens} --set seed={seed}".split()
        words += ARMS[arm].format(static=out / f"static-{tokens}-{seed}").split()
        place = folder
    run = json.loads(command(*words, "-o", place, "--json"))
    trusted = ["--trust-remote-code"] if "SLoRB" in arm else []
    command("verify", folder / "model", *trusted)
    perplexities = {name: math.exp(evaluated(folder / "model", text, *trusted)["nll"]) for name, text in TEXTS.items()}
    figures = {
        "arm": arm, "tokens": run.get("trained_tokens", 0), "params": run["params_after"], "nonzero": run["nonzero_after"],
        "seconds": run["seconds"], "peak_bytes": run["peak_rss_bytes"], "seed": seed, "perplexity": perplexities,
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
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sparse_training"))
    asked = parser.parse_args()
    for arm in ("static", *(arm for arm in asked.arms if arm != "static")):
        _job(arm, tokens=asked.tokens, seed=asked.seed, out=asked.output)
    print(
        "\n".join(_table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.output.glob("*/figures.json"))]))
    )


if __name__ == "__main__":
    main()
