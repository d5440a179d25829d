"""A DeciLM folder's model in transformers: modeling_pruned.py's Llama, its layers sized as `block_configs` says.

Written by adapt-pruner beside the weights, with configuration_decilm.py. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Licence: Apache-2.0.
"""

from .configuration_decilm import DeciLMConfig
from .modeling_pruned import PrunedLlamaForCausalLM, PrunedLlamaModel


class DeciLMModel(PrunedLlamaModel):
    config_class = DeciLMConfig


class DeciLMForCausalLM(PrunedLlamaForCausalLM):
    config_class = DeciLMConfig
    base_class = DeciLMModel
