"""One file per family of models. It says where the axes are and touches no weight.

A family file has

    MODEL_TYPES   the `config.model_type` values it speaks for
    axes(model)   every axis of such a model, sizes read from its weights
    tiny()        name -> config of tiny random models of every layout; the contract tests run over them

and, if checkpoints bring code of their own that stock code can replace,

    stock_config(raw)   the stock config equivalent to a config.json, given as plain data

A family file is found because it is in this folder; there is no list to add it to.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torch import nn

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.errors import UsageError, nearest

__all__ = ["all_families", "axes", "family_of", "is_known", "is_sliced", "model_types", "sizes", "stock_config"]


def all_families() -> list[ModuleType]:
    """Every family file, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return [module for module in modules if hasattr(module, "MODEL_TYPES")]


def model_types() -> list[str]:
    """All model types that a family file speaks for, sorted."""
    return sorted(name for family in all_families() for name in family.MODEL_TYPES)


def is_known(config: Any) -> bool:
    """Whether a family file speaks for a transformers config."""
    return config.model_type in model_types()


def family_of(config: Any) -> ModuleType:
    """The family file that speaks for a transformers config.

    Raises:
        UsageError: no family does; the message says which are known.
    """
    for family in all_families():
        if config.model_type in family.MODEL_TYPES:
            return family
    raise UsageError(
        f"model type {config.model_type!r} belongs to no known family ({nearest(config.model_type, model_types())}); "
        "a new family is one file: see docs/extending.md"
    )


def axes(model: nn.Module) -> tuple[Axis, ...]:
    """Every axis of a model, with the sizes that its weights have now."""
    all_axes: tuple[Axis, ...] = family_of(model.config).axes(model)
    return all_axes


def sizes(model: nn.Module) -> dict[str, int]:
    """Axis name -> units a model has along it now."""
    return {axis.name: axis.size for axis in axes(model)}


def is_sliced(config: Any) -> bool:
    """Whether a model with this config is sliced (`reduce.slice`): its stream changes its basis at every block."""
    return getattr(config, "sliced_hidden_size", None) is not None


def stock_config(raw: dict[str, Any]) -> Any:
    """The stock config that a config.json is equivalent to; None if its type is already a stock one.

    Raises:
        UsageError: no stock code computes what the checkpoint's own code does.
    """
    for family in all_families():
        if raw.get("model_type") in family.MODEL_TYPES and hasattr(family, "stock_config"):
            return family.stock_config(raw)
    return None
