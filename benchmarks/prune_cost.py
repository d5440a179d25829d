"""What pruning costs: its time against plain forward and backward passes, its peak memory against the model's size.

    python benchmarks/prune_cost.py [MODEL] [--method adaptive-ls-v1] [--params 120M] [--samples 64] [--length 128] [--set KEY=VALUE ...]

Time: what `adapt-pruner prune` spends on scoring, layer distances, choosing, measuring heads, repair and cutting, divided by (iterations × one
plain forward and backward with transformers' own loss over the same calibration tokens in the same batches and precision). The plain
passes come once before and once after the run, since a machine's speed drifts; of the dense model, although a run's shrinks under it. Text that
the model writes itself (`calibration.self_generated`) counts as time of the run, not as tokens. Memory: the peak resident memory of the process that
prunes, loading and saving included, divided by the float32 size of the model.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from command import command

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.precision import precision
from adapt_pruner.data.windows import calibration_feed
from adapt_pruner.recipe import Calibration


def plain_pass(model: Any, batches: list[torch.Tensor]) -> float:
    """Seconds of one forward and backward over `batches`, gradients accumulated, as anybody would write it."""
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(False)  # nobody scores it, so the plain pass need not pay for its gradient either
    began = time.perf_counter()
    for ids in batches:
        with precision(ids.device, "auto"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
        loss.backward()
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--method", default="adaptive-ls-v1")
    parser.add_argument("--params", default="120M")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of `prune`")
    asked = parser.parse_args()

    loaded = load(asked.model)
    size = 4 * count_parameters(loaded.model)
    calibration = Calibration(samples=asked.samples, length=asked.length)
    batches = calibration_feed(loaded.model, loaded.tokenizer, **calibration.of_feed(), seed=0)(1)
    plain_pass(loaded.model, batches[:1])  # the first pass of a process is slow
    plain = [plain_pass(loaded.model, batches)]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--calibration-samples", asked.samples, "--calibration-length", asked.length]
        target = ["--params", asked.params, "--method", asked.method, *(word for each in asked.set for word in ("--set", each))]
        figures = json.loads(command("prune", asked.model, "-o", Path(folder) / "pruned", *target, *options, "--json"))
    plain.append(plain_pass(loaded.model, batches))
    peak = figures["peak_rss_bytes"]
    print(json.dumps({
        "model": asked.model, "method": asked.method, "params": figures["params_after"], "iterations": figures["iterations"],
        "calibration_tokens": asked.samples * asked.length, "seconds_pruning": round(figures["seconds"], 2),
        "seconds_plain_pass": [round(seconds, 2) for seconds in plain],
        "time_ratio": round(figures["seconds"] / figures["iterations"] / statistics.mean(plain), 3),
        "peak_rss_gib": round(peak / 2**30, 3), "float32_gib": round(size / 2**30, 3), "memory_ratio": round(peak / size, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
