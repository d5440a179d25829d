"""Models whose layers differ in size, as `per_layer_config` in config.json says.

Made by adapt-pruner, which puts this file beside the weights; it needs transformers >= 5.14 and nothing else. Each class
is the stock one, but each decoder layer is built from its own config. A layer's `skip` names what it lacks: attention, mlp
and the norms of these. With `output_bias` the linear layers that write to the stream have a bias. With `block_sums: k` each
linear layer also adds B·s, where s are the sums of k consecutive inputs each. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

config.json has the model type `pruned_llama` instead of `llama`, and so on. A stock class would otherwise load the folder and compute
something else; so transformers refuses it and says what to pass.

Licence: Apache-2.0.
"""

import functools
import inspect
import json

import torch
import transformers
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel, modeling_layers
from transformers.pytorch_utils import Conv1D

if not hasattr(transformers.LlamaConfig, "is_heterogeneous"):
    raise ImportError(
        f"this model builds each layer from its own config, which transformers {transformers.__version__} cannot do; it needs "
        "transformers >= 5.14: pip install --upgrade 'transformers>=5.14'"
    )

PREFIX = "pruned_"


class _PrunedConfig:
    """A stock config whose model type has a prefix in config.json, and is the stock one in Python, since peft and others go by it."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        found, others = super().get_config_dict(*args, **kwargs)
        return {**found, "model_type": cls.model_type}, others

    def to_json_string(self, *args, **kwargs):
        data = json.loads(super().to_json_string(*args, **kwargs))
        return json.dumps({**data, "model_type": PREFIX + self.model_type}, indent=2, sort_keys=True) + "\n"


class _WithoutLayers:
    """Runs the stock constructor with no decoder layers, since it would read sizes that differ between layers.

    It would act on `gradient_checkpointing`, an old field of a config, and remove it; it is kept for when there are layers.
    """

    def __init__(self, config):
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        checkpointing = config.__dict__.pop("gradient_checkpointing", False)  # which the constructor would use up on no layers
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = num_layers
            if checkpointing:
                config.gradient_checkpointing = checkpointing


class _Nothing(nn.Module):
    """Replaces a removed attention (which has a layer number) or MLP: it adds nothing to the stream.

    A removed attention still writes one number per token to its layer of the cache, because transformers asks a single layer for
    the number of tokens seen.
    """

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, **others):
        nothing = torch.zeros_like(hidden_states)
        if self.layer_idx is None:
            return nothing
        names = ("cache", "layer_past", "past_key_values")  # transformers' name, that of GPT-NeoX, and the former one
        cache = next((others[name] for name in names if name in others), None)
        if hasattr(cache, "get_seq_length"):  # which the cache of continuous batching has not
            cache.update(nothing[:, None, :, :1], nothing[:, None, :, :1], self.layer_idx)
        return nothing, None


class _OwnConfig:
    """The config of a model with some fields of one layer's own, for an attention that reads them there as it runs."""

    def __init__(self, whole, **own):
        self.__dict__.update(own, whole=whole)

    def __getattr__(self, name):
        if name == "whole" or name.startswith("__"):  # of one that is being copied
            raise AttributeError(name)
        return getattr(self.whole, name)


