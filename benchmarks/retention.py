"""What a model still knows after pruning, and after recovery: the retention table of docs/results.md.

    python benchmarks/retention.py [--only dense,113.3M-pruned] [--measure text,commonsense,mmlu] [-o retention]
    python benchmarks/retention.py --table [-o retention]

Prunes SmolLM2-135M-Instruct to 113.3 M, 92 M and 70.8 M parameters with `adapt-pruner prune --method best`, trains each on 200,000 tokens as the
recipe smollm2-105m does (but on the six domains of interleaving.yaml, for its own text teaches Python's manual and no more), and measures
the dense model and those of each size, before and after, with `adapt-pruner eval`: perplexity on WikiText-2's test text and on held-out
documents of `corpus/web_owt`, the eight commonsense tasks and MMLU (four letters, no examples), all items of the local files.

Every step is kept in the folder of `-o` and is not done again; scores are kept task by task. Two processes with OMP_NUM_THREADS=1 and
different `--only` share the folder and two cores well.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from command import command

MODEL = "smollm2-135m-instruct"
SIZES = ["113.3M", "92M", "70.8M"]
NAMES = ["dense", *(f"{size}-{state}" for state in ("pruned", "recovered") for size in SIZES)]
MIXTURE = Path(__file__).with_name("interleaving.yaml")
TEXTS = {"wikitext2": "WikiText-2", "heldout": "held-out web text"}
MEASURES = ["text", "commonsense", "mmlu"]


class Bench:
    """The steps, each done once."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out

    def model(self, name: str) -> str:
        """A model of the table, made if it is not there: dense, 113.3M-pruned, 113.3M-recovered."""
        if name == "dense":
            return MODEL
        size, state = name.rsplit("-", 1)
        folder = self.out / name
        if state == "pruned":
            if not folder.exists():
                ids = self.data / "calibration_c4_64x128.json"
                command("prune", MODEL, "-o", folder, "--params", size, "--method", "best", "--calibration-ids", ids)
            return str(folder)
        if not (folder / "model").exists():
            pruned = self.model(f"{size}-pruned")
            settings = {"model": pruned, "budget": "100%"}
            settings |= {f"{of}.source": self._texts(of) for of in ("training", "evaluation")}
            changes = [word for item in settings.items() for word in ("--set", "=".join(item))]
            command("run", "smollm2-105m", "-o", folder, *changes)
        return str(folder / "model")

    def measure(self, name: str, what: str) -> None:
        """Measure a model, and keep what the command said."""
        tasks = ["--task-dir", self.data / "lm_eval_tasks", "--cache-dir", self.out / "tasks"]
        if what != "text":
            self._kept(name, what, ["--tasks", what, *tasks])
            return
        self._kept(name, "wikitext2", ["--text", self.data / "wikitext2" / "test_public.txt", "--max-windows", 40])
        self._kept(name, "heldout", ["--text", f"{self.data}/corpus/web_owt/*.jsonl.gz#heldout", "--max-windows", 40])

    def found(self, name: str, what: str) -> dict[str, Any] | None:
        path = self.out / f"{name}-{what}.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def _kept(self, name: str, what: str, options: list[Any]) -> None:
        if self.found(name, what) is None:
            said = command("eval", self.model(name), *options, "--dtype", "auto", "--json")
            (self.out / f"{name}-{what}.json").write_text(said)

    def _texts(self, of: str) -> str:
        """The texts of the mixture's `training` or `evaluation`, with their weights."""
        texts = yaml.safe_load(MIXTURE.read_text(encoding="utf-8"))[of]["source"]
        return json.dumps({spec.replace("../shared/data", str(self.data)): weight for spec, weight in texts.items()})


def table(bench: Bench) -> str:
    """What is there by now, in Markdown: perplexities, accuracies in per cent, and the share of the dense model's that is kept."""
    lines = ["| | " + " | ".join(NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    for what, title in TEXTS.items():
        texts = [bench.found(name, what) for name in NAMES]
        lines.append(_row(f"perplexity, {title}", ["–" if text is None else f"{text['perplexity']:.2f}" for text in texts]))
    for what in MEASURES[1:]:
        scores = [bench.found(name, what) for name in NAMES]
        if scores[0] is None:
            continue
        for index, dense in enumerate(scores[0]["tasks"]):
            chance = "" if dense["chance"] is None else f"; chance {100 * dense['chance']:.0f}"
            title = f"{dense['task']} ({dense['items']:,}{chance})"
            lines.append(_row(title, ["–" if one is None else _accuracy(one["tasks"][index], dense) for one in scores]))
        if len(scores[0]["tasks"]) > 1:
            cells = ["–" if one is None else _accuracy(one["average"], scores[0]["average"]) for one in scores]
            lines.append(_row("average", cells))
    return "\n".join(lines)


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _accuracy(score: dict[str, Any], dense: dict[str, Any]) -> str:
    text = f"{100 * score['value']:.1f} ± {100 * score['stderr']:.1f}"
    return text if score is dense else f"{text} ({100 * score['value'] / dense['value']:.0f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES), help="models, with commas, in this order (default: %(default)s)")
    parser.add_argument("--measure", default=",".join(MEASURES), help="with commas (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--output", type=Path, default=Path("retention"))
    asked = parser.parse_args()
    bench = Bench(asked.data, asked.output)
    if not asked.table:
        if not asked.data.exists():
            sys.exit(f"{asked.data} is not there; name the folder of texts and tasks with --data")
        asked.output.mkdir(parents=True, exist_ok=True)
        for what in asked.measure.split(","):
            for name in asked.only.split(","):
                bench.measure(name, what)
    print(table(bench))


if __name__ == "__main__":
    main()
