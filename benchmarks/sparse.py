"""Methods that make zeros, on SmolLM2-135M-Instruct: the tables of docs/measurements.md on zeros instead of cuts.

    python benchmarks/sparse.py [--only sparsegpt,2:4] [--draws 0 1 2] [--data ../shared/data] [-o runs/sparse]
    python benchmarks/sparse.py --table [-o runs/sparse]
    python benchmarks/draws.py --samples 128 --length 512 --numbers 1 -o runs/draws-512
    python benchmarks/sparse.py --ids runs/draws-512/1.json --only 2:4 --draws 0 -o runs/sparse-512
    python benchmarks/sparse.py --tune [SPEC] --draws 0 [--ids runs/draws-512/1.json] [-o runs/sparse]

A line of figures.jsonl in the folder of `-o` is one model: a row, its options, a sparsity, a draw, what it took, and its perplexity on 40 windows
of 512 tokens of WikiText-2's test text. A line that is there is not made again, so the command goes on where it was stopped. Models are
removed once they are measured, unless `--keep` is given. Draw 0 is `calibration_c4_64x128.json`; `benchmarks/draws.py` makes 1 and 2.

`--tune` measures rounds and steps of FISTAPruner at 2:4 on held-out C4, or on SPEC, but on no text of docs/measurements.md. Its lines go to tuned.jsonl.

Beside the four solvers it has FISTAPruner from SparseGPT's result, without the correction within a decoder layer, and on the output of the sparse
layers before, as SparseGPT reads it. Units removed to the same number of parameters that are not zero stand beside them. The line "forward pass" is
one pass of the dense model over a draw, which the table divides seconds by; measure it beside the same other work.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command import command, evaluated
from texts import TUNED_ON, to_tune_on

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.precision import precision
from adapt_pruner.core.system.memory import peak_rss_bytes
from adapt_pruner.data.tokens import batches_of, calibration_ids

MODEL = "smollm2-135m-instruct"
SPARSITY = ("50%", "2:4")
FORWARD = "forward pass"
SOLVERS = {
    "magnitude-sparse": (),
    "wanda": (),
    "sparsegpt": (),
    "fistapruner": (),
    "fistapruner, from sparsegpt": ("--set", "solver=fista(warm_start=sparsegpt)"),
    "fistapruner, without correction": ("--set", "solver=fista(reads=dense)"),
    "fistapruner, on sparse layers": ("--set", "solver=fista(reads=sparse)"),
    "fistapruner, on sparse layers, from sparsegpt": ("--set", "solver=fista(reads=sparse, warm_start=sparsegpt)"),
}

TUNED = {
    f"fistapruner, {rounds} x {steps}": ("--set", f"solver=fista(rounds={rounds}, steps={steps})")
    for rounds, steps in ((3, 6), (5, 12), (8, 12), (12, 20))
}


@dataclass(frozen=True)
class Line:
    """One model: a row with its options, the sparsity or the parameters it is made to, and a draw of calibration text."""

    name: str
    size: str
    draw: int

    @property
    def words(self) -> list[str]:
        """Of the command `prune`, but for the model, the text and the place."""
        method = self.name.partition(",")[0]
        option = "--params" if self.size.endswith("M") else "--sparsity"
        return ["--method", method, option, self.size, *(SOLVERS | TUNED).get(self.name, ())]


def lines(draws: list[int]) -> Iterator[Line]:
    """Every line, the first draw of all before the second of any; units go to the parameters that 2:4 leaves, 81.4 M, and to 20 and 40 % less."""
    for draw in draws:
        yield Line(FORWARD, "dense", draw)
        for size in SPARSITY:
            yield from (Line(name, size, draw) for name in SOLVERS)
        yield from (Line("adaptive-ls-v1", size, draw) for size in ("113.3M", "92M", "81.4M"))
        yield from (Line("sparsegpt", size, draw) for size in ("20%", "40%"))


def forward(ids: Path) -> dict[str, float]:
    """Seconds of one pass of the dense model over the sequences of a file, 1,024 tokens at once, and the peak memory of this process."""
    model = load(MODEL).model.eval()
    batches = batches_of(calibration_ids(ids, vocab_size=model.config.vocab_size), max_tokens=1024)
    with torch.no_grad(), precision(torch.device("cpu"), "auto"):
        model(batches[0])  # the first pass of a process is slow
        began = time.perf_counter()
        for batch in batches:
            model(batch)
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_rss_bytes()}


def made(line: Line, *, ids: Path, text: str, out: Path, keep: bool) -> dict[str, Any]:
    """Make a model and measure it; its figures."""
    if line.name == FORWARD:  # in a process of its own, since the peak is the process's
        child = subprocess.run([sys.executable, __file__, "--forward", ids], stdout=subprocess.PIPE, check=True)
        return asdict(line) | dict(json.loads(child.stdout))
    place = out / f"{line.name}-{line.size}-{line.draw}".replace(", ", "-").replace(" ", "-").replace(":", "of").replace(
        "%", "pc"
    )
    began = time.perf_counter()
    if not place.exists():
        command("prune", MODEL, "-o", place, *line.words, "--calibration-ids", ids, "--seed", line.draw, "--json")
    took = json.loads((place / "pruning.json").read_text())["figures"]
    if not line.size.endswith("M"):
        command("verify", place)
    measured = evaluated(place, text)
    if not keep:
        shutil.rmtree(place)
    told = {key: measured[key] for key in ("params", "nonzero", "perplexity")}
    return {
        **asdict(line),
        **told,
        "seconds": took["seconds"],
        "peak_bytes": took["peak_rss_bytes"],
        "in_all": time.perf_counter() - began,
    }


def table(figures: list[dict[str, Any]]) -> Iterator[str]:
    """Medians over the draws, as Markdown."""
    yield "| method | size | parameters not zero | perplexity | spread | seconds | forward passes | peak memory |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    once = statistics.median([line["seconds"] for line in figures if line["name"] == FORWARD] or [math.nan])
    for name, size in dict.fromkeys((line["name"], line["size"]) for line in figures):
        its = [line for line in figures if (line["name"], line["size"]) == (name, size)]
        seconds = statistics.median(line["seconds"] for line in its)
        peak = max(line["peak_bytes"] for line in its) / 2**30
        measured = [line["perplexity"] for line in its if name != FORWARD]
        spread = f"{min(measured):.2f}–{max(measured):.2f}" if len(measured) > 1 else "–"
        told = f"{its[0]['nonzero']:,} | {statistics.median(measured):.2f} | {spread}" if measured else "– | – | –"
        yield f"| {name} | {size} | {told} | {seconds:,.0f} | {seconds / once:,.0f} | {peak:.1f} GiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words with commas; lines whose name and size have all of them")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--ids", type=Path, help="draw 0, unless it is calibration_c4_64x128.json")
    parser.add_argument("--tune", nargs="?", const=TUNED_ON, metavar="SPEC", help="measure settings of FISTAPruner on this text")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--forward", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.forward:
        print(json.dumps(forward(asked.forward)))
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    text = str(asked.data / "wikitext2" / "test_public.txt") if asked.tune is None else to_tune_on(asked.tune)
    path = asked.output / ("figures.jsonl" if asked.tune is None else "tuned.jsonl")
    there = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if asked.table:
        print("\n".join(table(there)))
        return
    done = {(line["name"], line["size"], line["draw"]) for line in there}
    wanted = [word for word in asked.only.split(",") if word]
    settings = (Line(name, "2:4", draw) for draw in asked.draws for name in TUNED)
    for line in lines(asked.draws) if asked.tune is None else settings:
        if (line.name, line.size, line.draw) in done or not all(word in f"{line.name} {line.size}" for word in wanted):
            continue
        first = asked.ids or asked.data / "calibration_c4_64x128.json"
        ids = Path("runs/draws") / f"{line.draw}.json" if line.draw else first
        figures = made(line, ids=ids, text=text, out=asked.output, keep=asked.keep)
        with path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(f"{line.name}, {line.size}, draw {line.draw}: {figures.get('perplexity', figures['seconds']):.2f}")


if __name__ == "__main__":
    main()