class BlockSums(nn.Module):
    """Adds B s to what each linear layer of a block gives; s_j is the sum of inputs j k to (j + 1) k. B makes up for zeros (SLoRB of AST).

    It stands beside the linear layers rather than inside, since other tools replace these: what an adapter or a quantised layer
    gives gets the sums too, and its tool sees a plain linear layer. A parameter is B of the layer that has its name.
    """

    def __init__(self, block, size):
        super().__init__()
        for name, layer in block.named_children():
            if type(layer) is nn.Linear:
                B = layer.weight.new_zeros(layer.out_features, layer.in_features // size)
                self.register_parameter(name, nn.Parameter(B))

    def forward(self, x, name):
        B = self.get_parameter(name)
        return nn.functional.linear(x.unflatten(-1, (B.shape[1], -1)).sum(-1), B)


class _AddSums:
    """A forward hook on a linear layer of a block, or on what took its place."""

    def __init__(self, block, name):
        self.block, self.name = block, name

    def __call__(self, layer, args, output):
        if self.block is None or self.block._modules[self.name] is not layer:  # of a copy, or inside what took its place
            return output
        return output + self.block.block_sums(args[0], self.name)

    def __reduce__(self):
        return type(self), (None, self.name)  # where a layer is copied without its block, the sums are not its own


def _join_sums(block, args):
    for name in block.block_sums._parameters:
        layer = block._modules[name]
        if not any(isinstance(hook, _AddSums) and hook.block is block for hook in layer._forward_hooks.values()):
            layer.register_forward_hook(_AddSums(block, name))


def add_block_sums(layer, size):
    """Let every linear layer of the blocks of `layer`, in place, add a map of sums of `size` consecutive inputs, which is zero for now."""
    for block in layer.children():
        if any(type(module) is nn.Linear for module in block.children()):
            block.block_sums = BlockSums(block, size)
            block.register_forward_pre_hook(_join_sums)
            _join_sums(block, ())


def layer_config(config, index):
    """The config of one layer: the model's own where all are equal, for which transformers 5.14 has no `per_layer_config`."""
    return config.per_layer_config[index] if config.is_heterogeneous else config


NORMS = (  # of a layer: those before and after its attention, those before and after its MLP
    (("input_layernorm",), (), ("post_attention_layernorm",), ()),
    (("attention_layernorm",), (), ("feedforward_layernorm",), ()),
    (("operator_norm",), (), ("ffn_norm",), ()),
    (("ln_1",), (), ("ln_2",), ()),
    (("layer_norm1",), (), ("layer_norm2",), ()),
    (("norm_1",), (), ("norm_2",), ()),
    (("input_layernorm",), (), ("pre_feedforward_layernorm",), ()),
    (("input_layernorm",), (), ("pre_ff_layernorm",), ()),
    (("input_layernorm",), ("post_attention_layernorm",), ("pre_feedforward_layernorm",), ("post_feedforward_layernorm",)),
    (("input_layernorm",), ("post_attention_layernorm",), ("pre_mlp_layernorm",), ("post_mlp_layernorm",)),
    (("input_layernorm",), ("post_self_attn_layernorm",), ("post_attention_layernorm",), ("post_mlp_layernorm",)),
    (("input_layernorm",), ("post_norm1",), ("post_attention_layernorm",), ("post_norm2",)),
    (("operator_norm",), ("post_operator_norm",), ("ffn_norm",), ("post_ffn_norm",)),
    ((), ("post_attention_layernorm",), (), ("post_feedforward_layernorm",)),
)
STACKS = ("layers", "h", "blocks")  # what a decoder calls the list of its layers
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "ffn")
OUTPUTS = (  # linear layers that write to the stream
    "o_proj", "out_proj", "dense", "down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h", "fc_out",
)  # fmt: skip


def name_in(module, names):
    """The first of these names under which a module has something; empty if it has none."""
    return next((name for name in names if hasattr(module, name)), "")


def ends_of(linear):
    """How many features a linear layer reads and how many it writes; GPT-2's `Conv1D` stores its weight the other way round."""
    return list(linear.weight.shape) if isinstance(linear, Conv1D) else list(reversed(linear.weight.shape))


def norms_of(layer):
    """The norms of a layer, as in `NORMS`; nothing if their names are not known."""
    every = {norm for norms in NORMS for names in norms for norm in names}
    names = {name for name, _ in layer.named_children()} & every
    return next((norms for norms in NORMS if names == set().union(*norms)), ((), (), (), ()))


def _blocks(layer):
    """What a `skip` of the config names -> the block of a layer, and the norms that go with it."""
    norms = norms_of(layer)
    attention, mlp = name_in(layer, ATTENTIONS), name_in(layer, MLPS)
    return {"attention": (attention, *norms[0], *norms[1]), "mlp": (mlp, *norms[2], *norms[3])}


def has_narrow_heads(config):
    """Whether the heads of a layer together are not as wide as the stream, though its class makes them so (`keeps_head_dim`)."""
    keeps = getattr(config, "keeps_head_dim", False)
    return keeps and config.num_attention_heads * config.head_dim != config.hidden_size


def made(kind, config, index):
    """A layer or an attention by its class, which may take its number or not."""
    names = list(inspect.signature(kind).parameters)
    if "layer_idx" in names:
        return kind(config, layer_idx=index)
    return kind(config, index) if len(names) > 1 else kind(config)


def _built(layer_class, config, index):
    """A layer by its class. One with narrow heads gets an attention that is built for a stream as wide as these, with other ends."""
    if not has_narrow_heads(config):
        return made(layer_class, config, index)
    layer = made(layer_class, _OwnConfig(config, num_attention_heads=1, num_key_value_heads=1), index)
    name = name_in(layer, ATTENTIONS)
    narrow = _OwnConfig(config, hidden_size=config.num_attention_heads * config.head_dim)
    attention = made(type(getattr(layer, name)), narrow, index)
    for part, linear in list(attention.named_children()):
        if isinstance(linear, (nn.Linear, Conv1D)):
            ends = ends_of(linear)
            ends[part in OUTPUTS] = config.hidden_size
            turned = isinstance(linear, Conv1D)
            setattr(attention, part, Conv1D(*reversed(ends)) if turned else nn.Linear(*ends, bias=linear.bias is not None))
    setattr(layer, name, attention)
    return layer


