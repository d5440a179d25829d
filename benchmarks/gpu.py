"""What only a card can show, in nine minutes on a bare machine with one: the law, the masks, pruning and training at 8B width, and the memory foreseen.

    make gpu                                         writes build/gpu.json and prints a table
    python benchmarks/gpu.py --device cpu --small    the same on tiny models, in seconds

It takes the torch that is there, installs nothing and needs no network. The law: logits of gated and of cut models in float64. Masks: the same
methods on the CPU and on the device. 8B width: three random layers of Llama 3's, pruned in memory and from disk and trained by our loop and by
transformers' Trainer, 4,096 tokens a step; memory is the most that torch's allocator held on the card, beside what the dry run foresees. A row fails if its
claim does not hold, or if its memory is off by more than a tenth. What this version or this machine cannot do is left out, with the reason.
"""

import argparse
import copy
import gc
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 540
WAYS: dict[str, dict[str, Any]] = {"in memory": {}, "from disk": {"offload": "disk"}}
TRAININGS: dict[str, dict[str, Any]] = {
    "AdamW": {}, "8-bit moments": {"training.optimizer": "adamw8bit"}, "LoRA": {"training.lora": {"rank": 16, "alpha": 32}},
}  # fmt: skip
WIDTH = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
    "num_hidden_layers": 3,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 288,
    "num_hidden_layers": 2,
}  # fmt: skip
BETWEEN = SMALL | {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6,
}  # fmt: skip
CALIBRATION: dict[str, Any] = {
    "calibration.source": "python-docs:train", "calibration.samples": 8, "calibration.length": 64, "calibration.self_generated": 0,
    "step": 0.5,
}  # fmt: skip


@dataclass
class Row:
    """What was tried and found; `left_out` says why nothing was."""

    part: str
    what: str
    holds: bool | None = None
    found: str = ""
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    foreseen_bytes: int | None = None
    left_out: str = ""


class Late(BaseException):
    """The time is over; no library takes it for a failure of its own."""


