"""What is to be compared: methods, sizes, draws and texts. Each is checked before any work. Every combination of them is a cell."""

import hashlib
import itertools
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError, option
from adapt_pruner.recipe import ALIASES, Recipe, read
from adapt_pruner.recipe.overrides import keys_of, refuse_set_twice

_KEYS = {
    "budget": "params", "sparsity": "sparsity", "method": "methods", "seed": "draws", "calibration.ids": "calibration_ids",
    "device": "device", "dtype": "dtype",
}  # fmt: skip
_DRAWS = 3
_ANY_SIZE = 10**18  # larger than any number of parameters
_SAYS_NOTHING = {"about", "paper", "model", "parallel", "checkpoint_minutes", "keep_checkpoints", "report_to", "evaluation"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be compared: the options of `api.measuring.compare`. All methods share every setting here."""

    model: str
    methods: tuple[str, ...]
    params: tuple[str, ...]
    texts: tuple[str, ...]
    sparsity: tuple[str, ...] = ()
    calibration: str | None = None
    calibration_ids: tuple[str, ...] = ()
    calibration_samples: int | None = None
    calibration_length: int | None = None
    draws: int | None = None
    window: int = 512
    max_windows: int | None = 40
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def _calibration(self) -> dict[str, Any]:
        """Dotted keys of calibration that options have set in all recipes."""
        values = {"source": self.calibration, "samples": self.calibration_samples, "length": self.calibration_length}
        return {f"calibration.{key}": value for key, value in values.items() if value is not None}

    @property
    def num_draws(self) -> int:
        """Number of cells per method and size."""
        return len(self.calibration_ids) or self.draws or _DRAWS

    def checked(self) -> "Request":
        """This request without repetitions, after a check of its words; no model or text is read for it.

        Raises:
            UsageError: a method, size or key is unknown or missing, or one option has no effect because of another.
        """
        if self.calibration_ids and self.draws is not None:
            raise UsageError(
                f"each file of {option('calibration_ids')} is a draw, so {option('draws', self.draws)} would be ignored; leave one out"
            )
        if not self.params and not self.sparsity:
            raise UsageError(
                f"compare needs sizes to compare at; add {option('params', '80%,60%')}, or {option('sparsity', '50%,2:4')} for methods that "
                "make zeros"
            )
        for words, name in ((self.methods, "methods"), (self.params or self.sparsity, "params"), (self.texts, "text")):
            if not any(map(str.strip, words)):
                raise UsageError(f"{option(name)} is empty; give at least one")
        for size in filter(None, self.params):
            Budget.parse(size, dense=_ANY_SIZE, decoder=_ANY_SIZE, outside=0, experts=_ANY_SIZE)
        patterns = tuple(str(Pattern.parse(written)) for written in self.sparsity)
        for key in sorted(keys_of(self.overrides) & {"model", *_KEYS}):
            instead = option(_KEYS[key]) if key in _KEYS else "MODEL"
            raise UsageError(f"{option('settings')} cannot set {key}, since compare sets {key} for each cell; use {instead}")
        refuse_set_twice(self._calibration, self.overrides)
        request = replace(
            self, methods=_once(tuple(ALIASES.get(name, name) for name in self.methods)), params=_once(self.params), texts=_once(self.texts),
            sparsity=_once(patterns), calibration_ids=_once(self.calibration_ids), draws=None if self.calibration_ids else self.num_draws,
        )  # fmt: skip
        zeros = [method for method, recipe in request.recipes.items() if recipe.makes_zeros]
        units = [method for method in request.methods if method not in zeros]
        kinds = ((units, request.params, "params", "80%"), (zeros, request.sparsity, "sparsity", "50%,2:4"))
        for methods, sizes, name, example in kinds:
            if methods and not sizes:
                need = f"{', '.join(methods)} need{'s' * (len(methods) == 1)}"
                raise UsageError(f"{need} {option(name)}; add it, for example {option(name, example)}")
        for methods, sizes, name, _ in kinds:
            if sizes and not methods:
                raise UsageError(f"no method takes {option(name, ','.join(sizes))}; leave it out, or name a method that does")
        for method, recipe in request.recipes.items():
            if recipe.makes_zeros and recipe.solver is None:
                raise UsageError(f"compare prunes and does not train, and {method} learns its zeros in training; leave it out")
            if recipe.latency:
                raise UsageError(
                    f"compare prunes to the sizes of {option('params')}, and the recipe of {method} sets a latency; leave latency out"
                )
            if recipe.training.tokens:
                raise UsageError(f"compare prunes and does not train, and the recipe of {method} trains; leave its training out")
        return request

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Method -> its recipe, which all its cells share; a setting that the method does not read is left out.

        Raises:
            UsageError: there is no such method or key, a value is out of range, or no method reads a setting.
        """
        ids = {"calibration.ids": self.calibration_ids[0]} if self.calibration_ids else {}
        values: dict[str, Any] = {"model": self.model, "device": self.device, "dtype": self.dtype, **self._calibration, **ids}
        values["evaluation.prompts"] = []  # answers take time, and a comparison does not show them
        shared = {
            method: read({}, values=values | {"method": method}, overrides=self.overrides, shared=True) for method in self.methods
        }
        unread = {method: recipe.unread() for method, recipe in shared.items()}
        for method, recipe in shared.items():
            recipe.refuse([key for key in unread[method] if all(key in keys for keys in unread.values())])
        return {method: recipe.fitted() for method, recipe in shared.items()}

    def cells(self, dense: int, decoder: int, experts: int = 0) -> list["Cell"]:
        """Every cell of the comparison: the first draw of all cells before the second of any, large sizes before small ones.

        Args:
            dense: parameters of the model.
            decoder: those of them in its decoder layers.
            experts: those of them that belong to experts which a router chooses.

        Raises:
            UsageError: a size is above the model's own.
        """
        whole = {"dense": dense, "decoder": decoder, "outside": dense - decoder, "experts": experts}
        kept = {Budget.parse(size, **whole).keep for size in self.params}
        sizes = [*((size, "") for size in sorted(kept, reverse=True)), *((dense, pattern) for pattern in self.sparsity)]
        cells = []
        for draw, (size, sparsity), method in itertools.product(range(self.num_draws), sizes, self.methods):
            recipe = self.recipes[method]
            if recipe.makes_zeros is not bool(sparsity):
                continue
            changed: dict[str, Any] = {"seed": draw, **({"sparsity": sparsity} if sparsity else {"budget": str(size)})}
            if recipe.calibration.ids is not None:
                changed["calibration"] = recipe.calibration.model_copy(update={"ids": self.calibration_ids[draw]})
            cells.append(Cell(method, size, draw, recipe.model_copy(update=changed), sparsity))
        return cells


@dataclass(frozen=True)
class Cell:
    """One method that prunes to one size with one draw of calibration text.

    Attributes:
        method: its name.
        size: the most parameters that may be left.
        draw: its number, from 0.
        recipe: the recipe that is run.
        sparsity: for a method that makes zeros; empty for others.
    """

    method: str
    size: int
    draw: int
    recipe: Recipe
    sparsity: str = ""

    def name(self, read_by_it: dict[str, Any]) -> str:
        """The cell's own name: method, size, draw, and a fingerprint of the recipe and of everything that the cell reads.

        Args:
            read_by_it: plain data that depends on the model, the calibration text and the windows.
        """
        recipe = {key: value for key, value in self.recipe.model_dump(mode="json").items() if key not in _SAYS_NOTHING}
        recipe["calibration"] |= {"ids": None}  # the ids themselves are in `read_by_it`, so the file may move
        digest = hashlib.sha256(to_json({"recipe": recipe, **read_by_it}).encode()).hexdigest()
        far = re.sub(r"\W", "", self.sparsity.replace(":", "of")) or str(self.size)
        return f"{self.method}-{far}-{self.draw}-{digest[:12]}"


def _once(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (word.strip() for word in words))))
