"""What a model still knows after pruning, and after recovery: the retention table of docs/measurements.md.

    python benchmarks/retention.py [--only dense,113.3M-pruned] [--measure text,arc_easy,mmlu] [-o FOLDER]
    python benchmarks/retention.py --table [-o FOLDER]

Prunes SmolLM2-135M-Instruct to 113.3 M, 92 M and 70.8 M parameters with `adapt-pruner prune --method adaptive-ls-v1`, trains each on 200,000 tokens as the
recipe smollm2-105m does (but on the six domains of interleaving.yaml, for its own text teaches Python's manual and no more), and measures
the dense model and those of each size, before and after, with `adapt-pruner eval`: perplexity on WikiText-2's test text and on held-out
documents of `corpus/web_owt`, the eight commonsense tasks and MMLU (four letters, no examples), all items of the local files.

Every step is kept in the folder of `-o`, models as folders, figures as one JSON file a model and measure, and is not done again. The
default, `benchmarks/retention`, comes with the figures of docs/measurements.md, so that a call measures what is still missing there; another folder
measures all. Two processes with OMP_NUM_THREADS=1 and different `--only` share a folder and two cores well.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from command import command

from adapt_pruner.evaluate.task_sources import SUITES
from adapt_pruner.evaluate.tasks import TaskScore, average

MODEL = "smollm2-135m-instruct"
SIZES = ["113.3M", "92M", "70.8M"]
NAMES = ["dense", *(f"{size}-{state}" for state in ("pruned", "recovered") for size in SIZES)]
MIXTURE = Path(__file__).with_name("interleaving.yaml")
TEXTS = {"wikitext2": "perplexity, WikiText-2", "heldout": "perplexity, held-out web text"}
COMMONSENSE = SUITES["commonsense"]
TASKS = [*COMMONSENSE, "mmlu"]
MEASURES = ["text", *TASKS]


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
                command("prune", MODEL, "-o", folder, "--params", size, "--method", "adaptive-ls-v1", "--calibration-ids", ids)
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
        if what != "text":
            where = ["--task-dir", self.data / "lm_eval_tasks", "--trust-remote-code", "--cache-dir", self.out / "tasks"]
            self._kept(name, what, ["--tasks", what, *where])
            return
        self._kept(name, "wikitext2", ["--text", self.data / "wikitext2" / "test_public.txt", "--max-windows", 40])
        self._kept(name, "heldout", ["--text", f"{self.data}/corpus/web_owt/*.jsonl.gz#heldout", "--max-windows", 40])

    def found(self, name: str, what: str) -> dict[str, Any] | None:
        path = self.out / f"{name}-{what}.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def _kept(self, name: str, what: str, options: list[Any]) -> None:
        if self.found(name, what) is None:
            model = self.model(name)
            said = command("eval", model, *options, "--dtype", "auto", "--json")
            for here, told in ((json.dumps(model), json.dumps(name)), (str(self.data.absolute()), "../shared/data")):
                said = said.replace(here, told)  # what is kept names no folder of this machine
            (self.out / f"{name}-{what}.json").write_text(said)

    def _texts(self, of: str) -> str:
        """The texts of the mixture's `training` or `evaluation`, with their weights."""
        texts = yaml.safe_load(MIXTURE.read_text(encoding="utf-8"))[of]["source"]
        return json.dumps({spec.replace("../shared/data", str(self.data)): weight for spec, weight in texts.items()})


def table(bench: Bench) -> str:
    """What is there by now, in Markdown: perplexities, accuracies in per cent, and the share of the dense model's that is kept."""
    lines = ["| | " + " | ".join(NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    for what, title in TEXTS.items():
        lines.append(_row(title, [None if found is None else f"{found['perplexity']:.2f}" for found in _found(bench, what)]))
    scores = {
        task: [None if found is None else TaskScore(**found["tasks"][0]) for found in _found(bench, task)] for task in TASKS
    }
    for task, those in scores.items():
        lines.append(
            _row(_title(task, those), _cells([None if score is None else (score.value, score.stderr) for score in those]))
        )
        if task == COMMONSENSE[-1]:
            by_model = zip(*(scores[one] for one in COMMONSENSE), strict=True)
            lines.append(_row("average of the eight", _cells([_mean(its) for its in by_model])))
    return "\n".join(lines)


def _found(bench: Bench, what: str) -> list[dict[str, Any] | None]:
    return [bench.found(name, what) for name in NAMES]


def _mean(scores: Sequence[TaskScore | None]) -> tuple[float, float | None] | None:
    """Of a model's scores; None where one is missing."""
    known = [score for score in scores if score is not None]
    return average(known) if len(known) == len(scores) else None


def _title(task: str, scores: Sequence[TaskScore | None]) -> str:
    """The task, its metric, its items and what guessing gets."""
    score = next((score for score in scores if score is not None), None)
    if score is None:
        return task
    chance = "" if score.chance is None else f"; guessing {100 * score.chance:.0f}"
    return f"{task}, {score.metric} ({score.items:,} items{chance})"


def _cells(figures: Sequence[tuple[float, float | None] | None]) -> list[str | None]:
    """Value ± error of each model, the dense one first, and the share of its value."""
    dense, *_ = figures
    cells: list[str | None] = []
    for figure in figures:
        if figure is None:
            cells.append(None)
            continue
        error = "" if figure[1] is None else f" ± {100 * figure[1]:.1f}"
        share = "" if dense is None or figure is dense else f" ({100 * figure[0] / dense[0]:.0f} %)"
        cells.append(f"{100 * figure[0]:.1f}{error}{share}")
    return cells


def _row(title: str, cells: list[str | None]) -> str:
    return f"| {title} | " + " | ".join(cell or "–" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES), help="models, with commas, in this order (default: %(default)s)")
    parser.add_argument("--measure", default=",".join(MEASURES), help="with commas (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "retention")
    asked = parser.parse_args()
    only, measure = asked.only.split(","), asked.measure.split(",")
    if unknown := sorted({*only, *measure} - {*NAMES, *MEASURES}):
        parser.error(f"{', '.join(unknown)} is not known; models are {', '.join(NAMES)}, measures {', '.join(MEASURES)}")
    bench = Bench(asked.data, asked.output)
    if not asked.table:
        if not asked.data.exists():
            sys.exit(f"{asked.data} is not there; name the folder of texts and tasks with --data")
        asked.output.mkdir(parents=True, exist_ok=True)
        for what in measure:
            for name in only:
                bench.measure(name, what)
    print(table(bench))


if __name__ == "__main__":
    main()
