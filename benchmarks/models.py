"""What may shrink in every causal LM of transformers whose modules follow the naming of Llama, tried on tiny models: docs/models.md.

    python benchmarks/models.py

It tries each type in turn (a second or two each) and writes src/adapt_pruner/families/checked.json, which `adapt-pruner models` prints, and the
table of docs/models.md.
"""

import argparse
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapt_pruner import families
from adapt_pruner.checkpoint.save import can_save_unequal_layers
from adapt_pruner.families import admission

ROOT = Path(__file__).parent.parent
FILE = ROOT / "src" / "adapt_pruner" / "families" / "checked.json"
PAGE = ROOT / "docs" / "models.md"
DEFAULTS: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128}, "ministral": {"head_dim": 128}, "nemotron": {"num_key_value_heads": 8},
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
    rows = {kind: row for kind in types if (row := tried(kind))}
    data = {"transformers": version("transformers"), "types": rows}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index("| type |"), page.index("\n\n", page.index("| type |"))
    PAGE.write_text(page[:start] + table(rows) + page[end:], encoding="utf-8")
    print(
        f"{len(rows)} types; {sum({'neurons', 'kv_heads'} <= set(row['axes']) for row in rows.values())} with neurons and heads"
    )


def tried(kind: str) -> dict[str, Any] | None:
    """What may shrink in a type; None if nothing may."""
    try:
        config = AutoConfig.for_model(kind, **DEFAULTS.get(kind, {}))
        verdict = admission.verdict_of(config)
        if not verdict.admitted:
            return None
        tiny = admission.tiny_model(admission.shrunk(config))
        unequal = can_save_unequal_layers(tiny)
    except Exception:  # a type that needs a package or a field which is not here
        return None
    stays = {axis: why for axis, why in verdict.refused.items() if axis != "all"}
    if families.family_of(config) is None:
        return {"axes": list(verdict.admitted), "stays": stays, "unequal": unequal}
    kinds = {axis.kind for axis in families.axes(tiny)}
    return {"axes": [kind for kind in admission.KINDS if kind in kinds], "stays": {}, "unequal": unequal}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| type | may shrink | layers of unequal size |", "|---|---|---|"]
    for kind, row in rows.items():
        lines.append(f"| `{kind}` | {', '.join(row['axes'])} | {'yes' if row['unequal'] else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
