"""The modelling files still fit the classes of transformers that they subclass.

They take over a constructor (`_WithoutLayers`, `_Pruned`), the forward of a layer (`_SlicedLayer`) and the place of a block
(`_Nothing`). Each test here says what the stock class has to be like for that, compares what the two compute where they must be
equal, and, where it fails, what to look at. `.ci/matrix` does the like over whole checkpoints with other versions.
"""

import inspect
import pickle
import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adapt_pruner.core.model import modeling_pruned, modeling_sliced
from adapt_pruner.export.configuration_decilm import DeciLMConfig
from conftest import LAYOUTS, tiny_model

VERSION = f"transformers {transformers.__version__}"
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(3))
BLOCKS = {"self_attn", "mlp"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
CHILDREN = {"Gemma3": BLOCKS | NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}}
"""Kind of model -> what a layer consists of, where it is more than blocks and two norms."""
IDLE = {"Phi3": {"resid_attn_dropout", "resid_mlp_dropout"}}
"""What a layer has beside these that may stay when a block goes."""
READ_AS_IT_RUNS = {"Phi3": {"num_attention_heads"}}
"""Sizes of its own layer that an attention reads from its config in its forward; `Axis.readers` of the family states them."""
KNOWN_ARGUMENTS = {
    "hidden_states", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "cache_position", "position_embeddings",
    "kwargs", "position_embeddings_global", "position_embeddings_local", "output_attentions",
}  # fmt: skip
"""What the stock layers have been seen to take; `_SlicedLayer` hands all but the first on to the attention."""


STOCK = sorted({type(tiny_model(layout)).__name__ for layout in LAYOUTS})
PRUNED = [getattr(modeling_pruned, f"Pruned{name}") for name in STOCK]
SLICED = [getattr(modeling_sliced, f"Sliced{name}ForCausalLM") for name in modeling_sliced.STOCK]
KIND = [pytest.param(ours, id=ours.__name__) for ours in (*PRUNED, *SLICED)]


def stock_of(ours: Any) -> Any:
    """The class of transformers that one of ours stands on."""
    return next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))


def model_of(stock: Any) -> Any:
    """A tiny model of a stock class; of those there are, one without windows that differ between layers comes first."""
    return next(model for layout in LAYOUTS if type(model := tiny_model(layout)) is stock)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every plain value that a module of the model holds, by its path."""
    plain = (bool, int, float, str, type(None), list, tuple, dict, torch.Size)
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_")
    }  # fmt: skip


def twin(ours: Any, stock: Any) -> Any:
    """One of our classes on the config of a stock model, with its weights."""
    made = ours(stock.config).eval()
    made.load_state_dict(stock.state_dict())
    made.tie_weights()
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_where_all_layers_are_equal_ours_is_the_stock_model(layout: tuple[str, str]) -> None:
    stock = tiny_model(layout)
    ours = twin(getattr(modeling_pruned, f"Pruned{type(stock).__name__}"), stock)
    look = f"{VERSION}: look at {type(stock).__name__}.__init__ and that of its model, which _WithoutLayers runs with no layers"
    left, right = attributes(ours), attributes(stock)
    assert left.keys() == right.keys(), look
    assert {name: value for name, value in left.items() if value != right[name]} == {}, look
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()], look
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in stock.named_buffers()], look
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, stock(IDS).logits), look


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_equal_layers_are_built_where_a_config_has_no_view_of_them(
    layout: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In transformers 5.14 `per_layer_config` is None if all layers are equal, as where a repair gave all of them biases."""
    stock, of_stock = tiny_model(layout), transformers.PreTrainedConfig.per_layer_config
    with monkeypatch.context() as older:
        absent = of_stock.getter(lambda self: of_stock.fget(self) if self.is_heterogeneous else None)
        older.setattr(transformers.PreTrainedConfig, "per_layer_config", absent)
        ours = twin(getattr(modeling_pruned, f"Pruned{type(stock).__name__}"), stock)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("name", ["Granite", "SmolLM3", "SeedOss", "Ministral", "Gemma2"])
