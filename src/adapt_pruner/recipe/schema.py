"""`Recipe`: every choice of a run in one validated, frozen description, read from YAML and written as YAML.

A recipe file may hold any of the keys below. A key that it leaves out comes from its method, or else from the defaults. On the
command line `--set KEY=VALUE` overrides one key (`--set training.lr=1e-4`). A paper's method is itself a recipe that names its
parts (`methods/*.yaml`), and `method: NAME` fills in its keys where a recipe is silent.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from adapt_pruner.core.events import DEFAULT_TEXT
from adapt_pruner.core.model.budget import check_written
from adapt_pruner.core.model.kinds import USUAL, Prunable
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.strict_yaml import read_keys, value_of
from adapt_pruner.errors import UsageError, nearest, settings
from adapt_pruner.recipe import parts
from adapt_pruner.recipe.fitting import check_fitting, sentence, unread
from adapt_pruner.recipe.overrides import keys_of, refuse_lost
from adapt_pruner.recipe.tables import Calibration, Evaluation, Frozen, Grow, Training, Vocabulary, part_of

__all__ = [
    "ALIASES",
    "PAPERS",
    "Recipe",
    "builtin",
    "check_precision",
    "differing",
    "methods",
    "read",
]

ALIASES = {"best": "adaptive-ls-v1"}
"""Alias -> the method that it stands for in this version; the alias stays when the method changes."""
_METHOD = ALIASES["best"]  # of a recipe that names none
_GROWTH = "cpm-2"  # of a recipe that grows a model and names neither a method nor a size
_OF_THE_MACHINE = (
    "device",
    "offload",
    "parallel",
    "minutes",
    "checkpoint_minutes",
    "keep_checkpoints",
    "report_to",
    "about",
    "paper",
)
PAPERS = Path(__file__).parent / "methods" / "papers.bib"
"""BibTeX of the papers that the methods come from."""
_TEXTS = {"training.source", "evaluation.source", "evaluation.tasks", "calibration.ids"}
_DECIDING = {*parts.FOLDERS, *_TEXTS, "method", "axes", "latency", "grow"}  # keys that decide which others are read
_ROW, _SHARED = "row", "shared"  # contexts of validation: of a bare method, and of settings that several recipes share
_WIDEST = 2**20  # neurons
_TABLES = ("grow", "vocabulary", "calibration", "training", "training.lora", "evaluation")


def check_precision(name: Any) -> str:
    """The number format of matrix products, if it is a known one; a recipe checks its own.

    Raises:
        UsageError: the name is not known.
    """
    formats = get_args(Precision)
    if name not in formats:
        raise UsageError(f"dtype {name!r} is not known; {nearest(str(name), formats)}")
    return str(name)


def _checked_multiple(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _WIDEST):
        raise ValueError(f"multiple_of {value!r} is not a width; write auto, or a whole number from 1 to {_WIDEST:,}")
    return value


Precision = Literal["auto", "float32", "bfloat16"]
Sparsity = Annotated[str, BeforeValidator(lambda value: str(Pattern.parse(value)) if value not in (None, "") else "")]
"""A pattern of zeros as people write it; empty stands for none."""

Written = Annotated[str, BeforeValidator(lambda value: check_written(value) if value not in (None, "") else "")]
"""A budget as people write it; empty stands for no budget."""


class Recipe(Frozen):
    """A whole run: which model is pruned, how far, in which steps, by which parts, and how it is trained between cuts."""

    about: str = Field("", description="one line of description for people")
    paper: str = Field("", description="where the method comes from")
    method: str = Field(_METHOD, description="name in `adapt-pruner methods`; gives the keys that the recipe leaves out")
    model: str = Field("", description="folder, .gguf file, packaged model or hub id")
    init: Literal["model", "random"] = Field(
        "model",
        description="weights at the start: those of the model, or random ones of its shape (with budget 100%, a model from scratch)",
    )
    budget: Written = Field("", description="parameters to keep: 110M, 110_000_000 or 80%")
    sparsity: Sparsity = Field(
        "",
        description="instead of budget, for methods that make zeros: the share of zeros in the linear layers, 50%, or a pattern, 2:4",
    )
    latency: str = Field(
        "",
        description="instead of budget: time that the pruned model may take, as a share of the dense model's, like 0.7x; "
        "measured here",
    )
    latency_of: Literal["prefill", "decode"] = Field(
        "prefill", description="what latency times: reading a prompt, or writing the answer"
    )
    task: part_of("task") = Field("causal_lm", description="what the model learns: its batches, its loss and how it is measured")  # type: ignore[valid-type]
    stages: int = Field(
        1, ge=1, le=1000, description="rounds of pruning and training; the parameter targets fall linearly from round to round"
    )
    axes: tuple[Prunable, ...] = Field(
        USUAL, min_length=1, description=f"kinds of units that may be removed: {', '.join(get_args(Prunable))}"
    )
    grow: Grow | None = Field(
        None,
        description="what the model gains first, by copying: {experts: 4}, or vocabulary, residual, neurons, kv_heads, layers; null for nothing",
    )
    vocabulary: Vocabulary | None = Field(
        None, description="tokens to keep: {source: SPEC, keep: 16384}, or min_uses instead of keep; null keeps all"
    )
    # fmt: off
    metric: part_of("metric") = Field("weights.taylor", description="what a unit is worth")  # type: ignore[valid-type]
    sequential_scoring: bool = Field(False, description="score each layer on the output of the already pruned layers below it")
    distance: part_of("distance", str | None) = Field(None, description="what a layer or block is worth; null if the chooser needs no such score")  # type: ignore[valid-type]
    head_metric: part_of("head_metric", str | None) = Field(None, description="what a KV head is worth when its layer is about to lose one; null takes the scores of metric")  # type: ignore[valid-type]
    chooser: part_of("chooser") = Field("allocate.adaptive", description="how much each axis gives up")  # type: ignore[valid-type]
    repair: part_of("repair", str | None) = Field(None, description="how the remaining weights make up for a cut, before it is made; null repairs nothing")  # type: ignore[valid-type]
    reduce: part_of("reduce") = Field("units", description="how the model reaches a stage's budget, or how its weights become zero; `adapt-pruner methods` names what each method uses")  # type: ignore[valid-type]
    solver: part_of("solver", str | None) = Field(None, description="for reduce=sparse: which weights become zero, and how the others make up for it")  # type: ignore[valid-type]
    # fmt: on
    step: float = Field(
        0.02, ge=1e-4, le=1, description="share of an axis's start size removed per iteration; 1 prunes in one shot"
    )
    amplitude: float = Field(
        0.02, ge=0, le=1, description="how much a layer's importance changes its step; 0 makes all layers equal"
    )
    equal_widths: bool = Field(
        False, description="give all layers the same number of neurons and of heads, so that the result is a plain folder"
    )
    multiple_of: Annotated[int | Literal["auto"], BeforeValidator(_checked_multiple)] = Field(
        1,
        description="keep a multiple of this many neurons in each layer: 64 runs fast, 256 quantises well; auto is 64, 32 where layers have "
        "fewer than 1,024, and 1 below 256",
    )
    debt: Literal["carry", "reset"] = Field(
        "carry", description="fractions of a unit that are still owed: carried through the run, or forgotten after each stage"
    )
    moments: Literal["carry", "reset"] = Field(
        "carry", description="AdamW moments at a cut: cut along with their weights, or forgotten"
    )
    calibration: Calibration = Field(default_factory=Calibration)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    seed: int = Field(
        0, ge=0, lt=2**31, description="seed of all random draws; the same seed gives the same model on the same machine"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="what each of several processes holds while training: the whole model, or a share of it"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="minutes that the run may take from its start to its result: training and its learning-rate curve end in "
        "time; what is not pruned after half of them goes in one cut",
    )
    checkpoint_minutes: float = Field(
        30.0, ge=0, description="minutes between checkpoints within a stage; 0 saves after every step"
    )
    keep_checkpoints: int = Field(
        2,
        ge=0,
        description="number of checkpoints that stay on disk, the newest ones; 0 keeps two until the run ends, and then none",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (), description="trackers that also receive the figures, besides log.jsonl"
    )
    device: str = Field("auto", description="device to run on: auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    offload: Literal["auto", "none", "cpu", "disk"] = Field(
        "auto",
        description="where weights lie while no pass needs them, for models that memory does not hold: none (in memory, as float32), cpu (in "
        "memory, as stored), disk (in the model's files), or auto (the first of these that fits)",
    )
    dtype: Precision = Field(
        "auto", description="number format of matrix products; auto is bfloat16 if the processor supports it"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_keys_of_its_method(cls, data: Any) -> Any:
        """Take the keys that were not given from the file of the method."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        only_grows = data.get("grow") and not any(data.get(size) for size in ("budget", "latency", "sparsity"))
        name = data.get("method", _GROWTH if only_grows else _METHOD)
        name = data["method"] = ALIASES.get(name, name) if isinstance(name, str) else name
        if name not in list(methods()):
            raise ValueError(f"method {name!r} is not known; {nearest(str(name), [*methods(), *ALIASES])}")
        below = {key: value for key, value in _read_yaml(str(methods()[name])).items() if key not in ("about", "paper")}
        for key, value in data.items():
            inner = below.get(key)
            below[key] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
        calibration = below.get("calibration", {})
        if below.get("init") == "random" and isinstance(calibration, dict):  # a random model cannot write its own text
            below["calibration"] = {"source": DEFAULT_TEXT, **calibration}
        return below

    @model_validator(mode="after")
    def _fitting(self, info: ValidationInfo) -> "Recipe":
        if info.context is not _ROW:
            check_fitting(self)
            if info.context is not _SHARED:
                self.refuse(self.unread())
        return self

    def unread(self) -> list[str]:
        """The dotted keys that somebody has set and nothing in this recipe reads.

        A value of the method or the default counts as set by nobody, so a recipe that was written with all its keys reads the same.
        A repair of the method that another reduction does not make counts as set.
        """
        row, keys = _row(self.method, self.init), []
        for key in unread(self):
            value, of_method = self._at(key), row._at(key)
            if value != _default(key) and (value != of_method or key == "repair"):
                keys.append(key)
        return keys

    def refuse(self, keys: Sequence[str]) -> None:
        """Refuse keys that nothing in this recipe reads; nothing happens if there are none.

        Raises:
            UsageError: there are some.
        """
        if not keys:
            return
        reasons = unread(self)
        why, remedy = reasons[keys[0]]
        alike = [key for key in keys if reasons[key] == reasons[keys[0]]]
        it = "it" if len(alike) == 1 else "them"
        remedy = f", or {remedy}" if remedy else ""
        leave = "set repair=null" if alike == ["repair"] else f"leave {it} out"
        raise UsageError(f"{' and '.join(alike)} would be ignored, since {why.replace('read it', f'read {it}')}; {leave}{remedy}")

    def fitted(self, named: Collection[str] = ()) -> "Recipe":
        """This recipe, with each key that nothing reads as its method has it; such a key among `named` is refused.

        Raises:
            UsageError: nothing reads a key that is named.
        """
        recipe, row, keys = self, _row(self.method, self.init), self.unread()
        self.refuse([key for key in keys if key in named])
        for key in keys:
            table, _, leaf = key.rpartition(".")
            update = {leaf: row._at(key)}
            recipe = recipe.model_copy(update={table: getattr(recipe, table).model_copy(update=update)} if table else update)
        return recipe

    def _at(self, key: str) -> Any:
        """The value of a dotted key."""
        return functools.reduce(getattr, key.split("."), self)

    def to_yaml(self) -> str:
        """The recipe as YAML that `read` takes back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def makes_zeros(self) -> bool:
        """Whether the reduction makes weights zero instead of removing units."""
        return "sparsity" in parts.needs("reduce", self.reduce)

    def ready(self) -> "Recipe":
        """This recipe, after a check that it names a model, a size to reach, and a text if its reduction trains.

        Raises:
            UsageError: it names no model, or neither budget nor latency; or it makes zeros and does not say how many; or its
                reduction trains and it names no text to train on.
        """
        if not self.model:
            raise UsageError(f"the recipe names no model; add it, for example {settings({'model': 'smollm2-135m-instruct'})}")
        if self.makes_zeros:
            if not self.sparsity:
                example = f"{settings({'sparsity': '50%'})}, or {settings({'sparsity': '2:4'})}"
                raise UsageError(f"method {self.method!r} makes weights zero and the recipe does not say how many; add {example}")
        elif not (self.budget or self.latency):
            raise UsageError(
                f"the recipe names no budget; add it, for example {settings({'budget': '80%'})}, or a latency like 0.7x"
            )
        if "training" in parts.needs("reduce", self.reduce) and self.training.source is None:
            raise UsageError(
                f"reduce {self.reduce!r} works while the model trains, and the recipe trains nothing; set training.source and "
                "training.tokens in a recipe, and use: adapt-pruner run RECIPE.yaml"
            )
        return self


_TABLE_OF: dict[str, type[Frozen]] = {"calibration": Calibration, "training": Training, "evaluation": Evaluation}


@functools.cache
def _row(method: str, init: str) -> Recipe:
    """A method as it is where a recipe sets nothing."""
    return Recipe.model_validate({"method": method, "init": init}, context=_ROW)


def _default(key: str) -> Any:
    """The default of a dotted key."""
    table, _, leaf = key.rpartition(".")
    return (_TABLE_OF[table] if table else Recipe).model_fields[leaf].default


def methods() -> dict[str, Path]:
    """The methods that come with the package: name -> recipe file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "methods").glob("*.yaml"))}


