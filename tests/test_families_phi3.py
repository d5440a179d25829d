"""Phi-3: what no other family has, besides what the contract tests hold over its layouts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM
from typer.testing import CliRunner

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.modeling_pruned import PrunedPhi3ForCausalLM
from adapt_pruner.export import export
from conftest import VOCAB, byte_tokenizer, printed, saved, tiny_model
from test_law import gap, ids, random_mask, wide_norms

__all__ = ["ids"]  # a fixture

UNEQUAL = {"layers.0.kv_heads": [True, False, True], "layers.1.query_heads": [True, False] * 3}


def unequal(model: Any) -> Any:
    """A model whose layers have 4, 3 and 6 query heads, changed in place."""
    cut(model, families.axes(model), Mask({name: torch.tensor(keep) for name, keep in UNEQUAL.items()}))
    return model


def test_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    """Pruned in every kind of axis, loaded, and measured."""
    folder, out = saved(tmp_path / "phi3", tiny_model(("phi3", "phi3"), vocab_size=VOCAB), byte_tokenizer()), tmp_path / "out"
    asked = ("--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 16, "--set", "step=0.2")
    of_heads = ("--set", "axes=[neurons,kv_heads,query_heads]", "--set", "calibration.self_generated=0")
    printed("prune", folder, "-o", out, "--params", "70%", *asked, *of_heads)
    small, dense = load(str(out)).model, load(str(folder)).model
    assert isinstance(small, PrunedPhi3ForCausalLM)
    neuron = next(axis.cost for axis in families.axes(dense) if axis.kind == "neurons")
    budget = int(0.7 * count_parameters(dense))
    assert budget - 2 * neuron < count_parameters(small) <= budget
    said = printed("eval", out, "--text", text_file, "--window", 32, "--max-windows", 2)
    assert "perplexity" in said
    whole = ("--method", "shortgpt", "--set", "axes=[attentions,mlps]")
    printed("prune", folder, "-o", tmp_path / "deep", "--params", "80%", *asked[:-2], *whole)
    deep = load(str(tmp_path / "deep")).model
    assert {axis.kind for axis in families.axes(deep)} >= {"attentions", "mlps"}
    assert sum(axis.kind in ("attentions", "mlps") for axis in families.axes(deep)) < 6


def test_slicing_is_refused_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    from adapt_pruner.cli import app

    folder = tmp_path / "phi3"
    tiny_model(("phi3", "phi3"), vocab_size=VOCAB).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    words = ["prune", folder, "-o", tmp_path / "out", "--params", "70%", "--method", "slicegpt", "--calibration", text_file]
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert "Phi3ForCausalLM cannot be sliced" in said.output + str(said.exception)
    assert not (tmp_path / "out").exists()


def test_each_attention_knows_its_own_number_of_heads(ids: torch.Tensor, tmp_path: Path) -> None:
    """Stock code reads it from the config as it runs; ours from the checkpoint; and a kernel chosen later reaches both."""
    model = unequal(tiny_model(("phi3", "phi3"), vocab_size=VOCAB))
    assert [layer.self_attn.config.num_attention_heads for layer in model.model.layers] == [4, 3, 6]
    assert isinstance(model, Phi3ForCausalLM)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    loaded = load(str(tmp_path / "model")).model
    assert [layer.self_attn.config.num_attention_heads for layer in loaded.model.layers] == [4, 3, 6]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        for one in (model, loaded):
            one.set_attn_implementation("eager")
            assert one.model.layers[0].self_attn.config._attn_implementation == "eager"
            assert torch.allclose(one(ids).logits, expected, atol=1e-5)
            twin = copy.deepcopy(one)
            assert twin.model.layers[0].self_attn.config.whole is twin.config, "a copy reads its own config"
            assert torch.allclose(twin(ids).logits, expected, atol=1e-5)


def test_cut_twice(ids: torch.Tensor) -> None:
    """An attention that states its own heads is cut again, and so is a layer that moved down."""
    model = wide_norms(unequal(tiny_model(("phi3", "phi3")).double()))
    axes = families.axes(model)
    assert gap(model, axes, random_mask(axes, ("kv_heads", "query_heads", "layers", "neurons", "residual"), seed=2), ids) <= 1e-9


def scaled_rope() -> Any:
    """A tiny model of the 128k kind."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=128, original_max_position_embeddings=64, rope_parameters=rope,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def test_a_graph_says_up_to_which_length_a_scaled_rope_is_right(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = scaled_rope()
    notes = export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "org/tiny", 0), tmp_path / "out", to="onnx")
    assert any("texts of up to 64 tokens; longer ones differ" in note for note in notes)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for length, same in ((64, True), (65, False)):
        ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), model(ids).logits, atol=1e-4) == same, length


@pytest.mark.parametrize("alike", [False, True], ids=["unequal", "equal"])
def test_a_scaled_rope_survives_a_cut_of_heads(alike: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    """The stock config counts the head size from width and heads, so a number of heads that it would refuse goes per layer."""
    model = scaled_rope()
    if alike:
        kept = {f"layers.{i}.kv_heads": torch.tensor([True, False, True]) for i in range(3)}
        cut(model, families.axes(model), Mask(kept))
    else:
        unequal(model)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    loaded = load(str(tmp_path / "model")).model
    with torch.no_grad():
        for text in (ids, ids.repeat(1, 4)):  # short, and beyond what it was trained for
            assert torch.equal(loaded(text).logits, model(text).logits)


def test_a_scaled_rope_fixes_the_width_of_the_stream() -> None:
    kinds = {axis.kind for axis in families.axes(scaled_rope())}
    assert kinds == {"neurons", "kv_heads", "query_heads", "attentions", "mlps", "vocabulary", "layers"}
