"""`Recipe`: every choice of a run in one validated, frozen description, read from YAML and written as YAML.

A recipe file may hold any of the keys below. A key that it leaves out comes from its method, or else from the defaults. On the
command line `--set KEY=VALUE` overrides one key (`--set training.lr=1e-4`). A paper's method is itself a recipe that names its
parts (`methods/*.yaml`), and `method: NAME` fills in its keys where a recipe is silent.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from adapt_pruner.core.events import DEFAULT_TEXT
from adapt_pruner.core.model.budget import check_written, parse_count
from adapt_pruner.core.model.kinds import USUAL, Prunable
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.shards import Shards, checked_shards
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.strict_yaml import read_keys, value_of
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.errors import UsageError, nearest, settings
from adapt_pruner.recipe import parts
from adapt_pruner.recipe.fitting import check_fitting, sentence, unread
from adapt_pruner.recipe.overrides import keys_of, refuse_lost

__all__ = [
    "ALIASES",
    "PAPERS",
    "Calibration",
    "Evaluation",
    "Lora",
    "Recipe",
    "Source",
    "Training",
    "Vocabulary",
    "builtin",
    "check_precision",
    "differing",
    "methods",
    "read",
]

ALIASES = {"best": "adaptive-ls-v1"}
"""Alias -> the method that it stands for in this version; the alias stays when the method changes."""
_METHOD = ALIASES["best"]  # of a recipe that names none
_OF_THE_MACHINE = ("device", "parallel", "minutes", "checkpoint_minutes", "keep_checkpoints", "report_to", "about", "paper")
PAPERS = Path(__file__).parent / "methods" / "papers.bib"
"""BibTeX of the papers that the methods come from."""
_TEXTS = {"training.source", "evaluation.source", "evaluation.tasks", "calibration.ids"}
_DECIDING = {*parts.FOLDERS, *_TEXTS, "method", "axes", "latency"}  # keys that decide which others are read
_ROW, _SHARED = "row", "shared"  # contexts of validation: of a bare method, and of settings that several recipes share
_WIDEST = 2**20  # neurons
_TABLES = ("vocabulary", "calibration", "training", "training.lora", "evaluation")


def check_precision(name: Any) -> str:
    """The number format of matrix products, if it is a known one; a recipe checks its own.

    Raises:
        UsageError: the name is not known.
    """
    formats = get_args(Precision)
    if name not in formats:
        raise UsageError(f"dtype {name!r} is not known; {nearest(str(name), formats)}")
    return str(name)


def _checked_source(source: Any) -> Any:
    if not isinstance(source, str | Mapping):
        raise ValueError(
            f"text {source!r} is neither a SPEC nor SPEC: weight; write it like wiki.jsonl.gz or {{wiki.jsonl.gz: 3, books/: 1}}"
        )
    domains(source)
    return source


def _checked_multiple(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _WIDEST):
        raise ValueError(f"multiple_of {value!r} is not a width; write auto, or a whole number from 1 to {_WIDEST:,}")
    return value


Source = Annotated[str | dict[str, float], BeforeValidator(_checked_source)]
"""A SPEC of text, or a mixture: several SPECs with a weight each."""

Count = Annotated[int, BeforeValidator(lambda value: parse_count(value) if isinstance(value, str) else value)]

Precision = Literal["auto", "float32", "bfloat16"]
Share = Annotated[float, Field(ge=0, lt=1)]
Sparsity = Annotated[str, BeforeValidator(lambda value: str(Pattern.parse(value)) if value not in (None, "") else "")]
"""A pattern of zeros as people write it; empty stands for none."""

Written = Annotated[str, BeforeValidator(lambda value: check_written(value) if value not in (None, "") else "")]
"""A budget as people write it; empty stands for no budget."""


def _part(key: str, kind: Any = str) -> Any:
    return Annotated[kind, AfterValidator(lambda written: None if written is None else parts.check(key, written))]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Vocabulary(_Frozen):
    """Which tokens stay, by their use in a text. The others are removed from model and tokenizer before all other pruning."""

    source: Source | None = Field(None, description="text whose tokens are counted: SPEC, or {SPEC: weight, …}")
    keep: Count | None = Field(None, ge=1, description="number of tokens to keep; the most used stay")
    min_uses: int | None = Field(None, ge=1, description="instead of keep: keep each token that is used at least this often")

    @model_validator(mode="after")
    def _together(self) -> "Vocabulary":
        if self.source is None:
            raise ValueError("vocabulary names no text; set vocabulary.source to one whose tokens are counted")
        if (self.keep is None) == (self.min_uses is None):
            raise ValueError(
                "vocabulary needs either keep or min_uses; set one of them: how many tokens stay, or how often a token must be "
                "used"
            )
        return self


class Calibration(_Frozen):
    """The text on which importance is measured."""

    source: Source = Field(
        "self",
        description="text to draw from: SPEC, or {SPEC: weight, …}; `self` is self-written text: the model writes it once",
    )
    samples: int = Field(64, ge=1, le=10**6, description="sequences per iteration")
    length: int = Field(128, ge=2, le=10**6, description="tokens per sequence")
    redraw: bool = Field(True, description="draw from source again in each iteration; false reads the first draw in all")
    ids: str | None = Field(
        None, description="JSON file with input_ids, instead of source: exactly these tokens in every iteration"
    )
    self_generated: int = Field(
        0,
        ge=0,
        le=10**6,
        description="sequences of repair text: the model writes them before the first cut, and only the repair reads them",
    )
    repair_samples: int = Field(0, ge=0, le=10**6, description="further sequences of source, which only the repair reads")

    @model_validator(mode="after")
    def _drawn(self) -> "Calibration":
        if self.repair_samples and (self.ids is not None or SELF in domains(self.source)):
            raise ValueError(
                "calibration.repair_samples are drawn from the text in calibration.source; name a text there and leave calibration.ids out"
            )
        return self


class Lora(_Frozen):
    """Train LoRA adapters of the linear layers instead of the weights. The adapters are merged before the next cut."""

    rank: int = Field(128, ge=1, le=2**16, description="rank of the addition")
    alpha: float = Field(16.0, gt=0, description="the addition is multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of the addition's inputs that are dropped in training")


class Training(_Frozen):
    """The training between cuts. There is none if `tokens` is 0."""

    source: Source | None = Field(None, description="text to train on: SPEC, or {SPEC: weight, …} for a mixture")
    repeat: bool = Field(True, description="repeat a text that is too short; false refuses it")
    tokens: Annotated[int, BeforeValidator(lambda v: v if v in (0, "0") else parse_count(v))] = Field(
        0, ge=0, le=10**13, description="tokens to train on, all stages together; 0 trains nothing"
    )
    expected: Count | None = Field(None, description="tokens that should fit into minutes; the run warns if far fewer will")
    batch_tokens: Count = Field(8192, ge=2, description="tokens per optimiser step, in whole rows of length")
    length: Count = Field(512, ge=2, description="tokens per sequence")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: _part("schedule") = Field("schedules.wsd", description="learning-rate curve over the tokens of all stages")  # type: ignore[valid-type]
    objective: _part("objective") = Field("objectives.lm", description="loss to minimise")  # type: ignore[valid-type]
    feed: _part("feed") = Field("fixed", description="what decides which rows of the text come next")  # type: ignore[valid-type]
    shards: Annotated[Shards, BeforeValidator(checked_shards)] = Field(
        "linear",
        description="how the tokens are divided among the stages: linear, constant, cosine, last=0.8 for the share of the last stage, or a "
        "list with a share for each",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run in which the learning rate rises")
    decay: float = Field(0.10, gt=0, lt=1, description="share of the run in which the learning rate falls (wsd)")
    floor: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay on matrices")
    betas: tuple[Share, Share] = Field(
        (0.9, 0.999), description="AdamW's betas: shares of the past in the running means of the gradient and of its square"
    )
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    max_rise: float = Field(
        2.0, gt=0, description="the run stops if the smoothed loss rises this many nats above its lowest in a stage"
    )
    written: int = Field(
        256,
        ge=0,
        le=10**6,
        description="texts that the dense model writes for each source `self-chat` or `self`, at most, before the first cut",
    )
    teacher: str | None = Field(None, description="model to distil from; null is the dense model itself")
    lora: Lora | None = Field(None, description="train LoRA adapters instead of the weights: {rank, alpha, dropout}")
    micro_batch_tokens: Count | None = Field(
        None, ge=1, description="tokens per forward and backward pass of a process; null: 2048 on a CPU, 16384 on a GPU"
    )
    gradient_checkpointing: bool = Field(False, description="save memory: compute activations twice instead of keeping them")
    compile: bool = Field(False, description="compile the decoder with torch.compile, again after each stage's cuts")
    liger: bool = Field(False, description="use the fused kernels of liger-kernel (CUDA only)")

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective learns from a teacher."""
        return "teacher" in parts.needs("objective", self.objective)

    @property
    def batch_rows(self) -> int:
        """Rows of an optimiser step."""
        return self.batch_tokens // self.length

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step: those of its whole rows."""
        return self.batch_rows * self.length

    @model_validator(mode="after")
    def _together(self) -> "Training":
        if self.tokens and self.source is None:
            raise ValueError("training.tokens is set but training.source is not; name a text to train on")
        if self.source is not None and not self.tokens:
            raise ValueError("training.source is set but training.tokens is 0; say how many tokens to train on")
        if self.teacher is not None and not self.needs_teacher:
            raise ValueError(
                f"training.teacher is set but training.objective {self.objective!r} has no teacher; set it to objectives.distil"
            )
        if self.batch_tokens < self.length:
            raise ValueError(f"training.batch_tokens {self.batch_tokens} is below training.length {self.length}; raise it")
        if parts.takes("schedule", self.schedule, "decay") and self.warmup + self.decay > 1:
            raise ValueError(
                f"training.warmup {self.warmup} and training.decay {self.decay} add up to more than the whole run, 1; lower one"
            )
        return self


class Evaluation(_Frozen):
    """What the model is measured on.

    Held-out text is measured at the start and after every stage, tasks at the start and the end; each only if it is set.
    """

    source: Source | None = Field(None, description="held-out text: SPEC, or {SPEC: weight, …}")
    window: int = Field(512, ge=2, description="tokens per window")
    max_windows: int | None = Field(40, ge=1, description="most windows to read; null reads the whole text")
    tasks: str | None = Field(
        None, description="tasks to score at the start and the end: commonsense, mmlu, or names that lm-eval knows"
    )
    limit: int | None = Field(None, ge=1, description="most items to score in each task; null scores all")
    task_dir: str | None = Field(
        None,
        description="folder of lm-eval YAML files with your own tasks, or with other data for known tasks; needs --trust-remote-code",
    )

    prompts: list[str] | None = Field(
        None,
        description="prompts answered at the start and the end; null takes three built-in ones if the model has a chat template, [] none",
    )
    chat: int = Field(
        0,
        ge=0,
        le=100,
        description="prompts of ours, whose answers a rule checks, that a chat model is asked at the start and the end",
    )


class Recipe(_Frozen):
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
    task: _part("task") = Field("causal_lm", description="what the model learns: its batches, its loss and how it is measured")  # type: ignore[valid-type]
    stages: int = Field(
        1, ge=1, le=1000, description="rounds of pruning and training; the parameter targets fall linearly from round to round"
    )
    axes: tuple[Prunable, ...] = Field(
        USUAL, min_length=1, description=f"kinds of units that may be removed: {', '.join(get_args(Prunable))}"
    )
    vocabulary: Vocabulary | None = Field(
        None, description="tokens to keep: {source: SPEC, keep: 16384}, or min_uses instead of keep; null keeps all"
    )
    # fmt: off
    metric: _part("metric") = Field("weights.taylor", description="what a unit is worth")  # type: ignore[valid-type]
    sequential_scoring: bool = Field(False, description="score each layer on the output of the already pruned layers below it")
    distance: _part("distance", str | None) = Field(None, description="what a layer or block is worth; null if the chooser needs no such score")  # type: ignore[valid-type]
    head_metric: _part("head_metric", str | None) = Field(None, description="what a KV head is worth when its layer is about to lose one; null takes the scores of metric")  # type: ignore[valid-type]
    chooser: _part("chooser") = Field("allocate.adaptive", description="how much each axis gives up")  # type: ignore[valid-type]
    repair: _part("repair", str | None) = Field(None, description="how the remaining weights make up for a cut, before it is made; null repairs nothing")  # type: ignore[valid-type]
    reduce: _part("reduce") = Field("units", description="how the model reaches a stage's budget, or how its weights become zero; `adapt-pruner methods` names what each method uses")  # type: ignore[valid-type]
    solver: _part("solver", str | None) = Field(None, description="for reduce=sparse: which weights become zero, and how the others make up for it")  # type: ignore[valid-type]
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
        name = data.get("method", _METHOD)
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


_TABLE_OF: dict[str, type[_Frozen]] = {"calibration": Calibration, "training": Training, "evaluation": Evaluation}


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
    written = keys_of(overrides) | (set() if of_a_method else set(_dotted(data)))
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


def _dotted(data: Mapping[str, Any], table: str = "") -> Iterator[str]:
    """The dotted keys of the values in tables."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{table}{key}.")
        else:
            yield f"{table}{key}"


def _put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set, in place, a dotted key; the tables on the way are copied, since they may be shared."""
    *path, leaf = dotted.split(".")
    for key in path:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, Mapping) else {}
        data = data[key]
    data[leaf] = value
