"""Continuous batching of transformers, which has a cache of its own, on models whose layers differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from conftest import LAYOUTS, VOCAB, byte_tokenizer, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]


def cut_to(layout: tuple[str, str], kept: dict[str, list[bool]], folder: Path) -> Any:
    """A tiny model without the units that are False, saved and loaded again."""
    model = tiny_model(layout, vocab_size=VOCAB)
    cut(model, families.axes(model), Mask({name: torch.tensor(keep) for name, keep in kept.items()}))
    save(model, byte_tokenizer(), folder, dtype=torch.float32)
    return load(str(folder)).model


def written_in_batches(model: Any) -> list[list[int]]:
    """Six tokens after each prompt, by continuous batching."""
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=small, progress_bar=False)
    return [result.generated_tokens for result in found.values()]


@pytest.mark.parametrize("kept", [{"layers.1.attentions": [False]}, {"layers.1.mlps": [False]}], ids=["no attention", "no MLP"])
@pytest.mark.parametrize("layout", [("llama", "llama"), ("gemma3", "gemma3"), ("phi3", "phi3")], ids=lambda layout: layout[1])
def test_a_lacking_block_is_no_trouble(layout: tuple[str, str], kept: dict[str, list[bool]], tmp_path: Path) -> None:
    model = cut_to(layout, kept, tmp_path / "model")
    alone = []
    for prompt in PROMPTS:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        alone.append(tokens[0, len(prompt) :].tolist())
    assert written_in_batches(model) == alone


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3-grouped", "phi3"])
def test_different_numbers_of_kv_heads_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    """Its cache has one number for all layers; transformers ends in an error of its own or writes nothing."""
    layout = next(layout for layout in LAYOUTS if layout[1] == name)
    heads = next(axis.size for axis in families.axes(tiny_model(layout)) if axis.name == "layers.1.kv_heads")
    model = cut_to(layout, {"layers.1.kv_heads": [False] + [True] * (heads - 1)}, tmp_path / "model")
    with pytest.raises(ValueError, match=r"the layers of this model have different numbers of heads, .*; call generate\(\)"):
        written_in_batches(model)
