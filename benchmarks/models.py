"""What may shrink in every causal LM of transformers whose modules have names that are known, tried on tiny models: docs/models.md.

    python benchmarks/models.py

It tries each type in turn (a second or two each) and writes src/adapt_pruner/families/checked.json, which `adapt-pruner models` prints, and the
table of docs/models.md. A tiny model of each type that `export --to gguf` can write is exported and verified in llama.cpp. The cache folder
keeps what was found, so that a second run goes on where the first was stopped.
"""

import argparse
import json
import tempfile
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import can_save_unequal_layers, save
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.strict_json import remembered
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from adapt_pruner.export.loading import GGUF_TYPES
from adapt_pruner.export.verify import prove
from adapt_pruner.families import admission

ROOT = Path(__file__).parent.parent
FILE = ROOT / "src" / "adapt_pruner" / "families" / "checked.json"
PAGE = ROOT / "docs" / "models.md"
TOKENIZER = "smollm2-135m-instruct"  # whose tokenizer the tiny models for llama.cpp have
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}, "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "ministral": {"head_dim": 128}, "mistral": {"sliding_window": None}, "nemotron": {"num_key_value_heads": 8},
    "qwen3_moe": {"norm_topk_prob": True},
}  # fmt: skip
"""Fields that real configs of a type have and its config class leaves out."""


def main() -> None:
    """Try every type and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; by default all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    types = sorted(options.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = {}
    for kind in types:
        row, _ = remembered(cache_folder() / "models" / f"{kind}-{admission.code()}.json", dict, partial(tried, kind))
        if row:
            rows[kind] = row
    data = {"transformers": version("transformers"), "types": rows}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index("| type |"), page.index("\n\n", page.index("| type |"))
    PAGE.write_text(page[:start] + table(rows) + page[end:], encoding="utf-8")
    print(
        f"{len(rows)} types; {sum({'neurons', 'kv_heads'} <= set(row['axes']) for row in rows.values())} with neurons and heads"
    )


def tried(kind: str) -> dict[str, Any]:
    """What may shrink in a type; nothing if nothing may."""
    try:
        config = AutoConfig.for_model(kind, **DEFAULTS.get(kind, {}))
        verdict = admission.verdict_of(config)
        if not verdict.admitted:
            return {}
        tiny = admission.tiny_model(admission.shrunk(config))
        unequal = can_save_unequal_layers(tiny)
    except Exception:  # a type that needs a package or a field which is not here
        return {}
    stays = {axis: why for axis, why in verdict.refused.items() if axis != "all"}
    found = {"unequal": unequal, "gguf": kind in GGUF_TYPES and in_llama_cpp(kind)}
    if families.family_of(config) is None:
        return {"axes": list(verdict.admitted), "stays": stays, **found}
    kinds = {axis.kind for axis in families.axes(tiny)}
    return {"axes": [kind for kind in admission.KINDS if kind in kinds], "stays": {}, **found}


def in_llama_cpp(kind: str) -> bool:
    """Whether a tiny model of a type, written as GGUF, computes in llama.cpp what it computes in torch, as `adapt-pruner verify` finds."""
    tokenizer = load(TOKENIZER).tokenizer
    config = admission.shrunk(AutoConfig.for_model(kind, **DEFAULTS.get(kind, {})))
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), True
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = config.head_dim  # as in the models of this type that llama.cpp reads
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place, "tiny"), Path(place, "tiny.gguf")
        save(admission.tiny_model(config).float(), tokenizer, folder, dtype=torch.float32)
        try:
            export(load(str(folder)), file, to="gguf")
        except UsageError:
            return False
        return bool(prove(str(folder), file, text=str(ROOT / "README.md"), window=64, max_windows=2)["passed"])


def said(holds: bool) -> str:
    """A yes or a no."""
    return "yes" if holds else "no"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| type | may shrink | layers of unequal size | GGUF |", "|---|---|---|---|"]
    for kind, row in rows.items():
        lines.append(f"| `{kind}` | {', '.join(row['axes'])} | {said(row['unequal'])} | {said(row['gguf'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
