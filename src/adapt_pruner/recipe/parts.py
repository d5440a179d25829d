"""Finding a part by its name: the import path below its folder, `weights.taylor` for `score/weights.py`, `taylor`.

There is no registry: a function in one of the files of FOLDERS that returns what such parts return is one. Options go in brackets,
`weights.magnitude(norm=l2)`; where one part alone bears a name the file may be left out, `taylor`.
"""

import ast
import functools
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.errors import UsageError, nearest

__all__ = ["FOLDERS", "bind", "check", "names", "summaries"]

FOLDERS = {
    "metric": ("score", ("weights", "activations", "curvature")),
    "distance": ("score", ("blocks",)),
    "head_metric": ("score", ("blocks",)),
    "chooser": ("reduce", ("allocate", "rank", "depth")),
    "repair": ("reduce", ("closed_form",)),
    "objective": ("train", ("objectives",)),
    "schedule": ("train", ("schedules",)),
}
"""What a recipe key may name: its folder and the files in it that hold such parts."""


_SUPPLIED = (
    "debt",
    "dtype",
    "on_axis",
    "on_layer",
    "seed",
    "teacher",
    "warn",
)  # arguments that are not options: the run hands them in
_OF_THE_RECIPE = {  # key -> arguments that are recipe keys of their own, and where these stand
    "chooser": {"step": "step", "amplitude": "amplitude"},
    "schedule": {option: f"training.{option}" for option in ("warmup", "decay", "floor")},
}


def summaries(key: str) -> dict[str, str]:
    """Every part that the recipe key may name, with the first line of its docstring; imports nothing."""
    return {name: (ast.get_docstring(node) or "").partition("\n")[0] for name, node in _functions(key).items()}


def _functions(key: str) -> dict[str, ast.FunctionDef]:
    folder, files = FOLDERS[key]
    found = {}
    for file in files:
        tree = ast.parse((Path(__file__).parent.parent / folder / f"{file}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _is_part(key, node):
                found[f"{file}.{node.name}"] = node
    return found


def _is_part(key: str, node: ast.FunctionDef) -> bool:
    """Whether a function is a part: it returns what parts of that key return."""
    returns: dict[str, str | tuple[str, ...]] = {
        "metric": "Generator",
        "distance": ("Generator", "Scores"),
        "head_metric": "Scores",
        "chooser": "tuple[dict[str, int], Debt]",
        "repair": "None",
        "objective": "Tensor",
        "schedule": "float",
    }
    return node.returns is not None and ast.unparse(node.returns).startswith(returns[key])


def names(key: str) -> list[str]:
    """The full names of all parts that the recipe key may name."""
    return sorted(summaries(key))


def _split(key: str, written: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"\s*([\w.]+)\s*(?:\((.*)\))?\s*", written)
    if match is None:
        raise UsageError(f"{key} {written!r} is not the name of a part; write it like {names(key)[0]} or NAME(option=value)")
    name, options = match[1], {}
    for item in filter(None, (match[2] or "").split(",")):
        option, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"option {item.strip()!r} of {key} {name!r} has no value; write it like option=value")
        try:
            options[option.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"the value of option {option.strip()!r} of {key} {name!r} is not YAML; quote it") from error
    functions = _functions(key)
    known = sorted(functions)
    if name not in known:
        same = [full for full in known if full.rpartition(".")[2] == name]
        if len(same) > 1:
            raise UsageError(f"{key} {name!r} is the name of several; write one of {', '.join(same)}")
        if not same:
            raise UsageError(f"{key} {name!r} is not known; {nearest(name, known)}")
        name = same[0]
    arguments = functions[name].args
    takes = {argument.arg: argument.annotation for argument in arguments.kwonlyargs}
    elsewhere = {option: place for option, place in _OF_THE_RECIPE.get(key, {}).items() if option in takes}
    takes = {option: form for option, form in takes.items() if option not in _SUPPLIED and option not in elsewhere}
    for option, value in options.items():
        if option in elsewhere:
            raise UsageError(
                f"{option!r} is no option of {key} {name!r} but a key of the recipe; set {elsewhere[option]} instead"
            )
        if option not in takes:
            raise UsageError(f"{key} {name!r} has no option {option!r}; " + (nearest(option, takes) if takes else "it has none"))
        options[option] = _value(value, takes[option], what=f"option {option!r} of {key} {name!r}")
    return name, options


def _value(value: Any, annotation: ast.expr | None, *, what: str) -> Any:
    """A value as its annotation has it: of bool, int, float, str or None, numbers within what `Annotated` says of them."""
    if annotation is None:
        return value
    within = ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        annotation, told = annotation.slice.elts
        within = ast.literal_eval(told)
    kinds = ast.unparse(annotation).split(" | ")
    if value is None and "None" in kinds:
        return None
    if "bool" in kinds and isinstance(value, bool):
        return value
    if "int" in kinds and isinstance(value, int) and not isinstance(value, bool) and _lies(value, within):
        return value
    if "float" in kinds and (number := _number(value)) is not None and _lies(number, within):
        return value if isinstance(value, int) else number
    if "str" in kinds and isinstance(value, str):
        return value
    within = f" ({within})" if within else ""
    named = {
        "bool": "true or false",
        "int": f"a whole number{within}",
        "float": f"a number{within}",
        "str": "a word",
        "None": "null",
    }
    raise UsageError(f"{what} is {value!r}; it is {' or '.join(named[kind] for kind in kinds)}")


def _number(value: Any) -> float | None:
    """A finite number; YAML reads 1e-3, which has no point, as text."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is None or math.isfinite(number) else None


def _lies(number: float, within: str) -> bool:
    """Whether a number lies where these words say: `0 or more`, `above 0`, `0 to 1`; anywhere without words."""
    match within.split():
        case [low, "or", "more"]:
            return number >= float(low)
        case ["above", low]:
            return number > float(low)
        case [low, "to", high]:
            return float(low) <= number <= float(high)
    return True


def check(key: str, written: str) -> str:
    """The full spelling of a part named in a recipe.

    Raises:
        UsageError: there is no such part; the message names the nearest.
    """
    name, options = _split(key, written)
    spelled = ", ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
    return f"{name}({spelled})" if spelled else name


def bind(key: str, written: str, **context: Any) -> functools.partial[Any]:
    """The function a recipe names, with its own options and whatever of `context` it takes bound by keyword.

    Raises:
        UsageError: there is no such part, or it has no such option.
    """
    name, options = _split(key, written)
    folder, _ = FOLDERS[key]
    file, _, leaf = name.partition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(f"adapt_pruner.{folder}.{file}"), leaf)
    takes = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    bound = {option: value for option, value in context.items() if option in takes} | options
    return functools.partial(function, **bound)
