"""Gemma 3: what no other family has, besides what the contract tests hold over its layouts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM
from typer.testing import CliRunner

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report import with_card
from conftest import VOCAB, as_dicts, byte_tokenizer, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random Gemma 3 with one KV head, whose tokenizer puts <s> before a text."""
    path = tmp_path / "gemma"
    tiny_model(("gemma3", "gemma3"), vocab_size=VOCAB).save_pretrained(path)
    byte_tokenizer(opens=True).save_pretrained(path)
    return path


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A tiny random Gemma 3 of 18 layers, of which every sixth is global, and with a window of 4 tokens."""
    path, kinds = tmp_path / "deep", ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    model = tiny_model(("gemma3", "gemma3"), vocab_size=VOCAB, num_hidden_layers=18, layer_types=kinds, sliding_window=4)
    for index in (3, 4, 6, 7, 8, 9):  # local layers that hardly change their input
        for norm in (model.model.layers[index].post_attention_layernorm, model.model.layers[index].post_feedforward_layernorm):
            norm.weight.data.fill_(-0.99)
    model.save_pretrained(path)
    byte_tokenizer(opens=True).save_pretrained(path)
    return path


def as_mlx_reads(model: Any) -> Any:
    """The model as a tool builds it that makes every sixth layer global and ignores `layer_types`."""
    config = copy.deepcopy(model.config)
    config.layer_types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config.num_hidden_layers)]
    other = Gemma3ForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("write", [with_card.prune, with_card.run])
@pytest.mark.parametrize(("chooser", "budget", "stays"), [
    ("depth.drop_layers", 0.67, 12), ("depth.drop_layers(periodic=true)", 0.67, 12), ("depth.drop_layers(periodic=true)", 0.8, 14),
])  # fmt: skip
def test_layers_in_the_middle_go_with_a_warning_or_in_the_pattern(
    write: Any, chooser: str, budget: float, stays: int, deep: Path, text_file: Path, tmp_path: Path
) -> None:
    dense = load(str(deep)).model
    inside = sum(count_parameters(layer) for layer in dense.model.layers)
    recipe = read(
        {
            "model": str(deep), "method": "shortgpt", "budget": str(int(count_parameters(dense) - (1 - budget) * inside)), "chooser": chooser,
            "calibration": {"source": str(text_file), "samples": 4, "length": 32}, "dtype": "float32", "device": "cpu",
        }
    )  # fmt: skip
    heard: list[dict[str, Any]] = []
    write(recipe, tmp_path / "out", listen=as_dicts(heard.append))
    result = tmp_path / "out" if write is with_card.prune else tmp_path / "out" / "model"
    model, ids = load(str(result)).model, torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    assert model.config.num_hidden_layers == stays
    with torch.no_grad():
        same = torch.equal(model(ids).logits, as_mlx_reads(model)(ids).logits)
    assert same == ("periodic" in chooser)
    warned = [event["message"] for event in heard if event["event"] == "warning" and "MLX" in event["message"]]
    assert len(warned) == (not same)
    assert all("every sixth layer of a Gemma 3 global" in message and "periodic=true" in message for message in warned)
    card = (result / "README.md").read_text(encoding="utf-8")
    assert ("**MLX** cannot run it. MLX computes something else" in card) == (not same)
    if not same:
        with_card.export(str(result), tmp_path / "plain", to="uniform")
        assert "**MLX** cannot run it" in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("axes", [["layers", "mlps"], ["attentions"]])
def test_a_pattern_is_kept_of_whole_layers_alone(axes: list[str], deep: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = read(
        {
            "model": str(deep), "method": "shortgpt", "budget": "80%", "axes": axes, "chooser": "depth.drop_layers(periodic=true)",
            "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        }
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"keeps the pattern of whole layers, and axes is .*; name layers in axes and leave out"):
        with_card.prune(recipe, tmp_path / "out")


def prune(folder: Path, out: Path, params: str, text_file: Path) -> str:
    from adapt_pruner.cli import app

    words = ["prune", folder, "-o", out, "--params", params, "--calibration", text_file, "--calibration-samples", 4]
    asked = ["--calibration-length", 16, "--set", "calibration.self_generated=0", "--set", "step=0.2"]
    said = CliRunner().invoke(app, [str(word) for word in [*words, *asked]])
    return said.output if said.exit_code == 0 else str(said.exception)


def test_with_one_kv_head_the_neurons_meet_the_budget(folder: Path, text_file: Path, tmp_path: Path) -> None:
    dense = load(str(folder)).model
    neuron = next(axis.cost for axis in families.axes(dense) if axis.kind == "neurons")
    out = tmp_path / "out"
    assert "saved" in prune(folder, out, "75%", text_file)
    small = load(str(out)).model
    assert isinstance(small, Gemma3ForCausalLM)
    budget = int(0.75 * count_parameters(dense))
    assert budget - neuron < count_parameters(small) <= budget
    sizes = {axis.kind: axis.size for axis in families.axes(small)}
    assert sizes["kv_heads"] == 1
    assert torch.isfinite(small(torch.randint(3, VOCAB, (1, 24))).logits).all()


def test_what_neurons_alone_cannot_reach_is_refused_with_what_they_can(folder: Path, text_file: Path, tmp_path: Path) -> None:
    dense = load(str(folder)).model
    floor = count_parameters(dense) - sum((axis.size - 1) * axis.cost for axis in families.axes(dense) if axis.kind == "neurons")
    assert f"the smallest possible budget is {floor:,}" in prune(folder, tmp_path / "out", "20%", text_file)
    assert not (tmp_path / "out").exists()
    prune(folder, tmp_path / "out", str(floor), text_file)
    assert count_parameters(load(str(tmp_path / "out")).model) == floor


@pytest.mark.parametrize("width", [17, 24, 31, 44])
def test_an_embedding_is_scaled_as_after_loading(width: int) -> None:
    """To the last bit: a run that was stopped after such a cut goes on as if it had not been."""
    model = tiny_model(("gemma3", "gemma3-untied"))
    keep = torch.arange(48) < width
    cut(model, families.axes(model), Mask({"residual": keep}))
    fresh = type(model)(model.config)
    assert torch.equal(model.model.embed_tokens.embed_scale, fresh.model.embed_tokens.embed_scale)
    assert model.model.embed_tokens.scalar_embed_scale == pytest.approx(fresh.model.embed_tokens.scalar_embed_scale, rel=1e-15)