def builtin() -> dict[str, Path]:
    """The whole-run recipes that come with the package: name -> recipe file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def read(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> Recipe:
    """A validated recipe from a YAML file, the name of a built-in one, or plain data.

    Args:
        source: file, name or mapping.
        overrides: `KEY=VALUE` texts with dotted keys, values as YAML; applied last.
        values: dotted key -> value, applied before `overrides`.
        shared: whether keys that nothing reads may stand, because other recipes get the same; `Recipe.fitted` leaves them out.

    A key that nothing reads is refused (`Recipe.unread`). If `overrides` name another method, part or text, keys of `source`
    that nothing reads any more are left out.

    Raises:
        UsageError: no such file, not YAML, an unknown key, a value out of range or a table that would drop keys; with the nearest key
            or the limit.
    """
    data = dict(source) if isinstance(source, Mapping) else _read_yaml(str(source))
    for key, value in (values or {}).items():
        _put(data, key, value)
    of_a_method = not isinstance(source, Mapping) and ALIASES.get(str(source), str(source)) in methods()
    written = keys_of(overrides) | (set() if of_a_method else set(dotted(data)))
    seen: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UsageError(f"--set {text!r} has no value; write it like --set step=0.05")
        if key in seen:
            raise UsageError(f"--set {key} is given twice; leave one of them out")
        seen.add(key)
        new = value_of(value, f"the value of --set {key}")
        if key in _TABLES:  # null and {} take a table of the file away, which is meant
            refuse_lost(key, written if new else keys_of(overrides))
        _put(data, key, new)
    others = seen & _DECIDING
    try:
        recipe = Recipe.model_validate(data, context=_SHARED if shared or others else None)
        return recipe.fitted({*(values or ()), *seen}) if others and not shared else recipe
    except ValidationError as error:
        raise UsageError(sentence(error, Recipe)) from error


def differing(first: Recipe, second: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ; keys that do not change what a run computes are left out."""
    left, right = (recipe.model_dump(mode="json") for recipe in (first, second))
    keys = []
    for key, value in left.items():
        if key in _OF_THE_MACHINE or value == right[key]:
            continue
        inner = isinstance(value, dict) and isinstance(right[key], dict) and key in _TABLES
        keys += [f"{key}.{leaf}" for leaf in value if value[leaf] != right[key][leaf]] if inner else [key]
    return keys


def _read_yaml(name: str) -> dict[str, Any]:
    try:
        return read_keys(builtin().get(name) or methods().get(ALIASES.get(name, name)) or expanded(name), name)
    except FileNotFoundError as error:
        raise UsageError(
            f"recipe {name!r} does not exist; give a YAML file or a built-in one ({', '.join(builtin())})"
        ) from error


def dotted(data: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """The values in tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= dotted(value, f"{table}{key}.") if isinstance(value, Mapping) else {f"{table}{key}": value}
    return found


def _put(data: dict[str, Any], name: str, value: Any) -> None:
    """Set, in place, a dotted key; the tables on the way are copied, since they may be shared."""
    *path, leaf = name.split(".")
    for key in path:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, Mapping) else {}
        data = data[key]
    data[leaf] = value
