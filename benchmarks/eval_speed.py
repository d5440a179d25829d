"""How long scoring tasks takes against plain lm-eval: the same items of the same tasks, task by task in turn, and the same scores.

    python benchmarks/eval_speed.py [MODEL] [--tasks NAMES] [--task-dir DIR] [--limit N] [--batch N] [--dtype float32|bfloat16]

Both are given the same model in memory, so that loading is in neither time. Their side is `lm_eval --model hf --batch_size 8`:
the class that command uses, called by `lm_eval.evaluate`. Seconds are of the process, by which other work on the machine counts less
than by the clock; ratios of both are printed. Exits with 1 where a score differs in its last digit, which only float32 promises.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TQDM_DISABLE", "1")

from adapt_pruner.checkpoint.load import load
from adapt_pruner.cli.tables import print_table
from adapt_pruner.evaluate.task_sources import as_lm_eval_does, find_tasks, lm_eval
from adapt_pruner.evaluate.tasks import evaluate_tasks, set_shots
from adapt_pruner.report.screen import quiet_libraries


def measure() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", default="arc_easy,piqa,winogrande")
    parser.add_argument("--task-dir")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    quiet_libraries()
    harness = lm_eval()
    from lm_eval.models.huggingface import HFLM

    loaded = load(asked.model)
    wanted = find_tasks(asked.tasks, task_dir=asked.task_dir, trust_remote_code=True)
    set_shots(wanted, None)
    with as_lm_eval_does():
        theirs = HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=asked.batch, softmax_dtype="float32",
            mixed_precision_dtype=None if asked.dtype == "float32" else asked.dtype,
        )  # fmt: skip
    rows, same = [], True
    totals = [[0.0, 0.0], [0.0, 0.0]]
    for line in wanted:
        for name, task in line.tasks.items():
            with TemporaryDirectory() as cache:
                began = time.process_time(), time.perf_counter()
                (ours,) = evaluate_tasks(
                    loaded.model, loaded.tokenizer, [line], limit=asked.limit, dtype=asked.dtype, cache=Path(cache)
                )
                own = time.process_time() - began[0], time.perf_counter() - began[1]
            with as_lm_eval_does():
                began = time.process_time(), time.perf_counter()
                came = harness.evaluate(theirs, {"tasks": {name: task}}, limit=asked.limit, log_samples=False)
                other = time.process_time() - began[0], time.perf_counter() - began[1]
            expected = {key: value for key, value in came["results"][name].items() if "," in key}
            equal = expected == dict(ours.metrics)
            same &= equal
            for total, spent in zip(totals, (own, other), strict=True):
                total[0], total[1] = total[0] + spent[0], total[1] + spent[1]
            rows.append([
                name, str(ours.items), f"{ours.value:.4f}", "yes" if equal else json.dumps(expected), f"{own[0]:.1f}", f"{other[0]:.1f}",
                f"{own[0] / other[0]:.2f}", f"{own[1] / other[1]:.2f}",
            ])  # fmt: skip
    (own_cpu, own_wall), (cpu, wall) = totals
    rows.append(["all", "", "", "", f"{own_cpu:.1f}", f"{cpu:.1f}", f"{own_cpu / cpu:.2f}", f"{own_wall / wall:.2f}"])
    print_table(["task", "items", "score", "same", "ours, s", "lm-eval, s", "ratio", "by the clock"], rows)
    return 0 if same or asked.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(measure())
