"""Sums of blocks (SLoRB) beside linear layers that other tools quantise, adapt, replace, copy or compile."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.modeling_pruned import add_block_sums
from adapt_pruner.core.model.weight_mask import linear_layers
from conftest import VOCAB, byte_tokenizer, tiny_model

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


def summed(layout: tuple[str, str] = ("llama", "llama")) -> Any:
    """A model whose linear layers have weights and sums that count alike."""
    model = tiny_model(layout, vocab_size=VOCAB)
    for layer in model.model.layers:
        add_block_sums(layer, 8)
    model.config.block_sums = 8
    for name, parameter in model.named_parameters():
        if "block_sums" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with sums."""
    save(summed(), byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def model_of(folder: Path) -> Any:
    return load(str(folder)).model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float((found - expected).abs().max() / expected.std())


def with_dequantised_weights(quantised: Any, model: Any) -> Any:
    """`model` with the weights of a quantised model as they are computed with, in place; its sums stay."""
    changed = 0
    with torch.no_grad():
        for name, module in linear_layers(model).items():
            weight = quantised.get_submodule(name).weight.dequantize()
            changed += not torch.equal(weight, module.weight)
            module.weight.copy_(weight)
    assert changed == len(linear_layers(model)), "every linear layer was found"
    return model


def test_the_sums_count(folder: Path) -> None:
    model = model_of(folder)
    expected = logits(model)
    for name, parameter in model.named_parameters():
        if "block_sums" in name:
            nn.init.zeros_(parameter)
    assert off(logits(model), expected) > 0.1


def test_quanto_leaves_the_sums(folder: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = model_of(folder)
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    assert off(logits(model), logits(with_dequantised_weights(model, model_of(folder)))) < 1e-4


def test_torchao_leaves_the_sums(folder: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = model_of(folder)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "_proj" in name
    )
    assert off(logits(model), logits(with_dequantised_weights(model, model_of(folder)))) < 1e-4


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
def test_an_adapter_computes_the_same_merged(kind: str, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = (
        peft.IA3Config(target_modules=names, feedforward_modules=["down_proj"], init_ia3_weights=False)
        if kind == "IA3"
        else peft.LoraConfig(target_modules=names, use_dora=kind == "DoRA", init_lora_weights=False)
    )
    model = model_of(folder)
    before = logits(model)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:  # of DoRA; it begins where it changes nothing
            nn.init.uniform_(parameter, 1.0, 2.0)
    assert sum("_proj" in name and hasattr(module, "base_layer") for name, module in adapted.named_modules()) == len(
        linear_layers(model_of(folder))
    )
    with adapted.disable_adapter():
        assert off(logits(adapted), before) < 1e-5
    trained = logits(adapted)
    assert off(trained, before) > 0.01
    assert off(logits(adapted.merge_and_unload()), trained) < 1e-4


class Doubled(nn.Module):
    """What a tool may put at the place of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


def replaced(model: Any) -> Any:
    """The model with other modules in the place of its linear layers, of which one holds a copy; in place."""
    for layer in model.model.layers:
        layer.mlp.up_proj = Doubled(layer.mlp.up_proj)
        layer.self_attn._modules["v_proj"] = Doubled(copy.deepcopy(layer.self_attn.v_proj))
    return model


def folded(model: Any) -> Any:
    """The model without sums beside its linear layers; each is in the weight; in place."""
    with torch.no_grad():
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, sums in list(block.block_sums.named_parameters()):
                    block.get_submodule(name).weight.add_(sums.repeat_interleave(8, dim=1))
                    sums.zero_()
    return model


@pytest.mark.parametrize("change", [copy.deepcopy, torch.compile, lambda model: torch.compile(model, fullgraph=True)])
def test_sums_follow_copies_and_graphs(change: Callable[[Any], Any], folder: Path) -> None:
    expected = logits(folded(model_of(folder)))
    model = model_of(folder)
    assert off(logits(change(model)), expected) < 1e-4
    assert off(logits(model), expected) < 1e-4


def test_what_takes_a_linear_layers_place_gets_its_sums_once(folder: Path) -> None:
    """Sums are added to what stands there, not doubled, and not once more by the layer within or its copy."""
    model = model_of(folder)
    logits(model)
    replaced(model)
    twin = model_of(folder)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.mlp.up_proj.weight.mul_(2)
            layer.self_attn.v_proj.weight.mul_(2)
    assert off(logits(model), logits(twin)) < 1e-4
    assert off(logits(copy.deepcopy(model)), logits(twin)) < 1e-4
