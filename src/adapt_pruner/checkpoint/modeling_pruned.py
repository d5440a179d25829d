"""Causal language models whose layers differ in size, as `per_layer_config` in config.json says.

Made by adapt-pruner, which puts this file beside the weights; it needs transformers >= 5.15 and nothing else. Each class
is the stock one with decoder layers built from that layer's own config; `output_bias` in it says that the layers which write
to the stream have a bias. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0.
"""

from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model


class _WithoutLayers:
    """Runs the stock constructor with no decoder layers, since it would read sizes that differ between layers."""

    def __init__(self, config):
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers = num_layers


class _Pruned(_WithoutLayers):
    layer_class = None

    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            layer = self.layer_class(config.per_layer_config[index], index)
            layer.self_attn.config = config  # so that a later choice of the attention kernel reaches every layer
            if getattr(config, "output_bias", False):
                layer.self_attn.o_proj = _with_bias(layer.self_attn.o_proj)
                layer.mlp.down_proj = _with_bias(layer.mlp.down_proj)
            self.layers.append(layer)
        self.post_init()


def _with_bias(linear):
    return nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)


class _PrunedForCausalLM(_WithoutLayers):
    base_class = None

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base_class(config)
        self.post_init()


class PrunedGemma3TextModel(_Pruned, Gemma3TextModel):
    layer_class = Gemma3DecoderLayer


class PrunedGemma3ForCausalLM(_PrunedForCausalLM, Gemma3ForCausalLM):
    base_class = PrunedGemma3TextModel


class PrunedLlamaModel(_Pruned, LlamaModel):
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(_PrunedForCausalLM, LlamaForCausalLM):
    base_class = PrunedLlamaModel


class PrunedMistralModel(_Pruned, MistralModel):
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(_PrunedForCausalLM, MistralForCausalLM):
    base_class = PrunedMistralModel


class PrunedQwen2Model(_Pruned, Qwen2Model):
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(_PrunedForCausalLM, Qwen2ForCausalLM):
    base_class = PrunedQwen2Model


class PrunedQwen3Model(_Pruned, Qwen3Model):
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(_PrunedForCausalLM, Qwen3ForCausalLM):
    base_class = PrunedQwen3Model
