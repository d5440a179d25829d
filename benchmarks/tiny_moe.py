"""A tiny Qwen3-MoE and a dense Qwen3 of equal active size, trained on the same text: a test bed for removing experts.

    python benchmarks/tiny_moe.py [--folder DIR] [--tokens 3M] [--train SPEC --heldout SPEC]

DIR (default: the cache folder's `tiny-moe`) gets `moe/` and `dense/`, folders that transformers loads, and `tiny_moe.json`: parameters,
held-out loss, and how often each expert of each layer is used. Text and tokenizer are those of benchmarks/ladder. The command may be
stopped at any moment: the same command goes on. Both models take about half an hour of one core each.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.model.cut import num_active
from adapt_pruner.core.system.files import cache_folder, write_whole
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.fixed import Fixed, training_rows
from adapt_pruner.data.sources import texts
from adapt_pruner.data.tokens import evaluation_windows
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.experts import usage, used
from adapt_pruner.train.loop import TrainConfig, TrainState, make_optimizer, steps
from adapt_pruner.train.schedules import wsd

sys.path.insert(0, str(Path(__file__).parent / "ladder"))
from jobs import Ladder

SHAPE = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
}
RUNG, LENGTH, BATCH_ROWS, LR, SECONDS = "corpus", 256, 8, 4e-3, 120  # seconds between checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "tiny-moe")
    parser.add_argument("--tokens", type=parse_count, default=parse_count("3M"))
    parser.add_argument("--train", help="SPEC of the training text; read once, when the folder is new")
    parser.add_argument("--heldout", help="SPEC of the text that is held out")
    args = parser.parse_args()
    specs = {"train": args.train, "heldout": args.heldout} if args.train and args.heldout else None
    ladder = Ladder(args.folder, text=specs)
    ladder.table["rungs"][RUNG] = ladder.table["rungs"]["S"] | {"base_tokens": str(args.tokens)}
    ladder.prepare(RUNG)
    tokenizer = AutoTokenizer.from_pretrained(ladder.home(RUNG) / "tokenizer")
    shape = SHAPE | {"vocab_size": len(tokenizer)}
    makers: dict[str, Callable[[], Any]] = {
        "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **EXPERTS)),
        "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
    }
    figures: dict[str, Any] = {}
    for name, make in makers.items():
        folder, state = args.folder / name, args.folder / f"{name}.pt"
        if not folder.exists():
            torch.manual_seed(0)
            model = make()
            trained(model, state, tokenizer, str(ladder.home(RUNG) / "text" / "train.jsonl"), args.tokens)
            whole = args.folder / f"{name}.new"
            tokenizer.save_pretrained(whole)
            model.save_pretrained(whole)
            whole.rename(folder)
            state.unlink(missing_ok=True)
        figures[name] = ladder.measured(RUNG, folder) | experts_of(folder, str(ladder.home(RUNG) / "text" / "heldout.jsonl"))
        print(name, {key: value for key, value in figures[name].items() if key != "used"}, flush=True)
    write_whole(args.folder / "tiny_moe.json", to_json(figures) + "\n")


def experts_of(folder: Path, text: str) -> dict[str, Any]:
    """Active parameters of a model; `used`, the share of held-out tokens that go to each expert of each layer; the least spread of a layer."""
    loaded = load(str(folder))
    axes = families.axes(loaded.model)
    active = {"active_params": num_active(loaded.model, axes)}
    routed = [axis for axis in axes if axis.kind == "experts"]
    if not routed:
        return active
    windows = list(evaluation_windows(loaded.tokenizer, texts(text), window=LENGTH, max_windows=128))
    shares, _ = score(loaded.model, axes, torch.cat(windows).split(BATCH_ROWS), metrics=[usage], dtype="float32")
    by_layer = [sorted(shares[used(axis)].tolist(), reverse=True) for axis in routed]
    return active | {"used": by_layer, "busiest_to_least": [layer[0] / max(layer[-1], 1e-9) for layer in by_layer]}


def trained(model: nn.Module, state: Path, tokenizer: Any, text: str, tokens: int) -> None:
    """Train a model, in place, from where `state` says that it stands."""
    rows = training_rows(tokenizer, text, length=LENGTH, tokens=tokens, seed=0, warn=print)
    feed, progress = Fixed(rows), TrainState()
    optimizer = make_optimizer(model, lr=LR, weight_decay=0.0, betas=(0.9, 0.95))
    if state.exists():
        kept: Mapping[str, Any] = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        progress = TrainState(**kept["progress"])
        feed.skip_to(progress.tokens)
    how = TrainConfig(
        objective=balanced, schedule=partial(wsd, warmup=0.05, decay=0.2, floor=0.0), lr=LR, batch_rows=BATCH_ROWS, dtype="float32",
        micro_tokens=BATCH_ROWS * LENGTH,
    )  # fmt: skip
    saved = began = time.monotonic()
    for step in steps(model, feed, optimizer, progress, how, until=len(rows)):
        step.take()
        if step.step % 20 == 0:
            print(f"{state.stem} {step.tokens:,} of {tokens:,}: {step.loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() - saved > SECONDS:
            whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
            torch.save(whole, state.with_suffix(".new"))
            state.with_suffix(".new").rename(state)
            saved = time.monotonic()


def balanced(model: Any, ids: Tensor, predicted: Tensor | None = None) -> Tensor:
    """The sum of the next-token cross-entropy and, of a model with experts, of the loss that balances them."""
    options = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    loss: Tensor = model(ids, labels=ids, **options).loss
    return loss * ids[:, 1:].numel()


if __name__ == "__main__":
    main()
