"""The config of a DeciLM folder: a Llama's, with what `block_configs` says of each layer.

Written by adapt-pruner beside the weights, for tools that take a config of model type nemotron-nas from the folder (vLLM) and
read `block_configs[i].attention.n_heads_in_group` and `block_configs[i].ffn.ffn_mult`; and for transformers, which builds
modeling_pruned.py's Llama from it. Needs transformers >= 5.14 and nothing else.

Licence: Apache-2.0.
"""

from types import SimpleNamespace

from transformers.models.llama.configuration_llama import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        per_layer = {}
        for index, block in enumerate(block_configs):
            width = -(-int(2 * block["ffn"]["ffn_mult"] * kwargs["hidden_size"] / 3) // 256) * 256
            kv_heads = kwargs["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            per_layer[index] = {"intermediate_size": width, "num_key_value_heads": kv_heads}
        kwargs |= {"per_layer_config": per_layer or None, "allow_global_per_layer_attribute_access": True}
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(attention=SimpleNamespace(**block["attention"]), ffn=SimpleNamespace(**block["ffn"]))
            for block in block_configs
        ]

    def to_dict(self):
        blocks = self.block_configs
        try:
            del self.block_configs
            data = super().to_dict()
        finally:
            self.block_configs = blocks
        data["block_configs"] = [{"attention": dict(vars(block.attention)), "ffn": dict(vars(block.ffn))} for block in blocks]
        return data
