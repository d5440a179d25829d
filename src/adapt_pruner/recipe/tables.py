"""The tables of a recipe: texts to calibrate on, to train on and to measure on, and which tokens stay."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.model.shards import Shards, checked_shards
from adapt_pruner.data.sources import SELF, domains
from adapt_pruner.recipe import parts

__all__ = ["Calibration", "Evaluation", "Grow", "Lora", "Source", "Training", "Vocabulary"]


def _checked_source(source: Any) -> Any:
    if not isinstance(source, str | Mapping):
        raise ValueError(
            f"text {source!r} is neither a SPEC nor SPEC: weight; write it like wiki.jsonl.gz or {{wiki.jsonl.gz: 3, books/: 1}}"
        )
    domains(source)
    return source


Source = Annotated[str | dict[str, float], BeforeValidator(_checked_source)]
"""A SPEC of text, or a mixture: several SPECs with a weight each."""

Count = Annotated[int, BeforeValidator(lambda value: parse_count(value) if isinstance(value, str) else value)]

Share = Annotated[float, Field(ge=0, lt=1)]


def part_of(key: str, kind: Any = str) -> Any:
    """The type of a recipe's key that names a part."""
    return Annotated[kind, AfterValidator(lambda written: None if written is None else parts.check(key, written))]


class Frozen(BaseModel):
    """A table whose keys are all known and whose values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Vocabulary(Frozen):
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


class Grow(Frozen):
    """What a model gains by copying its own weights, before anything else is done; sizes are those afterwards."""

    vocabulary: str | None = Field(None, description="folder of the model's tokenizer with tokens added at its end")
    residual: Count | None = Field(None, ge=1, description="channels of the stream, a whole multiple of those of the model")
    neurons: Count | None = Field(None, ge=1, description="neurons of each layer")
    kv_heads: Count | None = Field(None, ge=1, description="KV heads of each layer, each with its query heads")
    layers: Count | None = Field(None, ge=1, description="layers; copies are stacked on top")
    experts: Count | None = Field(None, ge=2, description="experts in the place of each MLP")
    experts_per_token: Count = Field(2, ge=1, description="experts that a token goes through")

    @model_validator(mode="after")
    def _together(self) -> "Grow":
        if not any(self.model_dump(exclude={"experts_per_token"}).values()):
            raise ValueError("grow names nothing that grows; set one of its keys, for example grow.experts to 4")
        if self.experts is None and self.experts_per_token != 2:
            raise ValueError(
                f"grow.experts_per_token {self.experts_per_token} would be ignored without experts; set grow.experts"
            )
        if self.experts is not None and self.experts_per_token > self.experts:
            raise ValueError(f"grow.experts_per_token {self.experts_per_token} is above grow.experts {self.experts}; lower it")
        return self


class Calibration(Frozen):
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

    def of_feed(self) -> dict[str, Any]:
        """What the feed of calibration batches takes: all but what is done with its batches, and the text that the repair alone reads."""
        return self.model_dump(exclude={"redraw", "self_generated", "repair_samples"})


class Lora(Frozen):
    """Train LoRA adapters of the linear layers instead of the weights. The adapters are merged before the next cut."""

    rank: int = Field(128, ge=1, le=2**16, description="rank of the addition")
    alpha: float = Field(16.0, gt=0, description="the addition is multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of the addition's inputs that are dropped in training")


class Training(Frozen):
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
    schedule: part_of("schedule") = Field("schedules.wsd", description="learning-rate curve over the tokens of all stages")  # type: ignore[valid-type]
    objective: part_of("objective") = Field("objectives.lm", description="loss to minimise")  # type: ignore[valid-type]
    feed: part_of("feed") = Field("fixed", description="what decides which rows of the text come next")  # type: ignore[valid-type]
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
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null clips nothing")
    optimizer: Literal["adamw", "adamw8bit", "adamw4bit"] = Field(
        "adamw", description="AdamW with moments of 32, 8 or 4 bits; 8 and 4 need torchao"
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number format of weights and gradients while training; bfloat16 rounds at random and needs torchao",
    )
    step_in_backward: bool = Field(
        False, description="take a parameter's step as soon as its gradient is there, and free that gradient; needs clip: null"
    )
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
    compile: bool = Field(
        False,
        description="compile the decoder with torch.compile, again after each stage's cuts, and the steps of adamw8bit and adamw4bit",
    )
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

    @property
    def pass_tokens(self) -> int | None:
        """Tokens of a pass of a process; None for what its device gets by default."""
        return self.micro_batch_tokens or (self.step_tokens if self.step_in_backward else None)

    @property
    def moment_bits(self) -> int:
        """Bits of a number of AdamW's moments."""
        return {"adamw": 32, "adamw8bit": 8, "adamw4bit": 4}[self.optimizer]

    @property
    def in_fewer_bits(self) -> str | None:
        """The setting that holds moments or weights in fewer than 32 bits; None if none does."""
        settings = {
            f"optimizer {self.optimizer}": self.optimizer != "adamw",
            f"weights {self.weights}": self.weights != "float32",
        }
        return next((f"training.{setting}" for setting, given in settings.items() if given), None)

    @property
    def needs_torchao(self) -> str | None:
        """The setting that needs torchao; None if none does. The additions of LoRA are float32, whatever the weights are."""
        return None if self.lora is not None and self.optimizer == "adamw" else self.in_fewer_bits

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
        if self.step_in_backward and self.clip is not None:
            raise ValueError(
                f"training.step_in_backward takes steps before the norm of all gradients is known, and training.clip is {self.clip:g}; "
                "set clip to null"
            )
        if self.step_in_backward and (self.micro_batch_tokens or self.step_tokens) < self.step_tokens:
            raise ValueError(
                f"training.step_in_backward needs a batch in one pass, and training.micro_batch_tokens {self.micro_batch_tokens} is below its "
                f"{self.step_tokens} tokens; leave micro_batch_tokens out, or lower batch_tokens"
            )
        if parts.takes("schedule", self.schedule, "decay") and self.warmup + self.decay > 1:
            raise ValueError(
                f"training.warmup {self.warmup} and training.decay {self.decay} add up to more than the whole run, 1; lower one"
            )
        return self


class Evaluation(Frozen):
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
