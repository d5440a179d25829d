"""transformers' own tests of a model (`ModelTesterMixin`), on our classes; `.ci/common_tests` lays this file beside them and runs it.

One class of tests a family, on tiny models whose two layers differ in heads and neurons, and one on a sliced model.
"""

import unittest
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from adapt_pruner import families
from adapt_pruner.core.model import modeling_pruned, modeling_sliced
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.reduce.slice import slice_to
from conftest import tiny_config, tiny_model

from . import test_modeling_common as common

LAYOUTS = {
    "Gemma3": ("gemma3", "gemma3-grouped"), "Llama": ("llama", "llama"), "Mistral": ("llama", "mistral"),
    "Phi3": ("phi3", "phi3"), "Qwen2": ("llama", "qwen2"), "Qwen3": ("llama", "qwen3"),
}  # fmt: skip

ALONE = "the source distribution has no tests of `generate` to inherit; tests/ and .ci/matrix generate"
OTHER_POSITIONS = (
    "sets scaled positions on a config that was written without; one that has them allows what transformers reads for them"
)
STREAM = "the stream of a sliced model is narrower than its config says, but for the last layer's"
ALLOWED: dict[str, str] = {"test_generation_tester_mixin_inheritance": ALONE}
for _name in ("Mistral", "Qwen2", "Qwen3"):
    for _test in ("frequencies", "from_config_1_dynamic", "from_config_2_yarn"):
        ALLOWED[f"Pruned{_name}Test.test_model_rope_scaling_{_test}"] = OTHER_POSITIONS
ALLOWED["SlicedLlamaTest.test_hidden_states_output"] = STREAM
"""A test, of all classes or of one -> why it fails. One that passes is to leave this list."""


class Tester:
    """What the tests ask of a model: its config and its inputs."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, config: Any) -> None:
        self._config = config.to_dict()
        self._class = type(config)
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        first = config.per_layer_config[0]  # the one whose attentions the tests look at
        self.num_attention_heads, self.intermediate_size = first.num_attention_heads, first.intermediate_size

    def get_config(self) -> Any:
        """A config of its own, which a test may change."""
        return self._class.from_dict(self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A config and a batch of random tokens, with a mask that hides more of each row than of the next."""
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def unequal(layout: tuple[str, str]) -> Any:
    """A model of two layers: the first has lost neurons, the second a KV head."""
    kinds = getattr(tiny_config(layout), "layer_types", None)
    model = tiny_model(layout, num_hidden_layers=2, **({"layer_types": kinds[:2]} if kinds else {}))
    axes = families.axes(model)
    kept = {axis.name: torch.arange(axis.size) % 3 > 0 for axis in axes if axis.name == "layers.0.neurons"}
    kept |= {axis.name: torch.arange(axis.size) > 0 for axis in axes if axis.name == "layers.1.kv_heads"}
    cut(model, axes, Mask(kept))
    return model


def sliced() -> Any:
    """A model whose stream is narrower."""
    model = tiny_model(("llama", "llama"), num_hidden_layers=2)
    slice_to(model, 32, [torch.randint(3, model.config.vocab_size, (4, 32))], dtype="float32")
    return model


def suite(name: str, model: Any) -> type[unittest.TestCase]:
    """The tests of a causal LM and of the model within it; both stand in the lists in which the tests look for their like."""
    module = modeling_sliced if name.startswith("Sliced") else modeling_pruned
    whole = getattr(module, f"{name}ForCausalLM")
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = whole.__name__
    modeling_auto.MODEL_MAPPING_NAMES[name] = whole.base_class.__name__

    def set_up(self: Any) -> None:
        self.model_tester = Tester(model.config)

    its = {"all_model_classes": (whole.base_class, whole), "setUp": set_up, "__module__": __name__}
    made: type[unittest.TestCase] = type(f"{name}Test", (common.ModelTesterMixin, unittest.TestCase), its)
    for allowed, reason in ALLOWED.items():
        of, _, test = allowed.rpartition(".")
        if of in ("", made.__name__):
            setattr(made, test, pytest.mark.xfail(reason=reason, strict=True)(getattr(made, test)))
    return made


for _family, _layout in LAYOUTS.items():
    globals()[f"Pruned{_family}Test"] = suite(f"Pruned{_family}", unequal(_layout))
SlicedLlamaTest = suite("SlicedLlama", sliced())
