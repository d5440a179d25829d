"""What pruning costs: its time against plain forward and backward passes, its peak memory against the model's size.

    python benchmarks/prune_cost.py [MODEL] [--params 120M] [--samples 64] [--length 128]

Time: a whole pruning run (scoring, layer distances, choosing, measuring heads, cutting) divided by (iterations × one plain
forward and backward with transformers' own loss over the same calibration tokens in the same batches and precision), both
measured in this process, the plain passes once before and once after the run, since a run's model shrinks under it and a
machine's speed drifts. Memory: peak resident memory of the process that prunes, divided by the float32 size of the model.
"""

import argparse
import json
import resource
import statistics
import time
from typing import Any

import torch

from adapt_pruner import Recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.core.calibrate import precision
from adapt_pruner.data.feeds import calibration_feed
from adapt_pruner.pipeline import shrink


def plain_pass(model: Any, batches: list[torch.Tensor], dtype: str) -> float:
    """Seconds of one forward and backward over `batches`, gradients accumulated, as anybody would write it."""
    parameters = list(model.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(False)  # nobody scores it, so the plain pass need not pay for its gradient either
    began = time.perf_counter()
    for ids in batches:
        with precision(ids.device, dtype):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
        loss.backward()
    seconds = time.perf_counter() - began
    for parameter, flag in zip(parameters, wanted, strict=True):
        parameter.grad = None
        parameter.requires_grad_(flag)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--params", default="120M")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory-only", action="store_true", help="no plain passes: the peak is then that of pruning alone")
    asked = parser.parse_args()

    loaded = load(asked.model)
    model = loaded.model
    size = 4 * count_parameters(model)
    recipe = Recipe(model=asked.model, budget=asked.params, calibration={"samples": asked.samples, "length": asked.length})
    batches = calibration_feed(model, loaded.tokenizer, **recipe.calibration.model_dump(), seed=0)(1)
    plain = []
    if not asked.memory_only:
        plain_pass(model, batches[:1], recipe.dtype)  # the first pass of a process is slow
        plain.append(plain_pass(model, batches, recipe.dtype))
    outcome = shrink(loaded, recipe, listen=lambda event: None, on_stage=lambda stage, so_far: None)
    if not asked.memory_only:
        plain.append(plain_pass(model, batches, recipe.dtype))
    spent = outcome.figures["seconds_score"] + outcome.figures["seconds_cut"]
    iterations = outcome.figures["iterations"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({
        "model": asked.model, "iterations": iterations, "calibration_tokens": asked.samples * asked.length,
        "seconds_pruning": round(spent, 2), "seconds_plain_pass": [round(seconds, 2) for seconds in plain],
        "time_ratio": round(spent / iterations / statistics.mean(plain), 3) if plain else None,
        "peak_rss_gib": round(peak / 2**30, 3), "float32_gib": round(size / 2**30, 3), "memory_ratio": round(peak / size, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
