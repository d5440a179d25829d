"""Our rows against their authors' own code: the same model, calibration, text and number of parameters.

    python benchmarks/fidelity.py [--only flap,wanda-sp] [-o fidelity]

Prunes SmolLM2-135M-Instruct once a line with `adapt-pruner prune`, calibrated on the token ids of `calibration_c4_64x128.json` or the first of
them, and measures it with `adapt-pruner eval` on the first 40 windows of 512 tokens of WikiText-2's test text, both from the folder `--data`. The authors'
figures are those of their released code on the same text and ids. What is measured already is kept in the folder of `-o`.

SliceGPT's released code differs from the paper in two ways that the product leaves out; `as_their_slicegpt` adds them here.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from command import command
from torch import Tensor, nn

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.data.tokens import batches_of, calibration_ids
from adapt_pruner.data.windows import MICRO_TOKENS, held_out_windows
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.reduce import slice as slicing

MODEL = "smollm2-135m-instruct"
ALL_LAYERS = ["--set", "chooser=allocate.uniform"]
OUR_FOLD = ["--set", "metric=weights.taylor"]
THEIR_HEADS = ["--set", "metric=weights.taylor(authors_fold=true)", "--set", "head_metric=null"]
# Of `as_their_slicegpt`; no options of the command line.
BEFORE_NORM = ["--in-python", "x before its norm"]
AS_THEIRS = ["--in-python", "x before its norm, embeddings less their means"]
THEIR_MEAN = ["--set", "metric=activations.fluctuation(form=WIFV,standardised=true,authors_mean=true)"]


class Line(NamedTuple):
    """A row with options, pruned to so many parameters on the first of the sequences, and the authors' perplexity."""

    name: str
    options: list[str]
    params: int
    theirs: float
    sequences: int = 64


LINES = [
    Line("llm-pruner", [], 113_613_120, 39.12),
    Line("llm-pruner", [], 91_937_088, 160.19),
    Line("llm-pruner", OUR_FOLD, 91_937_088, 160.19),
    Line("llm-pruner", ALL_LAYERS, 113_208_768, 48.41),
    Line("llm-pruner", ALL_LAYERS, 91_971_648, 338.62),
    Line("llm-pruner", ALL_LAYERS + OUR_FOLD, 91_971_648, 338.62),
    Line("llm-pruner", ALL_LAYERS, 73_101_888, 1526.75),
    Line("flap", [], 113_330_304, 48.63),
    Line("flap", [], 92_100_096, 649.16),
    Line("flap", [], 70_720_128, 2880.78),
    Line("flap", THEIR_MEAN, 113_330_304, 48.63),
    Line("flap", THEIR_MEAN, 92_100_096, 649.16),
    Line("flap", THEIR_MEAN, 70_720_128, 2880.78),
    Line("wanda-sp", [], 113_260_608, 44.71),
    Line("wanda-sp", [], 92_023_488, 1067.90),
    Line("wanda-sp", [], 73_153_728, 2620.15),
    Line("wanda-sp", ["--set", "sequential_scoring=false"], 92_023_488, 1067.90),
    Line("slicegpt", [], 133_882_560, 209.78),
    Line("slicegpt", AS_THEIRS, 133_882_560, 209.78),
    Line("slicegpt", BEFORE_NORM, 133_882_560, 209.78),
    Line("slicegpt", [], 107_483_328, 453.63),
    Line("slicegpt", AS_THEIRS, 107_483_328, 453.63),
    Line("slicegpt", [], 82_171_584, 1117.90),
    Line("slicegpt", AS_THEIRS, 82_171_584, 1117.90),
    Line("adapt-pruner", THEIR_HEADS, 112_197_888, 43.60, 16),
    Line("adapt-pruner", THEIR_HEADS, 90_903_168, 156.73, 16),
    Line("adapt-pruner", THEIR_HEADS, 68_196_672, 760.66, 16),
    Line("adapt-pruner", THEIR_HEADS, 112_197_888, 41.1),
    Line("adapt-pruner", THEIR_HEADS, 90_903_168, 255),
    Line("adapt-pruner", THEIR_HEADS, 68_196_672, 1136),
]


def measured(line: Line, *, data: Path, out: Path) -> dict[str, Any]:
    """Parameters and perplexity of a line, by the command line."""
    words = [*line.options[1::2], str(line.params), str(line.sequences)]
    slug = "-".join([line.name, *(re.sub(r"\W+", "_", word).strip("_") for word in words)])
    kept, model = out / f"{slug}.json", out / slug
    if not kept.exists() and line.name == "slicegpt" and line.options:
        kept.write_text(json.dumps(as_their_slicegpt(line, data=data, out=out)))
    elif not kept.exists():
        shutil.rmtree(model, ignore_errors=True)  # of a line that was stopped
        ids = ["--calibration-ids", str(_first(line.sequences, data / "calibration_c4_64x128.json", out))]
        exact = ["--dtype", "float32"]  # as theirs
        command(
            "prune", MODEL, "-o", str(model), "--params", str(line.params), "--method", line.name, *line.options, *ids, *exact
        )
        said = command("eval", str(model), "--text", str(_text(data)), "--window", "512", "--max-windows", "40", "--json")
        (model / "model.safetensors").unlink()
        kept.write_text(said)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


@torch.no_grad()
def as_their_slicegpt(line: Line, *, data: Path, out: Path) -> dict[str, Any]:
    """Parameters and perplexity of a model sliced as SliceGPT's released code slices it.

    Directions are those of x before its norm. With `AS_THEIRS` the mean of each embedding is subtracted from it, which that code
    does for every model: right before a LayerNorm, which subtracts means itself, and a change of the model before an RMSNorm.
    """
    loaded = load(MODEL)
    if line.options == AS_THEIRS:
        head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
        head.weight = nn.Parameter(head.weight.clone())  # the head keeps the means
        embedding.weight.sub_(embedding.weight.double().mean(1, keepdim=True))
    rows = calibration_ids(
        str(_first(line.sequences, data / "calibration_c4_64x128.json", out)), vocab_size=len(loaded.tokenizer)
    )
    with patch.object(slicing, "_moment", _moment_before_norm):
        batches = batches_of(rows, max_tokens=MICRO_TOKENS)
        slicing.slice_to(loaded.model, slicing.width_for(loaded.model, line.params), batches, dtype="float32")
    windows = held_out_windows(loaded.tokenizer, source=str(_text(data)), window=512, max_windows=40)
    found = perplexity(loaded.model, windows, dtype="float32")
    return {"params": count_parameters(loaded.model), "perplexity": found.perplexity}


def _moment_before_norm(signals: Sequence[Tensor], norm: nn.Module) -> Tensor:
    wide = torch.cat([signal.flatten(0, -2) for signal in signals]).double()
    return wide.T @ wide


def _first(sequences: int, ids: Path, out: Path) -> Path:
    """A file of so many of the sequences of `ids`."""
    told = json.loads(ids.read_text())
    first = out / f"first-{sequences}.json"
    first.write_text(json.dumps({**told, "input_ids": told["input_ids"][:sequences]}))
    return first


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
    for line in LINES:
        if asked.only is not None and line.name not in asked.only.split(","):
            continue
        found = measured(line, data=asked.data, out=asked.output)
        ours, said = found["perplexity"], " ".join([*line.options[1::2], f"{line.sequences} × 128"])
        print(
            f"| {line.name} | {said} | {found['params']:,} | {line.theirs:,.2f} | {ours:,.2f} | {ours / line.theirs:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