def _fill(stack, layer_class, config, inner):
    """Append to `stack`, in place, the layers that `config` states; their attention reads `inner`, the config of their model, as it runs."""
    for index in range(config.num_hidden_layers):
        own = layer_config(config, index)
        layer = _built(layer_class, own, index)
        attention = getattr(layer, name_in(layer, ATTENTIONS) or "self_attn", None)
        if attention is not None:
            attention.config = inner  # so that a later choice of the attention kernel reaches every layer
            if config.is_heterogeneous:
                attention.config = _OwnConfig(inner, **{name: getattr(own, name) for name in config.per_layer_attributes})
        if getattr(config, "output_bias", False):
            _add_output_biases(layer)
        if getattr(config, "block_sums", 0):
            add_block_sums(layer, config.block_sums)
        for block, *norms in (_blocks(layer)[name] for name in getattr(own, "skip", ())):
            setattr(layer, block, _Nothing(getattr(getattr(layer, block), "layer_idx", None)))
            for norm in norms:
                setattr(layer, norm, nn.Identity())
        stack.append(layer)


class _Pruned(_WithoutLayers):
    def __init__(self, config):
        super().__init__(config)
        _fill(getattr(self, name_in(self, STACKS)), self._can_record_outputs["hidden_states"], config, config)
        self.post_init()


class _PrunedTowers:
    """A model of two towers, `text_model` and `vision_model`, each with a config of its own."""

    def __init__(self, config):
        towers = {"text_model": config.text_config, "vision_model": config.vision_config}
        depths = {name: tower.num_hidden_layers for name, tower in towers.items()}
        try:
            for tower in towers.values():
                tower.num_hidden_layers = 0
            super().__init__(config)
        finally:
            for name, tower in towers.items():
                tower.num_hidden_layers = depths[name]
        for name, tower in towers.items():
            model = getattr(self, name)
            model.config.num_hidden_layers = depths[name]
            _fill(model.encoder.layers, self._can_record_outputs["hidden_states"], tower, model.config)
        self.post_init()


def _add_output_biases(layer):
    for block in (getattr(layer, name) for name, *_ in _blocks(layer).values() if hasattr(layer, name)):
        for name, linear in [(name, child) for name, child in block.named_children() if name in OUTPUTS]:
            where = {"dtype": linear.weight.dtype, "device": linear.weight.device}
            setattr(block, name, nn.Linear(linear.in_features, linear.out_features, **where))


class _PrunedForCausalLM(_WithoutLayers):
    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        differing = self.config.per_layer_attributes or ()
        unread = "num_attention_heads" in differing and not self.config.allow_global_per_layer_attribute_access
        if unread or "num_key_value_heads" in differing:
            raise ValueError(
                "the layers of this model have different numbers of heads, and the cache of continuous batching has one number for "
                "all; call generate(), or serve the model with vLLM: vllm serve FOLDER --trust-remote-code --model-impl transformers"
            )
        return super().init_continuous_batching(*args, **kwargs)


class _PrunedForSequenceClassification:
    biased = False

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # the stock constructor would ask AutoModel, which does not have this file
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.biased)
        self.post_init()


class _PrunedForTokenClassification(_PrunedForSequenceClassification):
    biased = True

    def __init__(self, config):
        super().__init__(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)


KINDS = {
    "Config": _PrunedConfig,
    "LMHeadModel": _PrunedForCausalLM,  # as GPT-2 calls it
    "Model": _Pruned,
    "ForCausalLM": _PrunedForCausalLM,
    "ForSequenceClassification": _PrunedForSequenceClassification,
    "ForTokenClassification": _PrunedForTokenClassification,
}


def class_called(name, prefix, kinds, find):
    """The class of that name in the file that `find` looks into: the stock class whose name follows the prefix, built as its kind says."""
    stock = getattr(transformers, name.removeprefix(prefix), None) if name.startswith(prefix) else None
    kind = next((kind for kind in kinds if name.endswith(kind)), None)
    generic = getattr(modeling_layers, f"Generic{kind}", None)  # of classifiers; some models have others, such as GPT-2
    if stock is None or kind is None or (generic and not issubclass(stock, generic)):
        raise AttributeError(f"module {find.__module__!r} has no attribute {name!r}")
    fields = {"__module__": find.__module__}
    if kind != "Config":
        fields["config_class"] = find(prefix + stock.config_class.__name__)
    if kind not in ("Config", "Model"):
        fields["base_class"] = find(prefix + MODEL_MAPPING[stock.config_class].__name__)
    towers = kind == "Model" and {"text_config", "vision_config"} <= set(stock.config_class.sub_configs)
    return type(name, (_PrunedTowers if towers else kinds[kind], stock), fields)


@functools.cache
def __getattr__(name):
    """PrunedLlamaForCausalLM from LlamaForCausalLM of transformers, and so on for every model whose layers are built alike."""
    return class_called(name, "Pruned", KINDS, __getattr__)
