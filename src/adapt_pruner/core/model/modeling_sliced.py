"""Causal language models sliced as SliceGPT does it: `sliced_hidden_size` in config.json says how wide the residual stream is.

Made by adapt-pruner, which puts this file and modeling_pruned.py beside the weights; they need transformers >= 5.14 and nothing
else. Each class is the stock one with a narrower stream, norms without a scale, and a linear map on both residual branches of
every layer, since the stream is in another basis before and after each block. `hidden_size` is the dense width, which the last
layer writes and the head reads. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0.
"""

import copy
import functools

import torch
import transformers
from torch import nn

from .modeling_pruned import KINDS, _WithoutLayers, class_called, layer_config

STOCK = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose layers compute what `_SlicedLayer.forward` does


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
    def __init__(self, config):
        super().__init__(config)
        layer_class = __getattr__(f"Sliced{self._can_record_outputs['hidden_states'].__name__}")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.sliced_hidden_size, self.padding_idx)
        for index in range(config.num_hidden_layers):
            last = index == config.num_hidden_layers - 1
            self.layers.append(layer_class(config, index, config.hidden_size if last else config.sliced_hidden_size))
        self.norm = BareRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


@functools.cache
def __getattr__(name):
    """SlicedLlamaForCausalLM from LlamaForCausalLM of transformers, and so on."""
    if name not in {f"Sliced{stock}{kind}" for stock in STOCK for kind in (*KINDS, "DecoderLayer")}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("DecoderLayer"):
        model = getattr(transformers, name.removeprefix("Sliced").removesuffix("DecoderLayer") + "Model")
        return type(name, (_SlicedLayer, model._can_record_outputs["hidden_states"]), {"__module__": __name__})
    return class_called(name, "Sliced", KINDS | {"Model": _Sliced}, __getattr__)
