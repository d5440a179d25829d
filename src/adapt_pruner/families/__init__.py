"""One file per family of models. It says where the axes are and touches no weight.

A family file has

    MODEL_TYPES   the `config.model_type` values it speaks for
    axes(model)   every axis of such a model, sizes read from its weights
    tiny()        name -> config of tiny random models of every layout; the contract tests run over them

if its models learn something else than the next token,

    TASK   what they learn, a task of `data/`

and, if checkpoints bring code of their own that stock code can replace,

    stock_config(raw)   the stock config equivalent to a config.json, given as plain data

A family file is found because it is in this folder; there is no list to add it to.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import UsageError, nearest
from adapt_pruner.families import admission, convention
from adapt_pruner.families.convention import is_sliced as is_sliced


def all_families() -> list[ModuleType]:
    """Every family file, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return [module for module in modules if hasattr(module, "MODEL_TYPES")]


def model_types() -> list[str]:
    """All model types that a family file speaks for, sorted."""
    return sorted(name for family in all_families() for name in family.MODEL_TYPES)


def is_known(config: Any) -> bool:
    """Whether models of a transformers config can be pruned: a family file speaks for them, or the law admits them."""
    return family_of(config) is not None or bool(admission.verdict_of(config).admitted)


def family_of(config: Any) -> ModuleType | None:
    """The family file that speaks for a transformers config; None if none does, so that the law has to admit its axes."""
    return next((family for family in all_families() if config.model_type in family.MODEL_TYPES), None)


def task_of(config: Any) -> str:
    """What models of a transformers config learn, by the name of the task."""
    return getattr(family_of(config), "TASK", "causal_lm")


def summary(config: Any) -> str | None:
    """What a check found that may shrink and what stays, in a line; None where a family file speaks for models of a config."""
    if family_of(config) is not None:
        return None
    verdict = admission.verdict_of(config)
    stays = f"; {', '.join(verdict.refused)} stay" if verdict.refused else ""
    return f"{', '.join(verdict.admitted)} may shrink (checked){stays}"


def checked() -> dict[str, dict[str, Any]]:
    """Model type -> what benchmarks/models.py found: `axes` that may shrink, `stays`: axis -> why not, `unequal`: layers may differ."""
    types: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("checked.json"))["types"]
    return types


def why_unknown(config: Any) -> str:
    """A sentence on why models of a transformers config cannot be pruned."""
    kind = config.model_type
    refused = admission.verdict_of(config).refused
    why = (
        "; ".join(reason if axis == "all" else f"{axis}: {reason}" for axis, reason in refused.items())
        or "its modules have other names than those of a Llama, GPT-2 or GPT-NeoX"
    )
    return (
        f"nothing of a model of type {kind!r} may be removed, as a tiny model of its class shows ({why}); a family file can speak for it: "
        f"see docs/extending.md ({nearest(kind, model_types())})"
    )


def left_whole(config: Any) -> dict[str, str]:
    """Kinds of axes along which models of a config may not shrink, each with the reason; empty where a family file speaks for them."""
    return {} if family_of(config) is not None else admission.verdict_of(config).refused


def axes(model: nn.Module) -> tuple[Axis, ...]:
    """Every axis along which a model may shrink, with the sizes that its weights have now; and `layers`, even if these stay.

    Raises:
        UsageError: there is none.
    """
    family = family_of(model.config)
    if family is not None:
        all_axes: tuple[Axis, ...] = family.axes(model)
        return all_axes
    admitted = admission.verdict_of(model.config).admitted
    if not admitted:
        raise UsageError(why_unknown(model.config))
    return tuple(axis for axis in convention.axes(model) if axis.kind in (*admitted, "layers") or axis.size <= axis.least)


def declared(model: nn.Module) -> tuple[Axis, ...]:
    """Every axis of a model, also those along which it may not shrink; for counting what it is made of."""
    return axes(model) if family_of(model.config) is not None else convention.axes(model)


def sizes(model: nn.Module) -> dict[str, int]:
    """Axis name -> units a model has along it now."""
    return {axis.name: axis.size for axis in axes(model)}


def stock_config(raw: dict[str, Any]) -> Any:
    """The stock config that a config.json is equivalent to; None if its type is already a stock one.

    Raises:
        UsageError: no stock code computes what the checkpoint's own code does.
    """
    for family in all_families():
        if raw.get("model_type") in family.MODEL_TYPES and hasattr(family, "stock_config"):
            return family.stock_config(raw)
    return None
