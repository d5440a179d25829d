"""LoRA: train a low-rank addition to every linear layer instead of its weights, and merge it before the next cut."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.core.model.shelf import numbers_of
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError


@contextmanager
def adapted(model: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> Iterator[None]:
    """While the context lasts, only A and B of W + (alpha / rank) · B A train; then they are merged into W, in place.

    Every linear layer except the head has such an addition, in float32. A is random and B zero at first, so the model does not
    change. The merge goes layer by layer and computes in float32. Weights in bfloat16 are then rounded up or down at random:
    rounded to the nearest, most of them would not change. After an error the addition stays where it is.

    Args:
        model: causal LM; its weights do not train meanwhile.
        rank: columns of B.
        alpha: as above.
        dropout: share of a layer's inputs that the addition does not see in training.
        seed: of A, and of the rounding.

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
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    yield
    _merge(model, seed=seed)
    wrapped.unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


@torch.no_grad()
def _merge(model: Any, *, seed: int) -> None:
    """Add the additions to the weights, in place."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight
            with numbers_of(weight):
                weight.copy_(_rounded(weight.float() + module.get_delta_weight("default"), weight.dtype, generator))


def _rounded(numbers: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 numbers as `dtype`; as bfloat16 each becomes one of its two neighbours, such that it stays as it is on average."""
    if dtype != torch.bfloat16:
        return numbers.to(dtype)
    lost = torch.randint(0, 2**16, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator)
    return lost.add_(numbers.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(dtype)


def base_name(name: str) -> str | None:
    """What a parameter of an adapted model is called in the model itself; None for a part of the addition."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")
