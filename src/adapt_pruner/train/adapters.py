"""LoRA: train a low-rank addition to every linear layer instead of its weights, and merge it before the next cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError


@contextmanager
def adapted(model: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> Iterator[None]:
    """While the context lasts, only A and B of W + (alpha / rank) · B A train; then they are merged into W, in place.

    Every linear layer except the head has such an addition. A is random and B zero at first, so the model does not change. The
    merge computes in the precision of the weights (float32). After an error the addition stays where it is.

    Args:
        model: causal LM; its weights do not train meanwhile.
        rank: columns of B.
        alpha: as above.
        dropout: share of a layer's inputs that the addition does not see in training.
        seed: of A.

    Raises:
        UsageError: peft is not installed.

    Source: LoRA, arXiv:2106.09685, by the peft library; Adapt-Pruner's `use_lora` has rank 128, alpha 16, dropout 0.05.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"training.lora needs the peft package; {to_install('lora')}") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    yield
    wrapped.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def base_name(name: str) -> str | None:
    """What a parameter of an adapted model is called in the model itself; None for a part of the addition."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")
