"""Models of two towers: the law, masks and round trips hold for them as for all; every family file that has a `TASK` of pairs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, CLIPProcessor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated, num_left
from conftest import VOCAB, byte_tokenizer, read_json

LAYOUTS = [
    (family.__name__.rpartition(".")[2], name)
    for family in families.all_families()
    for name in family.tiny()
    if getattr(family, "TASK", "") == "contrastive"
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])


def tiny_towers(layout: tuple[str, str] = LAYOUTS[0], *, seed: int = 0, vocab_size: int = 97) -> Any:
    """A random model whose biases and norms are not at their idle values."""
    family = next(family for family in families.all_families() if family.__name__.endswith(f".{layout[0]}"))
    config = family.tiny()[layout[1]]
    config.text_config.vocab_size = vocab_size
    torch.manual_seed(seed)
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim > 1:
            parameter.data.mul_(2)
    return model


def tiny_processor(length: int = 24) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = length
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="</s> $A <s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=True), tokenizer
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of random pictures against random captions, which end in token 1."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (4, 12), generator=generator)
    ids[:, -1] = 1
    pixels = torch.randn(3, 3, 16, 16, generator=generator).to(model.dtype)
    found: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits_per_image
    return found


def random_mask(
    axes: Any, kinds: tuple[str, ...], seed: int, towers: tuple[str, ...] = ("text.", "vision.", "projection")
) -> Mask:
    """About half of every axis of these kinds in these towers."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for axis in axes:
        if axis.kind in kinds and axis.name.startswith(towers):
            kept[axis.name] = torch.ones(axis.size, dtype=torch.bool)
            kept[axis.name][torch.randperm(axis.size, generator=generator)[: axis.size // 2]] = False
    return Mask(kept)


def unequal(axes: Any) -> Mask:
    """Every second layer of each tower loses heads and neurons."""
    mask = random_mask(axes, ("neurons", "kv_heads"), seed=5)
    return Mask({axis.name: mask[axis.name] for axis in axes if axis.name in mask and (axis.layer or 0) % 2})


@every_layout
@pytest.mark.parametrize(
    "kinds",
    [("neurons",), ("kv_heads",), ("layers",), ("projection",), ("neurons", "kv_heads", "layers", "projection")],
    ids="+".join,
)
def test_cut_equals_gated(layout: tuple[str, str], kinds: tuple[str, ...]) -> None:
    model = tiny_towers(layout).double()
    axes = families.axes(model)
    mask, dense = random_mask(axes, kinds, seed=1), logits(model)
    with gated(model, axes, mask):
        shut = logits(model)
    assert (shut - dense).abs().max() > 1e-3 or not mask.kept, "the gates must do something"
    assert torch.equal(logits(model), dense), "gates come off"
    left = num_left(model, axes, mask)
    cut(model, axes, mask)
    assert (logits(model) - shut).abs().max() < 1e-9
    assert count_parameters(model) == left
    assert {axis.name: axis.size for axis in families.axes(model) if axis.kind in kinds} == {
        mask.renamed(name): int(keep.sum()) for name, keep in mask.kept.items() if mask.renamed(name)
    }


@every_layout
def test_masks_compose(layout: tuple[str, str]) -> None:
    """Two cuts equal one by the composed mask, also where the first drops layers of one tower."""
    twice, once = tiny_towers(layout).double(), tiny_towers(layout).double()
    dense_axes, total = families.axes(once), Mask()
    for seed, towers in enumerate((("vision.",), ("text.", "vision.", "projection"))):
        axes = families.axes(twice)
        mask = random_mask(axes, ("neurons", "kv_heads", "layers", "projection"), seed=seed, towers=towers)
        cut(twice, axes, mask)
        total = total.then(mask, families.axes(twice))
    cut(once, dense_axes, total)
    assert torch.equal(logits(once), logits(twice))
    assert Mask.from_json(total.to_json()) == total


@every_layout
def test_moments_shrink_along(layout: tuple[str, str]) -> None:
    model = tiny_towers(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pixels, ids = torch.randn(4, 3, 16, 16), torch.randint(3, 97, (4, 12)).index_fill(1, torch.tensor([11]), 1)
    model(input_ids=ids, pixel_values=pixels).logits_per_image.sum().backward()
    optimizer.step()
    axes = families.axes(model)
    cut(model, axes, random_mask(axes, ("neurons", "kv_heads", "layers", "projection"), seed=2), optimizer=optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())


@every_layout
@pytest.mark.parametrize("alike", [True, False], ids=["layers alike", "layers that differ"])
def test_a_result_comes_back(layout: tuple[str, str], alike: bool, tmp_path: Path) -> None:
    """By our loader, and by stock transformers: as the stock class where its layers are alike, else with our one file."""
    model = tiny_towers(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    of_layers = ("neurons", "layers", "projection") if layout[0] == "clip" else ("layers",)
    mask = random_mask(axes, of_layers, seed=1) if alike else unequal(axes)
    cut(model, axes, mask)
    folder = tmp_path / "cut"
    save(model, tiny_processor(), folder, mask=mask, dtype=torch.float32)
    assert (folder / "modeling_pruned.py").exists() is not alike
    loaded = load(str(folder), any_task=True)
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.mask == mask
    assert loaded.tokenizer.image_processor.size == {"shortest_edge": 16}
    assert families.sizes(loaded.model) == families.sizes(model)
    stock = AutoModel.from_pretrained(folder, trust_remote_code=not alike).eval()
    assert torch.equal(logits(stock), logits(model))
    assert type(stock).__name__ == ("" if alike else "Pruned") + type(tiny_towers(layout)).__name__
    assert AutoProcessor.from_pretrained(folder).tokenizer.model_max_length == 24
    assert read_json(folder / "config.json")["model_type"] == ("" if alike else "pruned_") + layout[0]
    again = copy.deepcopy(loaded.model)
    cut(again, families.axes(again), random_mask(families.axes(again), ("kv_heads",), seed=3))
    assert count_parameters(again) < count_parameters(model)