def missing() -> list[str]:
    """The packages that adapt-pruner needs and this Python does not have."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    modules = {re.split(r"[><=]", package)[0]: package for package in needed}
    return [package for name, package in modules.items() if importlib.util.find_spec({"pyyaml": "yaml"}.get(name, name)) is None]


def law(device: str, most: int) -> Iterator[Row]:
    """The gap between gated and cut models of every family."""
    import torch

    from adapt_pruner import families
    from adapt_pruner.core.model.cut import cut, gated
    from adapt_pruner.families import admission

    layouts = [
        (name, config)
        for family in families.all_families()
        if not hasattr(family, "TASK")
        for name, config in family.tiny().items()
    ]
    for name, config in [layout for layout in layouts if not layout[1].is_heterogeneous][:most]:
        model = admission.tiny_model(config).to(device)
        axes = [axis for axis in families.axes(model) if axis.kind != "vocabulary"]
        mask, ids = admission.random_mask(axes, seed=0), torch.arange(3, 35, device=device).view(2, 16)
        smaller = copy.deepcopy(model)
        with torch.no_grad(), admission.Wide():
            with gated(model, axes, mask):
                shut = model(ids).logits
            cut(smaller, axes, mask)
            gap = float((smaller(ids).logits - shut).abs().max())
        yield Row("law", name, gap <= 1e-9, f"gap {gap:.1e}")


def masks(folder: Path, device: str, methods: tuple[str, ...]) -> Iterator[Row]:
    """The share of units that both devices keep or both remove."""
    import adapt_pruner as ap

    for method in methods:
        here, there = (
            ap.prune(_recipe(folder, on, method, params="70%", dtype="float32", **CALIBRATION)).mask.kept
            for on in ("cpu", device)
        )
        same = sum(int((here[axis] == there[axis]).sum()) for axis in here) / sum(keep.numel() for keep in here.values())
        yield Row("masks", f"{method}, cpu and {device}", same >= 0.99, f"{same:.2%} alike")


def pruned(folder: Path, device: str) -> Iterator[Row]:
    """In memory, and from disk."""
    kept = {}
    for where, settings in WAYS.items():
        recipe = partial(_recipe, folder, device, "adapt-pruner", params="80%", **CALIBRATION, **settings)
        row, result = _measured(Row("prune", where), recipe, device, optional=bool(settings))
        if result is not None:
            kept[where] = result.mask
            if len(kept) == 2:
                row.holds = row.holds is not False and kept["in memory"] == kept["from disk"]
                row.found = "the mask of memory" if kept["in memory"] == kept["from disk"] else "another mask than in memory"
        yield row


def trained(folder: Path, device: str, steps: int) -> Iterator[Row]:
    """By our loop, in three ways, and by Trainer."""
    import torch
    from train_speed import BATCH_ROWS, LENGTH, ROWS, trainer

    tokens = BATCH_ROWS * LENGTH
    training: dict[str, Any] = {
        "training.source": "python-docs:train", "training.tokens": (steps + 1) * tokens, "training.length": LENGTH,
        "training.batch_tokens": tokens, "training.micro_batch_tokens": ROWS * LENGTH,
    }  # fmt: skip
    for name, settings in TRAININGS.items():
        times: list[float] = []
        recipe = partial(_recipe, folder, device, "adapt-pruner", params="99%", **CALIBRATION, **training, **settings)
        row, _ = _measured(Row("train", f"ours, {name}"), recipe, device, optional=bool(settings), steps=times)
        if len(times) > 1:
            row.tokens_per_second = (len(times) - 1) * tokens / (times[-1] - times[0])
        yield row
    _fresh(device)
    began = time.perf_counter()
    told = trainer(str(folder), steps, {})
    yield Row(
        "train", "transformers' Trainer, AdamW", seconds=time.perf_counter() - began, tokens_per_second=steps * tokens / told["seconds"],
        peak_bytes=None if device == "cpu" else torch.cuda.max_memory_reserved(),
    )  # fmt: skip


def _recipe(folder: Path, device: str, method: str, *, params: str, dtype: str = "auto", **settings: Any) -> Any:
    from adapt_pruner import recipe

    values = {"model": str(folder), "device": device, "method": method, "budget": params, "dtype": dtype}
    return recipe.read({}, values=values | settings)


def _measured(
    row: Row, read: Callable[[], Any], device: str, *, optional: bool, steps: list[float] | None = None
) -> tuple[Row, Any]:
    """The row with time and memory of a run, and its result; None if it is optional and this version or machine cannot do it."""
    import torch

    import adapt_pruner as ap
    from adapt_pruner.errors import UsageError

    def heard(event: dict[str, Any]) -> None:
        if steps is not None and event["event"] == "step":
            steps.append(time.perf_counter())

    try:
        recipe = read()
        foreseen = ap.dry_run(recipe)["peak_bytes"]
        _fresh(device)
        began = time.perf_counter()
        result = ap.prune(recipe, listen=heard)
    except UsageError as error:
        if not optional:
            raise
        row.left_out = str(error)
        return row, None
    row.seconds = time.perf_counter() - began
    if device != "cpu":
        row.peak_bytes, row.foreseen_bytes = torch.cuda.max_memory_reserved(), foreseen
        row.holds = abs(row.peak_bytes / foreseen - 1) <= 0.1
    return row, result


def _fresh(device: str) -> None:
    """Free the card and forget how much of it was held."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def made(folder: Path, config: dict[str, Any], device: str) -> Path:
    """The folder of a random Llama in bfloat16, whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=2048)).bfloat16().save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def in_time(parts: dict[str, Callable[[], Iterator[Row]]]) -> list[Row]:
    """What the parts find until the time is over; one that fails leaves the others."""

    def late(*_: object) -> None:
        raise Late

    rows: list[Row] = []
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        for part, tried in parts.items():
            try:
                with redirect_stdout(sys.stderr):  # what Trainer prints
                    for row in tried():
                        rows.append(row)
                        print(f"{part}: {row.what}", flush=True)
            except Exception as error:
                rows.append(Row(part, "broken off", False, f"{type(error).__name__}: {error}".partition("\n")[0]))
    except Late:
        rows.append(Row(part, "not finished", left_out=f"the {SECONDS} seconds are over"))
    finally:
        signal.alarm(0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, two steps")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "gpu.json")
    options = parser.parse_args()
    if lacking := missing():
        sys.exit(
            f"{sys.executable} lacks {', '.join(lacking)}; install these and try again, or name another Python: make gpu PYTHON=…"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        "" if options.device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    )  # for Trainer
    sys.path.insert(0, str(ROOT / "src"))
    import torch

    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.system.files import write_whole

    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA card; on a machine without one, try: --device cpu --small")
    device, small = options.device, options.small
    card = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    began, methods = time.perf_counter(), ("adapt-pruner",) if small else ("adapt-pruner", "flap", "adaptive-ls-v1")
    with tempfile.TemporaryDirectory() as place:
        wide, between = Path(place, "wide"), Path(place, "between")
        rows = in_time({
            "law": lambda: law(device, 2 if small else 100),
            "masks": lambda: masks(made(between, SMALL if small else BETWEEN, "cpu"), device, methods),
            "prune": lambda: pruned(made(wide, SMALL if small else WIDTH, device), device),
            "train": lambda: trained(wide, device, 1 if small else 8),
        })  # fmt: skip
    figures = {"card": card, "torch": torch.__version__, "seconds": time.perf_counter() - began, "rows": list(map(asdict, rows))}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, json.dumps(figures, indent=1) + "\n")
    print_table(["part", "what", "", "seconds", "tokens/s", "peak GiB", "foreseen"], [_cells(row) for row in rows], left=3)
    print(f"\n{card}, torch {torch.__version__}, {figures['seconds']:.0f} s; {options.output}")
    sys.exit(any(row.holds is False for row in rows))


def _cells(row: Row) -> list[str]:
    verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
    gib = ["" if size is None else f"{size / 2**30:.2f}" for size in (row.peak_bytes, row.foreseen_bytes)]
    figures = [
        "" if value is None else f"{value:,.{digits}f}" for value, digits in ((row.seconds, 1), (row.tokens_per_second, 0))
    ]
    words = [verdict, row.found, row.left_out and f"left out: {row.left_out}"]
    return [row.part, row.what, " ".join(filter(None, words)), *figures, *gib]


if __name__ == "__main__":
    main()
