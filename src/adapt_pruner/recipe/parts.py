"""Find a part by its name: `weights.taylor` is the function `taylor` in `score/weights.py`.

There is no registry: a function with `@part("metric")` in a file of the folder is a metric. A reduction, a feed or a task is a
class, one per file, and has the name of its file: `units` for `reduce/units.py`. The files are read as text, not imported.
Options stand in brackets, `weights.magnitude(norm=l2)`. The file may be left out where only one part has that name: `taylor`.
"""

import ast
import functools
import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.parts import CHOICE, NEEDS
from adapt_pruner.core.system.strict_yaml import value_of
from adapt_pruner.errors import UsageError, nearest

__all__ = ["FOLDERS", "about", "bind", "check", "names", "needs", "needs_if_known", "reads", "summaries", "takes"]

FOLDERS = {
    "metric": "score",
    "distance": "score",
    "head_metric": "score",
    "chooser": "reduce/choose",
    "repair": "reduce/repair",
    "reduce": "reduce",
    "objective": "train",
    "schedule": "train",
    "feed": "data",
    "task": "data",
    "proposal": "reduce/propose",
    "solver": "reduce/zeros",
}
"""Kind of part, which is a key of a recipe, or `proposal` -> the folder whose files hold such parts."""


# arguments that are not options: the run supplies them
_SUPPLIED = ("debt", "dtype", "on_axis", "on_layer", "seed", "task", "teacher", "warn")
_OF_THE_RECIPE = {  # key -> arguments that are recipe keys of their own, and where these stand
    "chooser": {"step": "step", "amplitude": "amplitude"},
    "schedule": {option: f"training.{option}" for option in ("warmup", "decay", "floor")},
}
_READ = CHOICE | {"solver", "calibration"}  # what a reduction may read


@dataclass(frozen=True)
class _Part:
    """A part as its source describes it: `module` is its import path, `takes` its keyword arguments with their annotations."""

    module: str
    leaf: str
    about: str
    needs: frozenset[str]
    reads: frozenset[str]
    takes: dict[str, ast.expr | None]


@functools.cache
def _found(key: str) -> dict[str, _Part]:
    """Every part of a key by its full name."""
    folder, parts = FOLDERS[key], {}
    for path in sorted((Path(__file__).parent.parent / folder).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text, str(path)).body if "@part(" in text else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (declared := _declared(key, node)) is not None:
                name = f"{path.stem}.{node.name}" if isinstance(node, ast.FunctionDef) else path.stem
                about = (ast.get_docstring(node) or "").partition("\n")[0]
                parts[name] = _Part(
                    f"adapt_pruner.{folder.replace('/', '.')}.{path.stem}", node.name, about, *declared, _options(node)
                )
    return parts


def _declared(key: str, node: ast.FunctionDef | ast.ClassDef) -> tuple[frozenset[str], frozenset[str]] | None:
    """What the decorator says that a part needs and reads; None if the function is no part of this key.

    Raises:
        UsageError: the decorator names a kind of part, a need or a key that there is not, or is not written with literals.
    """
    for call in node.decorator_list:
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "part":
            continue
        try:
            keys = [ast.literal_eval(argument) for argument in call.args]
            sets = {keyword.arg: frozenset(ast.literal_eval(keyword.value)) for keyword in call.keywords}
        except ValueError as error:
            raise UsageError(
                f"@part of {node.name} is read without running it, so write its keys and needs as literals"
            ) from error
        needs = sets.get("needs", frozenset())
        reads = sets.get("reads", CHOICE if "chosen" in needs else frozenset())
        for words, possible in ((keys, FOLDERS), (sorted(needs), NEEDS), (sorted(reads), _READ)):
            for word in words:
                if word not in possible:
                    raise UsageError(f"@part of {node.name} names {word!r}, which is not known; {nearest(word, possible)}")
        if key in keys:
            return needs, reads
    return None


def _options(node: ast.FunctionDef | ast.ClassDef) -> dict[str, ast.expr | None]:
    """The keyword-only arguments of a function, or of a class's `__init__`."""
    if isinstance(node, ast.ClassDef):
        made = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "__init__"]
        return _options(made[0]) if made else {}
    return {argument.arg: argument.annotation for argument in node.args.kwonlyargs}


def summaries(key: str) -> dict[str, str]:
    """Every part that the recipe key may name, with the first line of its docstring; imports nothing."""
    return {name: entry.about for name, entry in _found(key).items()}


