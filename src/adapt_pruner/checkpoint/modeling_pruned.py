"""Causal language models whose layers differ in size, as `per_layer_config` in config.json says.

Made by adapt-pruner, which puts this file beside the weights; it needs transformers >= 5.14 and nothing else. Each class
is the stock one, but each decoder layer is built from its own config. A layer's `skip` names what it lacks: attention, mlp
and the norms of these. With `output_bias` the linear layers that write to the stream have a bias. With `block_sums: k` each
linear layer also adds B·s, where s are the sums of k consecutive inputs each. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

config.json has the model type `pruned_llama` instead of `llama`, and so on. A stock class would otherwise load the folder and compute
something else; so transformers refuses it and says what to pass.

Licence: Apache-2.0.
"""

import json

import torch
import transformers
from torch import nn

if not hasattr(transformers.LlamaConfig, "is_heterogeneous"):  # before the imports below, some of which old versions lack
    raise ImportError(
        f"this model builds each layer from its own config, which transformers {transformers.__version__} cannot do; it needs "
        "transformers >= 5.14: pip install --upgrade 'transformers>=5.14'"
    )

from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
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


class PrunedGemma3TextConfig(_PrunedConfig, Gemma3TextConfig):
    pass


class PrunedLlamaConfig(_PrunedConfig, LlamaConfig):
    pass


class PrunedMistralConfig(_PrunedConfig, MistralConfig):
    pass


class PrunedPhi3Config(_PrunedConfig, Phi3Config):
    pass


class PrunedQwen2Config(_PrunedConfig, Qwen2Config):
    pass


class PrunedQwen3Config(_PrunedConfig, Qwen3Config):
    pass


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
        cache = others.get("cache", others.get("past_key_values"))  # transformers' present name, and its former one
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


class _Pruned(_WithoutLayers):
    layer_class = None
    blocks = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}

    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            own = layer_config(config, index)
            layer = self.layer_class(own, index)
            layer.self_attn.config = self.attention_config(config, own)
            if getattr(config, "output_bias", False):
                layer.self_attn.o_proj = _with_bias(layer.self_attn.o_proj)
                layer.mlp.down_proj = _with_bias(layer.mlp.down_proj)
            if getattr(config, "block_sums", 0):
                add_block_sums(layer, config.block_sums)
            for block, *norms in (self.blocks[name] for name in getattr(own, "skip", ())):
                setattr(layer, block, _Nothing(getattr(getattr(layer, block), "layer_idx", None)))
                for norm in norms:
                    setattr(layer, norm, nn.Identity())
            self.layers.append(layer)
        self.post_init()

    def attention_config(self, config, own):
        return config  # so that a later choice of the attention kernel reaches every layer


def _with_bias(linear):
    return nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)


class _PrunedForCausalLM(_WithoutLayers):
    base_class = None

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base_class(config)
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
    base_class = None

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # the stock constructor would ask AutoModel, which does not have this file
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class _PrunedForTokenClassification:
    base_class = None

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class PrunedGemma3TextModel(_Pruned, Gemma3TextModel):
    config_class = PrunedGemma3TextConfig
    layer_class = Gemma3DecoderLayer
    blocks = {
        "attention": ("self_attn", "input_layernorm", "post_attention_layernorm"),
        "mlp": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    }


class PrunedGemma3ForCausalLM(_PrunedForCausalLM, Gemma3ForCausalLM):
    config_class = PrunedGemma3TextConfig
    base_class = PrunedGemma3TextModel


class PrunedGemma3TextForSequenceClassification(_PrunedForSequenceClassification, Gemma3TextForSequenceClassification):
    config_class = PrunedGemma3TextConfig
    base_class = PrunedGemma3TextModel


class PrunedLlamaModel(_Pruned, LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(_PrunedForCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    base_class = PrunedLlamaModel


class PrunedLlamaForSequenceClassification(_PrunedForSequenceClassification, LlamaForSequenceClassification):
    config_class = PrunedLlamaConfig
    base_class = PrunedLlamaModel


class PrunedLlamaForTokenClassification(_PrunedForTokenClassification, LlamaForTokenClassification):
    config_class = PrunedLlamaConfig
    base_class = PrunedLlamaModel


class PrunedMistralModel(_Pruned, MistralModel):
    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(_PrunedForCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    base_class = PrunedMistralModel


class PrunedMistralForSequenceClassification(_PrunedForSequenceClassification, MistralForSequenceClassification):
    config_class = PrunedMistralConfig
    base_class = PrunedMistralModel


class PrunedMistralForTokenClassification(_PrunedForTokenClassification, MistralForTokenClassification):
    config_class = PrunedMistralConfig
    base_class = PrunedMistralModel


class PrunedPhi3Model(_Pruned, Phi3Model):
    config_class = PrunedPhi3Config
    layer_class = Phi3DecoderLayer

    def attention_config(self, config, own):
        return _OwnConfig(config, num_attention_heads=own.num_attention_heads)


class PrunedPhi3ForCausalLM(_PrunedForCausalLM, Phi3ForCausalLM):
    config_class = PrunedPhi3Config
    base_class = PrunedPhi3Model


class PrunedPhi3ForSequenceClassification(_PrunedForSequenceClassification, Phi3ForSequenceClassification):
    config_class = PrunedPhi3Config
    base_class = PrunedPhi3Model


class PrunedPhi3ForTokenClassification(_PrunedForTokenClassification, Phi3ForTokenClassification):
    config_class = PrunedPhi3Config
    base_class = PrunedPhi3Model


class PrunedQwen2Model(_Pruned, Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(_PrunedForCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    base_class = PrunedQwen2Model


class PrunedQwen2ForSequenceClassification(_PrunedForSequenceClassification, Qwen2ForSequenceClassification):
    config_class = PrunedQwen2Config
    base_class = PrunedQwen2Model


class PrunedQwen2ForTokenClassification(_PrunedForTokenClassification, Qwen2ForTokenClassification):
    config_class = PrunedQwen2Config
    base_class = PrunedQwen2Model


class PrunedQwen3Model(_Pruned, Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(_PrunedForCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    base_class = PrunedQwen3Model


class PrunedQwen3ForSequenceClassification(_PrunedForSequenceClassification, Qwen3ForSequenceClassification):
    config_class = PrunedQwen3Config
    base_class = PrunedQwen3Model


class PrunedQwen3ForTokenClassification(_PrunedForTokenClassification, Qwen3ForTokenClassification):
    config_class = PrunedQwen3Config
    base_class = PrunedQwen3Model