def test_a_model_that_no_list_names_is_built_of_unequal_layers(name: str) -> None:
    """So a new family needs no class in modeling_pruned.py."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, allow_global_per_layer_attribute_access=True,
        per_layer_config={0: {"intermediate_size": 16}, 1: {"num_attention_heads": 2, "num_key_value_heads": 1}, 2: {"skip": ["attention"]}},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(modeling_pruned, f"Pruned{name}ForCausalLM")(config).eval()
    assert isinstance(model, getattr(transformers, f"{name}ForCausalLM"))
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [16, 40, 40]
    assert [getattr(layer.self_attn, "num_key_value_groups", None) for layer in model.model.layers] == [2, 2, None]
    assert model.model.layers[1].self_attn.k_proj.out_features == 8
    written = [
        model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None) for use in (True, False)
    ]
    assert torch.equal(*written)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_is_sliced_only_if_its_layers_are_known() -> None:
    assert hasattr(modeling_sliced, "SlicedQwen3ForCausalLM")
    assert not hasattr(modeling_sliced, "SlicedQwen3MoeForCausalLM")
    assert not hasattr(modeling_sliced, "SlicedGemma3ForCausalLM")
    assert not hasattr(modeling_pruned, "PrunedGemma3TextForTokenClassification"), "transformers has no such class"


def test_an_attribute_that_the_constructor_counts_from_its_layers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a version could well bring: a field worked out from the number of layers, which ours says is none."""
    of_stock = transformers.LlamaModel.__init__

    def changed(self: Any, config: Any) -> None:
        of_stock(self, config)
        self.depth = config.num_hidden_layers

    monkeypatch.setattr(transformers.LlamaModel, "__init__", changed)
    with pytest.raises(AssertionError, match="_WithoutLayers"):
        test_where_all_layers_are_equal_ours_is_the_stock_model(("llama", "llama"))


@pytest.mark.parametrize("ours", [pytest.param(ours, id=ours.__name__) for ours in SLICED])
def test_a_sliced_model_of_full_width_is_the_stock_model(ours: Any) -> None:
    stock = model_of(stock_of(ours))
    for name, parameter in stock.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            nn.init.ones_(parameter)
    config = stock.config
    config.sliced_hidden_size, config.head_dim = config.hidden_size, stock.model.layers[0].self_attn.head_dim
    sliced = ours(config).eval()
    missing, surplus = sliced.load_state_dict(stock.state_dict(), strict=False)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in missing} == {"attention_shortcut", "mlp_shortcut"}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in surplus} == NORMS | {"norm"}
    for layer in sliced.model.layers:
        nn.init.eye_(layer.attention_shortcut.weight)
        nn.init.eye_(layer.mlp_shortcut.weight)
    with torch.no_grad():
        difference = (sliced(IDS).logits - stock(IDS).logits).abs().max() / stock(IDS).logits.std()
    assert difference < 1e-5, (
        f"{VERSION}: look at {type(stock.model.layers[0]).__name__}.forward, which _SlicedLayer.forward is in the place of"
    )


@pytest.mark.parametrize("ours", KIND)
def test_a_layer_is_made_of_what_we_know(ours: Any) -> None:
    stock = model_of(stock_of(ours))
    layer, kind = stock.model.layers[0], type(stock).__name__.removesuffix("ForCausalLM")
    look = f"{VERSION}: look at {type(layer).__name__}.__init__"
    assert {name for name, _ in layer.named_children()} - IDLE.get(kind, set()) == CHILDREN.get(kind, BLOCKS | NORMS), (
        f"{look}, and at `_blocks` in modeling_pruned.py: a norm that is not named there stays when its block goes"
    )
    if ours in PRUNED:
        assert {name for block in modeling_pruned._blocks(layer).values() for name in block} == CHILDREN.get(
            kind, BLOCKS | NORMS
        ), look
    assert isinstance(layer.self_attn.o_proj, nn.Linear), f"{look}, and at _with_bias"
    assert isinstance(layer.mlp.down_proj, nn.Linear), f"{look}, and at _with_bias"
    assert isinstance(stock.model.layers, nn.ModuleList), f"{look}: _Pruned appends to `layers`"
    assert [block.self_attn.layer_idx for block in stock.model.layers] == list(range(len(stock.model.layers)))
    assert layer.self_attn.config is stock.config, f"{look}: _Pruned hands each attention the config of the model, or its like"
    for block in (layer.self_attn, layer.mlp):
        read = set(re.findall(r"self\.config\.(num_\w+|\w+_size|head_dim)", inspect.getsource(type(block).forward)))
        allowed = READ_AS_IT_RUNS.get(kind, set()) if block is layer.self_attn else set()
        assert read == allowed, f"{VERSION}: look at {type(block).__name__}.forward, which reads {sorted(read)} as it runs"


