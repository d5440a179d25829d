"""Run in a process of its own: one model in one engine, which reads prompts and writes tokens when it is asked to.

    python -P -m adapt_pruner.compare.worker '{"engine": "torch", "model": …, "threads": …, "rows": …, "tokens": …, …}'

First it says, as a line of JSON, how long the model took to load and what it is, or what went wrong. Then each line on stdin is a
question, {"batch": b, "prompt": p, "generate": n, "vocabulary": v}. The answer is a line with seconds and the memory held so far.

Loading ends with the first logit, because engines map files into memory and read them when first needed. The engine's own library
is imported before loading begins.
"""

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.memory import peak_bytes, peak_rss_bytes
from adapt_pruner.errors import RunError, UsageError, first_line

Runner = Callable[[Sequence[Sequence[int]], int], tuple[float, float]]
"""rows of token ids of one length, n -> seconds to read them, and to write n more tokens in each row."""


def torch_runner(how: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """A model in torch, with weights in the requested precision, and facts about it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (imported before the clock starts)

    from adapt_pruner.checkpoint.load import load, pick_device
    from adapt_pruner.core.model.precision import uses_bfloat16
    from adapt_pruner.evaluate.speed import reading_and_writing
    from adapt_pruner.run.estimate import shapes

    torch.set_num_threads(how["threads"])
    device = pick_device(how["device"])
    dtype = torch.bfloat16 if uses_bfloat16(device, how["dtype"]) else torch.float32
    began = time.perf_counter()
    loaded = load(how["model"], device=device, dtype=dtype, trust_remote_code=how["trust"])
    model = loaded.model.requires_grad_(False)

    def run(rows: Sequence[Sequence[int]], count: int) -> tuple[float, float]:
        return reading_and_writing(model, torch.tensor(rows), count)

    run([[1]], 0)
    return run, {
        "engine": f"torch {torch.__version__}", "stored": str(dtype).removeprefix("torch."), "load_seconds": time.perf_counter() - began,
        "disk_bytes": loaded.weight_bytes, "weight": dtype.itemsize, "shapes": vars(shapes(model)), "device": str(device),
        "peak": lambda: peak_bytes(model),
    }  # fmt: skip


def llama_cpp_runner(how: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """A GGUF file in llama.cpp on the CPU, through its own functions, because the class `Llama` cannot run several rows."""
    import numpy as np

    from adapt_pruner.export import llama_cpp

    module, messages = llama_cpp.library()
    began = time.perf_counter()
    module.llama_backend_init()
    placed = module.llama_model_default_params()
    placed.n_gpu_layers = 0
    model = module.llama_model_load_from_file(how["model"].encode(), placed)
    if not model:
        raise RunError(
            f"llama.cpp cannot load {how['model']}: {'; '.join(messages[-2:]) or 'it does not say why'}; export it again"
        )
    room = module.llama_context_default_params()
    most = how["rows"] * how["tokens"]
    room.n_ctx, room.n_seq_max, room.n_batch = most, how["rows"], most
    room.n_threads = room.n_threads_batch = how["threads"]
    context = module.llama_init_from_model(model, room)
    if not context:
        raise RunError(
            f"llama.cpp has no room for {most:,} tokens ({'; '.join(messages[-2:])}); ask for fewer texts or a shorter prompt"
        )
    vocabulary = module.llama_vocab_n_tokens(module.llama_model_get_vocab(model))
    batch = module.llama_batch_init(most, 0, 1)

    def decode(rows: Sequence[Sequence[int]], position: int) -> list[int]:
        """Append `rows` to the cache; returns the token with the highest logit after each row."""
        batch.n_tokens = 0
        ends = []
        for row_idx, row in enumerate(rows):
            for offset, token in enumerate(row):
                i = batch.n_tokens
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + offset, 1
                batch.seq_id[i][0], batch.logits[i] = row_idx, offset == len(row) - 1
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        if module.llama_decode(context, batch):
            raise RunError(
                f"llama.cpp could not read {batch.n_tokens:,} tokens: {'; '.join(messages[-2:]) or 'it does not say why'}"
            )
        module.llama_synchronize(context)
        logits = (module.llama_get_logits_ith(context, end) for end in ends)
        return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in logits]

    def run(rows: Sequence[Sequence[int]], count: int) -> tuple[float, float]:
        module.llama_memory_clear(module.llama_get_memory(context), True)
        start = time.perf_counter()
        following = decode(rows, 0)
        middle = time.perf_counter()
        for position in range(len(rows[0]), len(rows[0]) + count):
            following = decode([[token] for token in following], position)
        return middle - start, time.perf_counter() - middle

    run([[1]], 0)
    text = ctypes.create_string_buffer(64)
    module.llama_model_meta_val_str(model, b"general.file_type", text, len(text))
    kind = text.value.decode()
    stored = next((name for name, value in llama_cpp.file_types(module).items() if str(value) == kind), "f32")
    return run, {
        "engine": f"llama.cpp through llama-cpp-python {module.__version__}", "stored": stored, "load_seconds": time.perf_counter() - began,
        "disk_bytes": Path(how["model"]).stat().st_size, "device": "cpu", "peak": peak_rss_bytes,
    }  # fmt: skip


def main() -> None:
    """Answer questions until stdin ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what libraries print out of the answers

    def answer(data: object) -> None:
        out.write(json.dumps(data).encode() + b"\n")
        out.flush()

    how = json.loads(sys.argv[1])
    try:
        run, facts = (torch_runner if how["engine"] == "torch" else llama_cpp_runner)(how)
        peak = facts.pop("peak")
        answer(facts | {"peak_bytes": peak()})
        for line in sys.stdin:
            question = json.loads(line)
            draw = random.Random(0)
            rows = [[draw.randrange(question["vocabulary"]) for _ in range(question["prompt"])] for _ in range(question["batch"])]
            prefill, decode = run(rows, question["generate"])
            answer({"prefill": prefill, "decode": decode, "peak_bytes": peak()})
    except (UsageError, RunError) as error:
        answer({"error": str(error), "usage": isinstance(error, UsageError)})
    except Exception as error:
        answer({"error": f"{how['engine']} failed on {how['model']}: {first_line(error)}", "usage": False})


if __name__ == "__main__":
    main()
