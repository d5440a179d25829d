"""Gemma 3: what no other family has, besides what the contract tests hold over its layouts."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM
from typer.testing import CliRunner

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.core.surgery import cut
from conftest import VOCAB, byte_tokenizer, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random Gemma 3 with one KV head, whose tokenizer puts <s> before a text."""
    path = tmp_path / "gemma"
    tiny_model(("gemma3", "gemma3"), vocab_size=VOCAB).save_pretrained(path)
    byte_tokenizer(opens=True).save_pretrained(path)
    return path


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