@pytest.mark.parametrize("ours", KIND)
def test_constructors_and_forwards_take_what_we_hand_them(ours: Any) -> None:
    stock = model_of(stock_of(ours))
    layer = stock.model.layers[0]
    for one in (type(stock), type(stock.model)):
        assert list(inspect.signature(one.__init__).parameters) == ["self", "config"], (
            f"{VERSION}: look at {one.__name__}.__init__"
        )
    assert list(inspect.signature(type(layer).__init__).parameters) == ["self", "config", "layer_idx"]
    taken = set(inspect.signature(type(layer).forward).parameters) - {"self"}
    assert taken <= KNOWN_ARGUMENTS, (
        f"{VERSION}: {type(layer).__name__}.forward takes {sorted(taken - KNOWN_ARGUMENTS)}; see whether _SlicedLayer.forward may hand it on"
    )
    parameters = inspect.signature(type(layer.self_attn).forward).parameters
    assert {"cache", "past_key_values"} & parameters.keys(), (
        f"{VERSION}: look for the cache's name, which _Nothing.forward takes it by"
    )
    assert any(one.kind is one.VAR_KEYWORD for one in parameters.values()), "the attention takes what the layer hands on"


@pytest.mark.parametrize("ours", [pytest.param(ours, id=ours.__name__) for ours in PRUNED])
def test_the_attention_gives_two_things_and_the_cache_takes_three(ours: Any) -> None:
    stock = model_of(stock_of(ours))
    given: list[Any] = []
    stock.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: given.append(out))
    with torch.no_grad():
        found = stock(IDS, use_cache=True)
    assert isinstance(given[0], tuple), f"{VERSION}: _Nothing.forward gives a pair in the place of attention"
    assert len(given[0]) == 2, f"{VERSION}: _Nothing.forward gives a pair in the place of attention"
    held = found["cache"] if "cache" in found else found["past_key_values"]  # as transformers calls it, and called it
    assert list(inspect.signature(type(held).update).parameters)[1:4] == ["key_states", "value_states", "layer_idx"]
    assert held.get_seq_length() == IDS.shape[1]


def test_the_config_tells_layers_apart_as_we_read_it() -> None:
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        per_layer_config={0: {"intermediate_size": 16}, 1: {"skip": ["mlp"]}},
    )  # fmt: skip
    look = f"{VERSION}: look at integrations/heterogeneity of transformers"
    assert config.is_heterogeneous, look
    assert config.per_layer_config[0].intermediate_size == 16, look
    assert config.per_layer_config[2].intermediate_size == 40, look
    assert list(config.per_layer_config[1].skip) == ["mlp"], look
    assert not getattr(config.per_layer_config[0], "skip", ()), look
    again = transformers.LlamaConfig.from_dict(config.to_dict())
    assert [layer.intermediate_size for layer in again.per_layer_config] == [16, 40, 40], look
    decilm = DeciLMConfig(
        hidden_size=768, num_attention_heads=4, num_hidden_layers=1, vocab_size=9,
        block_configs=[{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}],
    )  # fmt: skip
    assert (decilm.per_layer_config[0].intermediate_size, decilm.per_layer_config[0].num_key_value_heads) == (512, 2), look


def test_stock_classes_still_need_ours() -> None:
    """Once transformers builds unequal layers by itself, folders need no code of ours any more."""
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, vocab_size=9,
        per_layer_config={0: {"intermediate_size": 16}}, allow_global_per_layer_attribute_access=True,
    )  # fmt: skip
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in transformers.LlamaForCausalLM(config).model.layers]
    assert widths == [40, 40], (
        f"{VERSION} builds layers from per_layer_config: see whether checkpoint.save may leave modeling_pruned.py out"
    )