def needs(key: str, written: str) -> frozenset[str]:
    """What a part named in a recipe says that it needs (see `core.system.parts.part`)."""
    return _found(key)[_split(key, written)[0]].needs


def reads(key: str, written: str) -> frozenset[str]:
    """The keys of a recipe that a part named in a recipe says that it reads (see `core.system.parts.part`)."""
    return _found(key)[_split(key, written)[0]].reads


def needs_if_known(key: str, written: str) -> frozenset[str]:
    """What a part needs; nothing if this version lacks the part, since a run of another version may name it."""
    try:
        return needs(key, written)
    except UsageError:
        return frozenset()


def about(key: str, written: str) -> str:
    """The first line of the docstring of a part named in a recipe."""
    return _found(key)[_split(key, written)[0]].about


def takes(key: str, written: str, argument: str) -> bool:
    """Whether a part named in a recipe takes a keyword argument."""
    return argument in _found(key)[_split(key, written)[0]].takes


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
        options[option.strip()] = value_of(value, f"the value of option {option.strip()!r} of {key} {name!r}")
    functions = _found(key)
    full_names = sorted(functions)
    if name not in full_names:
        same = [full for full in full_names if full.rpartition(".")[2] == name]
        if len(same) > 1:
            raise UsageError(f"{key} {name!r} is the name of several parts; write one of {', '.join(same)}")
        if not same:
            raise UsageError(f"{key} {name!r} is not known; {nearest(name, full_names)}")
        name = same[0]
    takes = functions[name].takes
    elsewhere = {option: place for option, place in _OF_THE_RECIPE.get(key, {}).items() if option in takes}
    takes = {option: form for option, form in takes.items() if option not in _SUPPLIED and option not in elsewhere}
    for option, value in options.items():
        if option in elsewhere:
            raise UsageError(
                f"{option!r} is a key of the recipe, not an option of {key} {name!r}; set {elsewhere[option]} instead"
            )
        if option not in takes:
            raise UsageError(
                f"{key} {name!r} has no option {option!r}; " + (nearest(option, takes) if takes else "it takes no options")
            )
        options[option] = _value(value, takes[option], what=f"option {option!r} of {key} {name!r}")
    return name, options


def _value(value: Any, annotation: ast.expr | None, *, what: str) -> Any:
    """A value checked against its annotation: bool, int, float, str or None; `Annotated` limits numbers, `Literal` words.

    Raises:
        UsageError: the value is none of these, or the annotation is another one, so that a recipe cannot give the option.
    """
    if annotation is None:
        return value
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        words = ast.literal_eval(annotation.slice)
        if value in words:
            return value
        raise UsageError(
            f"{what} is {value!r}; " + (nearest(value, words) if isinstance(value, str) else f"known: {', '.join(words)}")
        )
    within = ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        annotation, limit = annotation.slice.elts
        within = ast.literal_eval(limit)
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
    counting = f"number{within}"
    named = {"bool": "true or false", "int": f"a whole {counting}", "float": f"a {counting}", "str": "a word", "None": "null"}
    if unknown := [kind for kind in kinds if kind not in named]:
        raise UsageError(
            f"{what} cannot be given in a recipe, because its type {unknown[0]} is none of {', '.join(named)} and Literal; leave it out"
        )
    raise UsageError(f"{what} is {value!r}; give {' or '.join(named[kind] for kind in kinds)}")


def _number(value: Any) -> float | None:
    """A finite number, else None. YAML reads 1e-3 as text, since it has no point."""
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
        case []:
            return True
    raise ValueError(f"the range {within!r} of an option is not written like '0 or more', 'above 0' or '0 to 1'")


def check(key: str, written: str) -> str:
    """The full spelling of a part named in a recipe.

    Raises:
        UsageError: there is no such part; the message names the nearest.
    """
    name, options = _split(key, written)
    spelled = ", ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
    return f"{name}({spelled})" if spelled else name


def bind(key: str, written: str, /, **context: Any) -> functools.partial[Any]:
    """The part that a recipe names, with its options bound, and those values of `context` that it takes.

    Raises:
        UsageError: there is no such part, or it has no such option.
    """
    name, options = _split(key, written)
    entry = _found(key)[name]
    made: Callable[..., Any] = getattr(importlib.import_module(entry.module), entry.leaf)
    return functools.partial(made, **{option: value for option, value in context.items() if option in entry.takes} | options)
