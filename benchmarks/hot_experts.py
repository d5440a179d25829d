"""Time, peak memory and hits of a model whose experts are read as routers choose them, against reading layers and against memory.

    python benchmarks/hot_experts.py [--model DIR] [--tokens 64] [--folder DIR] [--rate MB] [--no-guesses]

The model writes `--tokens` tokens, greedily, in one process for each way:

    memory    all weights in memory
    layers    each layer is read whole when it is due
    1 … 0     experts are read as they are chosen; this share of all experts may stay in memory

Without --model a random Qwen3-MoE of 8 layers with 32 experts is made, which takes 0.3 GB; the routers of a trained model choose less
evenly, and so hit more. `--rate` slows the reading of experts to so many megabytes a second, as from a slower disk, and `--no-guesses`
reads none for the next layer. One JSON line for each way.
"""

import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load_that_fits, locate
from adapt_pruner.core.model import hot_experts
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.memory import peak_rss_bytes
from adapt_pruner.core.system.strict_json import to_json

WAYS = ("memory", "layers", "1", "0.5", "0.25", "0")
PROMPT = "The history of the city begins with a river, a bridge and a market"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "hot-experts")
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process")
    parser.add_argument("--rate", type=float, help="megabytes a second")
    parser.add_argument("--no-guesses", action="store_true")
    args = parser.parse_args()
    if args.rate is not None:
        slowed(args.rate * 1e6)
    if args.no_guesses:
        setattr(hot_experts._Layer, "likely", lambda layer, states, number: [])  # noqa: B010
    model = args.model or str(made(args.folder / "model"))
    if args.way is not None:
        print(to_json(figures(model, args.way, tokens=args.tokens)), flush=True)
        return
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--model", model, "--way", way]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def slowed(rate: float) -> None:
    """Reading an expert takes as long as from a disk that gives `rate` bytes a second."""
    read = hot_experts.Hot._read

    def slow(hot: hot_experts.Hot, key: tuple[str, int]) -> torch.Tensor:
        began = time.perf_counter()
        numbers = read(hot, key)
        time.sleep(max(0.0, numbers.nbytes / rate - (time.perf_counter() - began)))
        return numbers

    setattr(hot_experts.Hot, "_read", slow)  # noqa: B010


def made(folder: Path) -> Path:
    """A random Qwen3-MoE in bfloat16, with the tokenizer of a packaged model."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(
            locate("smollm2-135m-instruct")[0], gguf_file=locate("smollm2-135m-instruct")[1]
        )
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
            moe_intermediate_size=384, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True, tie_word_embeddings=True, dtype="bfloat16",
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def figures(name: str, way: str, *, tokens: int) -> dict[str, object]:
    """What writing took."""
    began = time.perf_counter()
    loaded = load_that_fits(name, dtype=None, offload="none" if way == "memory" else "disk", only_read=True)
    model, axes = loaded.model, families.declared(loaded.model)
    weights = dict(model.named_parameters())
    experts = {piece.parameter for axis in axes if axis.per_token for piece in axis.slices}
    held = sum(weights[name].numel() for name in experts) * loaded.dtype.itemsize
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    reading = nullcontext() if way in ("memory", "layers") else hot_experts.one_by_one(model, axes, room=int(float(way) * held))
    ready = time.perf_counter()
    with reading as hot:
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    spent = time.perf_counter() - ready
    counted = {} if hot is None else hot.figures()
    return {
        "way": way, "load_seconds": ready - began, "seconds": spent, "tokens_per_second": tokens / spent,
        "peak_rss_bytes": peak_rss_bytes(), "experts_bytes": held, **counted,
    }  # fmt: skip


if __name__ == "__main__":
    main()
