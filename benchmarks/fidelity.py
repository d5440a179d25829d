"""Our rows against their authors' own code: the same model, calibration, text and number of parameters.

    python benchmarks/fidelity.py [--only flap,wanda-sp] [-o fidelity]

Prunes SmolLM2-135M-Instruct once a line with `adapt-pruner prune`, calibrated on the token ids of `calibration_c4_64x128.json`, and
measures it with `adapt-pruner eval` on the first 40 windows of 512 tokens of WikiText-2's test text, both from the folder `--data`. The authors'
figures are those of their released code on the same text and ids. What is measured already is kept in the folder of `-o`.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from command import command

MODEL = "smollm2-135m-instruct"
ALL_LAYERS = ["--set", "chooser=allocate.uniform"]
OUR_FOLD = ["--set", "metric=weights.taylor"]
LINES: list[tuple[str, list[str], int, float]] = [  # name, options, parameters, the authors' perplexity
    ("llm-pruner", [], 113_613_120, 39.12),
    ("llm-pruner", [], 91_937_088, 160.19),
    ("llm-pruner", OUR_FOLD, 91_937_088, 160.19),
    ("llm-pruner", ALL_LAYERS, 113_208_768, 48.41),
    ("llm-pruner", ALL_LAYERS, 91_971_648, 338.62),
    ("llm-pruner", ALL_LAYERS + OUR_FOLD, 91_971_648, 338.62),
    ("llm-pruner", ALL_LAYERS, 73_101_888, 1526.75),
    ("flap", [], 113_330_304, 48.63),
    ("flap", [], 92_100_096, 649.16),
    ("flap", [], 70_720_128, 2880.78),
    ("wanda-sp", [], 113_260_608, 44.71),
    ("wanda-sp", [], 92_023_488, 1067.90),
    ("wanda-sp", [], 73_153_728, 2620.15),
    ("wanda-sp", ["--set", "behind=false"], 92_023_488, 1067.90),
]


def measured(name: str, options: list[str], params: int, *, data: Path, out: Path) -> dict[str, Any]:
    """Parameters and perplexity of a line, by the command line."""
    slug = "-".join([name, *(option.split("=")[-1] for option in options[1::2]), str(params)])
    kept, model = out / f"{slug}.json", out / slug
    if not kept.exists():
        shutil.rmtree(model, ignore_errors=True)  # of a line that was stopped
        ids = ["--calibration-ids", str(data / "calibration_c4_64x128.json")]
        exact = ["--dtype", "float32"]  # as theirs
        command("prune", MODEL, "-o", str(model), "--params", str(params), "--method", name, *options, *ids, *exact)
        said = command("eval", str(model), "--text", str(_text(data)), "--window", "512", "--max-windows", "40", "--json")
        (model / "model.safetensors").unlink()
        kept.write_text(said)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _text(data: Path) -> Path:
    return data / "wikitext2" / "test_public.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows, with commas")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--output", type=Path, default=Path("fidelity"))
    asked = parser.parse_args()
    if not _text(asked.data).exists():
        sys.exit(f"{_text(asked.data)} is not there; name the folder that holds it with --data")
    asked.output.mkdir(parents=True, exist_ok=True)
    print("| row | options | parameters | authors' code | ours | ours / authors' |\n|---|---|---|---|---|---|")
    for name, options, params, theirs in LINES:
        if asked.only is not None and name not in asked.only.split(","):
            continue
        found = measured(name, options, params, data=asked.data, out=asked.output)
        ours, said = found["perplexity"], " ".join(option for option in options if option != "--set")
        print(f"| {name} | {said} | {found['params']:,} | {theirs:,.2f} | {ours:,.2f} | {ours / theirs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
