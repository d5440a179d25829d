"""Our training loop beside transformers' Trainer: the same pruned model, tokens, batches and optimiser, in turn.

    python benchmarks/train_speed.py [--model smollm2-135m-instruct] [--params 105M] [--steps 6] [--rounds 2]

Each trains in a fresh process, so that peak memory is its own; the first step of each is not timed. bfloat16 autocast where
native. What counts are the ratios: speed at equal loss, and memory.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, ROWS, BATCH_ROWS, LR = 256, 8, 16, 1e-4  # tokens a row, rows a pass, rows a step


def data(steps: int, folder: str) -> Any:
    from adapt_pruner.checkpoint.load import load
    from adapt_pruner.data.fixed import training_rows

    loaded = load(folder)
    wanted = (steps + 1) * BATCH_ROWS * LENGTH
    rows = training_rows(loaded.tokenizer, "python-docs:train", length=LENGTH, tokens=wanted, seed=0, warn=print)
    return loaded.model, rows, rows.batch(0, (steps + 1) * BATCH_ROWS)[0]


def distilled(folder: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Ours with a teacher beside the model: the dense one, in bfloat16."""
    import torch

    from adapt_pruner.checkpoint.load import load
    from adapt_pruner.train.objectives import distil

    teacher = load(options.pop("teacher")).model.to(torch.bfloat16).requires_grad_(False)
    return ours(folder, steps, options, objective=functools.partial(distil, teacher=teacher))


def ours(folder: str, steps: int, options: dict[str, Any], objective: Any = None) -> dict[str, Any]:
    from adapt_pruner.data.fixed import Fixed
    from adapt_pruner.train.kernels import kernels
    from adapt_pruner.train.loop import TrainConfig, TrainState, make_optimizer
    from adapt_pruner.train.loop import steps as training_steps
    from adapt_pruner.train.objectives import lm

    model, rows, ids = data(steps, folder)
    losses, times = [], []

    how = TrainConfig(
        objective=objective or lm, schedule=lambda share: 1.0, lr=LR, batch_rows=BATCH_ROWS, micro_tokens=ROWS * LENGTH
    )  # fmt: skip
    optimizer = make_optimizer(model, lr=LR, weight_decay=0.0)
    with kernels(model, liger=False, **options):
        for step in training_steps(model, Fixed(rows), optimizer, TrainState(), how, until=ids.shape[0]):
            step.take()
            losses.append(step.loss)
            times.append(time.perf_counter())
    return {"losses": losses, "seconds": times[-1] - times[0]}


def trainer(folder: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from adapt_pruner.core.model.precision import uses_bfloat16

    model, _, ids = data(steps, folder)
    losses, times = [], []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        asked = TrainingArguments(
            out, per_device_train_batch_size=ROWS, gradient_accumulation_steps=BATCH_ROWS // ROWS, max_steps=steps + 1,
            learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            bf16=uses_bfloat16(next(model.parameters()).device, "auto"), use_cpu=not torch.cuda.is_available(),
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            gradient_checkpointing=bool(options.get("gradient_checkpointing")), torch_compile=bool(options.get("compiled")),
        )  # fmt: skip
        items = [{"input_ids": row, "labels": row} for row in ids]
        InOrder(model=model, args=asked, train_dataset=items, callbacks=[Watch()]).train()
    return {"losses": losses, "seconds": times[-1] - times[0]}


def child(name: str, folder: str, steps: int, options: dict[str, Any]) -> None:
    told = {"ours": ours, "trainer": trainer, "distil": distilled}[name](folder, steps, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(told | {"tokens_per_second": steps * BATCH_ROWS * LENGTH / told["seconds"], "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--params", default="105M")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    options: dict[str, Any] = {"gradient_checkpointing": asked.gradient_checkpointing, "compiled": asked.compile}
    if asked.child:
        name, folder = asked.child
        child(name, folder, asked.steps, options | ({"teacher": asked.model} if name == "distil" else {}))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = str(Path(work) / "pruned")
        prune = [
            "prune",
            asked.model,
            "-o",
            folder,
            "--method",
            "adapt-pruner",
            "--params",
            asked.params,
            "--calibration-samples",
            "16",
            "--set",
            "step=0.3",
            "--set",
            "amplitude=0.1",
        ]
        subprocess.run([sys.executable, "-m", "adapt_pruner", *prune], check=True, stdout=subprocess.DEVNULL)
        told: dict[str, list[dict[str, Any]]] = {"trainer": [], "ours": [], "distil": []}
        flags = [
            flag for flag, on in (("--gradient-checkpointing", asked.gradient_checkpointing), ("--compile", asked.compile)) if on
        ]
        for number in range(asked.rounds):
            for name in told if number % 2 == 0 else reversed(told):
                words = [
                    sys.executable,
                    __file__,
                    "--steps",
                    str(asked.steps),
                    "--model",
                    asked.model,
                    *flags,
                    "--child",
                    name,
                    folder,
                ]
                said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
                told[name].append(json.loads(said.splitlines()[-1]))
                print(
                    f"round {number + 1}, {name}: {told[name][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True
                )
    speed = {name: sum(one["tokens_per_second"] for one in rounds) / len(rounds) for name, rounds in told.items()}
    peak = {name: max(one["peak"] for one in rounds) for name, rounds in told.items()}
    print(f"{'':10}{'tokens/s':>10}{'peak GiB':>10}{'first loss':>12}{'last loss':>12}")
    for name, rounds in told.items():
        first, last = rounds[0]["losses"][0], rounds[0]["losses"][asked.steps]
        print(f"{name:10}{speed[name]:10.0f}{peak[name] / 2**30:10.2f}{first:12.4f}{last:12.4f}")
    print(
        f"ours / trainer: {speed['ours'] / speed['trainer']:.2f} x the speed, {peak['ours'] / peak['trainer']:.2f} x the memory"
    )


if __name__ == "__main__":
    main()
