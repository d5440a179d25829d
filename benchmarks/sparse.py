"""Methods that make zeros, on SmolLM2-135M-Instruct: the tables of docs/results.md on zeros instead of cuts.

    python benchmarks/sparse.py [--only sparsegpt,2:4] [--draws 0 1 2] [--data ../shared/data] [-o runs/sparse]
    python benchmarks/sparse.py --table [-o runs/sparse]

A line of figures.jsonl in the folder of `-o` is one model: a row, its options, a sparsity, a draw, what it took, and its perplexity on 40 windows
of 512 tokens of WikiText-2's test text. A line that is there is not made again, so the command goes on where it was stopped. Models are
removed once they are measured, unless `--keep` is given. Draw 0 is `calibration_c4_64x128.json`; `benchmarks/draws.py` makes 1 and 2.

Beside the four solvers it has FISTAPruner from SparseGPT's result and without the correction within a decoder layer, and units removed to the
same number of parameters that are not zero, for both ways side by side.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from command import command, evaluated

MODEL = "smollm2-135m-instruct"
SPARSITY = ("50%", "2:4")
SOLVERS = {
    "magnitude-sparse": (),
    "wanda": (),
    "sparsegpt": (),
    "fistapruner": (),
    "fistapruner, from sparsegpt": ("--set", "solver=fista(warm_start=sparsegpt)"),
    "fistapruner, without correction": ("--set", "solver=fista(correction=false)"),
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
        return ["--method", method, option, self.size, *SOLVERS.get(self.name, ())]


def lines(draws: list[int]) -> Iterator[Line]:
    """Every line, the first draw of all before the second of any; units go to the parameters that 2:4 leaves, 81.4 M, and to 20 and 40 % less."""
    for draw in draws:
        for size in SPARSITY:
            yield from (Line(name, size, draw) for name in SOLVERS)
        yield from (Line("adaptive-ls-v1", size, draw) for size in ("113.3M", "92M", "81.4M"))
        yield from (Line("sparsegpt", size, draw) for size in ("20%", "40%"))


def made(line: Line, *, data: Path, out: Path, keep: bool) -> dict[str, object]:
    """Make a model and measure it; its figures."""
    ids = data / "calibration_c4_64x128.json" if line.draw == 0 else Path("runs/draws") / f"{line.draw}.json"
    place = out / f"{line.name}-{line.size}-{line.draw}".replace(", ", "-").replace(" ", "-").replace(":", "of").replace(
        "%", "pc"
    )
    began = time.perf_counter()
    if not place.exists():
        command("prune", MODEL, "-o", place, *line.words, "--calibration-ids", ids, "--seed", line.draw, "--json")
    took = json.loads((place / "pruning.json").read_text())["figures"]
    if not line.size.endswith("M"):
        command("verify", place)
    measured = evaluated(place, str(data / "wikitext2" / "test_public.txt"))
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


def table(figures: list[dict[str, object]]) -> Iterator[str]:
    """Medians over the draws, as Markdown."""
    yield "| method | size | parameters not zero | perplexity | spread | seconds | peak memory |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, size in dict.fromkeys((str(line["name"]), str(line["size"])) for line in figures):
        its = [line for line in figures if (line["name"], line["size"]) == (name, size)]
        measured = [float(line["perplexity"]) for line in its]  # type: ignore[arg-type]
        seconds = statistics.median(float(line["seconds"]) for line in its)  # type: ignore[arg-type]
        peak = max(int(line["peak_bytes"]) for line in its) / 2**30  # type: ignore[call-overload]
        spread = f"{min(measured):.2f}–{max(measured):.2f}" if len(its) > 1 else "–"
        yield (
            f"| {name} | {size} | {its[0]['nonzero']:,} | {statistics.median(measured):.2f} | {spread} | {seconds:,.0f} | {peak:.1f} GiB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words with commas; lines whose name and size have all of them")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sparse"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / "figures.jsonl"
    there = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if asked.table:
        print("\n".join(table(there)))
        return
    done = {(line["name"], line["size"], line["draw"]) for line in there}
    wanted = [word for word in asked.only.split(",") if word]
    for line in lines(asked.draws):
        if (line.name, line.size, line.draw) in done or not all(word in f"{line.name} {line.size}" for word in wanted):
            continue
        figures = made(line, data=asked.data, out=asked.output, keep=asked.keep)
        with path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(f"{line.name}, {line.size}, draw {line.draw}: perplexity {figures['perplexity']:.2f}")


if __name__ == "__main__":
    main()
