"""Causal language models sliced as SliceGPT does it: `sliced_hidden_size` in config.json says how wide the residual stream is.

Made by adapt-pruner, which puts this file and modeling_pruned.py beside the weights; they need transformers >= 5.14 and nothing
else. Each class is the stock one with a narrower stream, norms without a scale, and a linear map on both residual branches of
every layer, since the stream is in another basis before and after each block. `hidden_size` is the dense width, which the last
layer writes and the head reads. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0.
"""

import copy

import torch
from torch import nn
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

from .modeling_pruned import (
    PrunedLlamaConfig,
    PrunedMistralConfig,
    PrunedQwen2Config,
    PrunedQwen3Config,
    _PrunedForCausalLM,
    _PrunedForSequenceClassification,
    _PrunedForTokenClassification,
    _WithoutLayers,
    layer_config,
)


class BareRMSNorm(nn.Module):
    """x / √(|x|² / dense width + eps): what was sliced off counts as zero, and the scale is in the layers that follow."""

    def __init__(self, dense_size, eps):
        super().__init__()
        self.dense_size, self.eps = dense_size, eps

    def forward(self, x):
        wide = x.float() if x.dtype.itemsize < 4 else x
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.dense_size + self.eps)).to(x.dtype)


class _SlicedLayer:
    def __init__(self, config, layer_idx, leaving):
        narrow = copy.deepcopy(layer_config(config, layer_idx))
        narrow.hidden_size = config.sliced_hidden_size
        super().__init__(narrow, layer_idx)
        self.self_attn.config = config  # so that a later choice of the attention kernel reaches every layer
        self.input_layernorm = BareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BareRMSNorm(config.hidden_size, config.rms_norm_eps)
        biased = getattr(config, "output_bias", False)
        for block, name, size in ((self.self_attn, "o_proj", narrow.hidden_size), (self.mlp, "down_proj", leaving)):
            stock = getattr(block, name)
            setattr(block, name, nn.Linear(stock.in_features, size, bias=biased or stock.bias is not None))
        self.attention_shortcut = nn.Linear(narrow.hidden_size, narrow.hidden_size, bias=False)
        self.mlp_shortcut = nn.Linear(narrow.hidden_size, leaving, bias=False)

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class _Sliced(_WithoutLayers):
    layer_class = None

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.sliced_hidden_size, self.padding_idx)
        for index in range(config.num_hidden_layers):
            last = index == config.num_hidden_layers - 1
            self.layers.append(self.layer_class(config, index, config.hidden_size if last else config.sliced_hidden_size))
        self.norm = BareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class SlicedLlamaConfig(PrunedLlamaConfig):
    pass


class SlicedLlamaDecoderLayer(_SlicedLayer, LlamaDecoderLayer):
    pass


class SlicedLlamaModel(_Sliced, LlamaModel):
    config_class = SlicedLlamaConfig
    layer_class = SlicedLlamaDecoderLayer


class SlicedLlamaForCausalLM(_PrunedForCausalLM, LlamaForCausalLM):
    config_class = SlicedLlamaConfig
    base_class = SlicedLlamaModel


class SlicedLlamaForSequenceClassification(_PrunedForSequenceClassification, LlamaForSequenceClassification):
    config_class = SlicedLlamaConfig
    base_class = SlicedLlamaModel


class SlicedLlamaForTokenClassification(_PrunedForTokenClassification, LlamaForTokenClassification):
    config_class = SlicedLlamaConfig
    base_class = SlicedLlamaModel


class SlicedMistralConfig(PrunedMistralConfig):
    pass


class SlicedMistralDecoderLayer(_SlicedLayer, MistralDecoderLayer):
    pass


class SlicedMistralModel(_Sliced, MistralModel):
    config_class = SlicedMistralConfig
    layer_class = SlicedMistralDecoderLayer


class SlicedMistralForCausalLM(_PrunedForCausalLM, MistralForCausalLM):
    config_class = SlicedMistralConfig
    base_class = SlicedMistralModel


class SlicedMistralForSequenceClassification(_PrunedForSequenceClassification, MistralForSequenceClassification):
    config_class = SlicedMistralConfig
    base_class = SlicedMistralModel


class SlicedMistralForTokenClassification(_PrunedForTokenClassification, MistralForTokenClassification):
    config_class = SlicedMistralConfig
    base_class = SlicedMistralModel


class SlicedQwen2Config(PrunedQwen2Config):
    pass


class SlicedQwen2DecoderLayer(_SlicedLayer, Qwen2DecoderLayer):
    pass


class SlicedQwen2Model(_Sliced, Qwen2Model):
    config_class = SlicedQwen2Config
    layer_class = SlicedQwen2DecoderLayer


class SlicedQwen2ForCausalLM(_PrunedForCausalLM, Qwen2ForCausalLM):
    config_class = SlicedQwen2Config
    base_class = SlicedQwen2Model


class SlicedQwen2ForSequenceClassification(_PrunedForSequenceClassification, Qwen2ForSequenceClassification):
    config_class = SlicedQwen2Config
    base_class = SlicedQwen2Model


class SlicedQwen2ForTokenClassification(_PrunedForTokenClassification, Qwen2ForTokenClassification):
    config_class = SlicedQwen2Config
    base_class = SlicedQwen2Model


class SlicedQwen3Config(PrunedQwen3Config):
    pass


class SlicedQwen3DecoderLayer(_SlicedLayer, Qwen3DecoderLayer):
    pass


class SlicedQwen3Model(_Sliced, Qwen3Model):
    config_class = SlicedQwen3Config
    layer_class = SlicedQwen3DecoderLayer


class SlicedQwen3ForCausalLM(_PrunedForCausalLM, Qwen3ForCausalLM):
    config_class = SlicedQwen3Config
    base_class = SlicedQwen3Model


class SlicedQwen3ForSequenceClassification(_PrunedForSequenceClassification, Qwen3ForSequenceClassification):
    config_class = SlicedQwen3Config
    base_class = SlicedQwen3Model


class SlicedQwen3ForTokenClassification(_PrunedForTokenClassification, Qwen3ForTokenClassification):
    config_class = SlicedQwen3Config
    base_class = SlicedQwen3Model
