"""`block_configs` of DeciLM and of Puzzletron are read as `per_layer_config`, without running the code that comes along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from conftest import VOCAB, byte_tokenizer, half, read_json, tiny_model
from test_checkpoint import pruned

IDS = torch.arange(3, 27)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_an_export_to_decilm_is_read_back_and_pruned_further(tmp_path: Path) -> None:
    model, _ = pruned(("llama", "llama"), kinds=("kv_heads", "neurons"))
    export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "tiny", 0), tmp_path / "decilm", to="decilm")
    (tmp_path / "decilm" / "modeling_decilm.py").write_text("raise SystemExit")
    found = load(str(tmp_path / "decilm")).model
    assert torch.allclose(logits(found), logits(model), atol=1e-5)
    axes = families.axes(found)
    assert {axis.size for axis in axes if axis.kind == "neurons"} == {256}
    heads = ({axis.name: axis.size for axis in of if axis.kind == "kv_heads"} for of in (axes, families.axes(model)))
    assert next(heads) == next(heads)
    cut(found, axes, half(axes))
    save(found, byte_tokenizer(), tmp_path / "smaller", dtype=torch.float32)
    assert torch.equal(logits(load(str(tmp_path / "smaller")).model), logits(found))


def puzzle(folder: Path, **changes: Any) -> Any:
    """A model of unequal layers, two of which lack a block, in a folder as Puzzletron writes one."""
    model = tiny_model(vocab_size=VOCAB)
    axes = families.axes(model)
    neurons = {axis.name: torch.arange(axis.size) >= 3 * (axis.layer or 0) for axis in axes if axis.kind == "neurons"}
    cut(model, axes, Mask(neurons | {"layers.0.attentions": torch.tensor([False]), "layers.1.mlps": torch.tensor([False])}))
    save(model, byte_tokenizer(), folder, dtype=torch.float32)
    config = read_json(folder / "config.json")
    for key in ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map"):
        config.pop(key, None)
    blocks = [
        {"attention": {"no_op": True, "num_key_value_heads": None}, "ffn": {"no_op": False, "intermediate_size": 40}},
        {"attention": {"no_op": False, "num_key_value_heads": 3}, "ffn": {"no_op": True, "intermediate_size": None}},
        {"attention": {"no_op": False, "num_key_value_heads": 3}, "ffn": {"no_op": False, "intermediate_size": 34} | changes},
    ]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "block_configs": blocks}))
    return model


def test_a_folder_of_puzzletron_is_read(tmp_path: Path) -> None:
    model = puzzle(tmp_path / "model")
    assert torch.equal(logits(load(str(tmp_path / "model")).model), logits(model))


def test_a_block_that_no_stock_class_has_is_refused(tmp_path: Path) -> None:
    puzzle(tmp_path / "model", replace_with_linear=True)
    with pytest.raises(UsageError, match="the MLP of layer 2 has replace_with_linear in block_configs, which no stock class has"):
        load(str(tmp_path / "model"))
