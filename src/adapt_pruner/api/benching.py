"""`bench`, which only the command line has: how fast a pruned model runs beside the dense one in the same engine."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from adapt_pruner.api.arguments import Takes
from adapt_pruner.core.events import Listener, Warned
from adapt_pruner.errors import UsageError, nearest, option

_ENGINES = ("torch", "llama.cpp")
_MOST_ROWS = 2**16
Tokens = Annotated[int, Takes("a number of tokens", None, int, least=1, most=2**17)]


def bench(
    model: str,
    *,
    against: Annotated[str, Takes("a model", "MODEL")],
    engine: str = "torch",
    batch: Annotated[str, Takes("batch sizes", "N,N")] = "1,8",
    prompt: Tokens = 512,
    generate: Tokens = 64,
    rounds: Annotated[int, Takes("a number of rounds", None, int, least=1, most=1000)] = 5,
    quant: Annotated[str, Takes("a type", "TYPE")] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """How fast `model` runs beside the dense one, in tokens per second, and what share of the ideal speed-up that is.

    Args:
        model: folder, .gguf file, hub id or packaged name.
        against: the dense model, in any of the same forms.
        engine: torch or llama.cpp. llama.cpp runs GGUF files; a folder is exported to one first.
        batch: batch sizes to measure, with commas.
        prompt: tokens per prompt.
        generate: tokens to write after the prompt.
        rounds: measurements of each model, in turn, after one warm-up.
        quant: for llama.cpp: number format to export folders in; as stored by default.
        device: device to run on, for torch: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of weights in torch: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        trust_remote_code: run Python code that comes with a folder.
        listen: called with an event for every round.

    Returns:
        `engine`, `device`, `threads` and what was asked; `models`, the figures of each, the pruned one first; `speeds`, the rows of
        `turns.speeds` for each batch.

    Raises:
        UsageError: the request cannot be met.
        RunError: an engine fails on a model.
    """
    from adapt_pruner.recipe import check_precision

    check_precision(dtype)
    batches = [int(number) if number.strip().isdecimal() and len(number) < 20 else 0 for number in batch.split(",")]
    if not all(1 <= count <= _MOST_ROWS for count in batches):
        raise UsageError(f"{option('batch')} {batch!r} is not a list of batch sizes from 1 to {_MOST_ROWS:,}; write it like 1,8")
    if engine not in _ENGINES:
        raise UsageError(f"engine {engine!r} is not known; {nearest(engine, _ENGINES)}")
    if engine == "torch" and quant is not None:
        raise UsageError(
            f"{option('quant', quant)} applies only to {option('engine', 'llama.cpp')}; torch has no such weights, so leave it out"
        )
    if engine == "llama.cpp" and device not in ("auto", "cpu"):
        raise UsageError(f"llama.cpp is measured on the CPU, not on {device!r}; leave {option('device')} out")
    if engine == "llama.cpp" and dtype != "auto":
        raise UsageError(
            f"{option('dtype', dtype)} applies only to {option('engine', 'torch')}; for llama.cpp give {option('quant', 'f32')}, f16, bf16, …"
        )
    if quant is not None and Path(model).is_file() and Path(against).is_file():
        raise UsageError(
            f"{option('quant', quant)} applies only to models that bench exports, and both are .gguf files already; leave it out"
        )
    import torch  # only after everything that can be refused without it

    from adapt_pruner.compare.ideal import of_gguf, of_torch
    from adapt_pruner.compare.turns import Spread, as_gguf, loaded_in_turn, speeds

    threads = torch.get_num_threads()
    how = {
        "engine": engine, "threads": threads, "rows": max(batches), "tokens": prompt + generate, "device": device, "dtype": dtype,
        "trust": trust_remote_code,
    }  # fmt: skip
    with ExitStack() as stack:
        paths = [model, against]
        if engine == "llama.cpp":
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adapt-pruner-bench-")))
            files = [folder / "pruned.gguf", folder / "dense.gguf"]
            paths = [as_gguf(*pair, quant, trust_remote_code, listen) for pair in zip(paths, files, strict=True)]
        workers, loads = loaded_in_turn(paths, how, stack, listen)
        facts = [worker.facts for worker in workers]
        weights = [of_torch(fact) for fact in facts] if engine == "torch" else [of_gguf(Path(path)) for path in paths]
        size: dict[str, Any] = {"prompt": prompt, "generate": generate, "rounds": rounds}
        rows = [row for count in batches for row in speeds(workers, weights, batch=count, listen=listen, **size)]
    if facts[0]["stored"] != facts[1]["stored"]:
        message = (
            f"{model} is stored in {facts[0]['stored']} and {against} in {facts[1]['stored']}, so the speed-ups do not come from "
            "pruning alone"
        )
        listen(Warned(message=message))
    models = [
        {
            "model": name, "params": held.shapes.params, "stored": fact["stored"], "disk_bytes": fact["disk_bytes"],
            "load_seconds": asdict(Spread.of(seconds)), "peak_bytes": fact["peak_bytes"],
        }
        for name, held, fact, seconds in zip((model, against), weights, facts, loads, strict=True)
    ]  # fmt: skip
    return {
        "engine": facts[0]["engine"],
        "device": facts[0]["device"],
        "threads": threads,
        **size,
        "models": models,
        "speeds": rows,
    }
