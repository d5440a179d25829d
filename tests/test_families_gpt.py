"""GPT-2 and GPT-NeoX (Pythia): one matrix for queries, keys and values, and heads that stock classes make as wide as the stream."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from adapt_pruner.families import admission
from conftest import VOCAB, byte_tokenizer, printed, read_json, saved

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {}, "gpt_neox": {}, "gpt_neox in sequence": {"use_parallel_residual": False},
}  # fmt: skip


def small(name: str) -> Any:
    """A tiny random model with the vocabulary of the tests."""
    config = admission.shrunk(AutoConfig.for_model(name.split()[0], **MODELS[name]))
    config.vocab_size = VOCAB
    return admission.tiny_model(config).float()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(3))


def shrunk_alike(model: Any, kind: str, keep: int) -> None:
    """Cut, in place, every axis of a kind to the first `keep` units."""
    axes = families.axes(model)
    cut(model, axes, Mask({axis.name: torch.arange(axis.size) < keep for axis in axes if axis.kind == kind}))


@pytest.mark.parametrize("name", MODELS)
def test_fewer_neurons_and_layers_load_with_the_stock_class(name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = small(name)
    shrunk_alike(model, "neurons", 24)
    shrunk_alike(model, "layers", 2)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    assert "auto_map" not in read_json(tmp_path / "model" / "config.json")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize("keep", [5, 4])
@pytest.mark.parametrize("name", MODELS)
def test_fewer_heads_are_built_by_our_class_though_layers_are_alike(
    name: str, keep: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    """48 channels are no multiple of 5 heads, and of 4 heads the stock class would make wider ones."""
    model = small(name)
    shrunk_alike(model, "kv_heads", keep)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    ours = load(str(tmp_path / "model")).model
    assert families.sizes(ours) == families.sizes(model)
    assert families.sizes(ours)["layers.0.kv_heads"] == keep
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    for loaded in (theirs, ours):
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        for cache in (True, False):
            assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache), written)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_without_attention_or_mlp_writes_the_same_with_and_without_a_cache(name: str, ids: torch.Tensor) -> None:
    model = small(name)
    gone = {kind: torch.tensor([False]) for kind in ("layers.0.attentions", "layers.1.mlps")}
    cut(model, families.axes(model), Mask(gone))
    options: Any = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    """GPT-2 pruned in heads and neurons, inspected and measured; the card tells its sizes, though config.json calls them otherwise."""
    folder, out = saved(tmp_path / "dense", small("gpt2"), byte_tokenizer()), tmp_path / "out"
    options = ("--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 16, "--set", "step=0.2")
    printed("prune", folder, "-o", out, "--params", "60%", *options)
    assert "query heads a layer" in (out / "README.md").read_text(encoding="utf-8")
    assert "perplexity" in printed("eval", out, "--text", text_file, "--window", 32, "--max-windows", 2)
    sizes = families.sizes(load(str(out)).model)
    assert any(sizes[f"layers.{layer}.kv_heads"] < 6 for layer in range(3) if f"layers.{layer}.kv_heads" in sizes)
    rows = [line.split() for line in printed("inspect", out).splitlines() if line.lstrip()[:1].isdigit()]
    assert [int(row[1]) for row in rows] == [sizes.get(f"layers.{layer}.kv_heads", 0) for layer in range(3)]
    assert [int(row[3]) for row in rows] == [sizes.get(f"layers.{layer}.neurons", 0) for layer in range(3)]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("gpt2", "sets the number of query heads of each KV head of each layer"), ("starcoder2", "widens the gate_proj")],
)
def test_an_export_that_widens_layers_says_what_it_lacks(kind: str, why: str, tmp_path: Path) -> None:
    model = admission.tiny_model(admission.shrunk(AutoConfig.for_model(kind))).float()
    with pytest.raises(UsageError, match=f"{why}.*--to onnx"):
        export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "org/tiny", 0), tmp_path / "out", to="uniform")
