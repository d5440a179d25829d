"""What a run would take, before it is started: time and memory."""

import time
from dataclasses import asdict
from typing import Any

import torch

from adapt_pruner import families
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.core.calibrate import score
from adapt_pruner.core.memory import peak_rss_bytes
from adapt_pruner.metrics.weights import taylor
from adapt_pruner.plan import reads_text
from adapt_pruner.prepare import Listener, load_model, prepare
from adapt_pruner.recipe import Recipe

__all__ = ["dry_run"]


def dry_run(recipe: Recipe, *, listen: Listener = lambda event: None, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a run would do, with time and memory estimated from a quick probe of the real model; nothing is written.

    The probe is one batch of random tokens, forward and backward. A training token is taken to cost what a calibration token
    does; Adam's two moments and the gradients of all weights are added to the memory seen.
    """
    loaded = load_model(recipe.ready(), listen, trust_remote_code)
    model = loaded.model
    dense = count_parameters(model)
    ready = prepare(loaded, recipe, listen=listen)
    length = recipe.calibration.length
    batch = torch.randint(model.config.vocab_size, (max(1, 512 // length), length), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first pass of a process is slow
        began = time.perf_counter()
        score(model, families.axes(model), [batch], metrics=[taylor], dtype=recipe.dtype)
    per_token = (time.perf_counter() - began) / batch.numel()
    measured = 1 if reads_text(model, recipe) else 0
    seconds = [(measured * stage.calibration_tokens + stage.tokens) * per_token for stage in ready.stages]
    return {
        "model": recipe.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "params_before": dense,
        "params_after": ready.budget.keep,
        "stages": [asdict(stage) | {"seconds": span} for stage, span in zip(ready.stages, seconds, strict=True)],
        "seconds": sum(seconds),
        "peak_rss_bytes": peak_rss_bytes() + (3 * 4 * dense if recipe.training.tokens else 0),
    }
