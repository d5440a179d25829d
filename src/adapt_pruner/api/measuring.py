"""`evaluate`, `compare`, `verify` and `chat`: how good a model is, in one call each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt_pruner.api.arguments import (
    Keeper,
    Name,
    Saved,
    Spec,
    as_overrides,
    as_place,
    as_size,
    as_spec,
    as_words,
    heard,
    in_python,
    named,
    of_kind,
)
from adapt_pruner.checkpoint.load import load, pick_device
from adapt_pruner.compare import comparison
from adapt_pruner.compare.measures import Measures
from adapt_pruner.compare.models import measured
from adapt_pruner.compare.request import Request
from adapt_pruner.compare.table import table
from adapt_pruner.core.events import Listener
from adapt_pruner.core.events.words import answered, score
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.answer import answer, check_asked
from adapt_pruner.export.proof import prove
from adapt_pruner.recipe import check_precision

__all__ = ["Comparison", "Evaluation", "Verification", "chat", "compare", "evaluate", "verify"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Facts about a model, and how well it does on a text, on tasks, or on both. A figure that was not measured is None.

    Attributes:
        model: its name.
        params: parameters; tied weights count once.
        nonzero: those of them that are not zero.
        decoder_params: those in the decoder layers; None for an unknown family.
        weight_bytes: size of its weights on disk.
        dequantised: the GGUF file that its weights come from.
        windows_start_with: the token before each window, if the model was trained with one.
        perplexity: exp(nll).
        nll: mean loss in nats per token.
        bits_per_byte: the same loss in bits over the bytes of the text; compares between tokenizers.
        tokens: number of predicted tokens.
        windows: number of windows read.
        seconds: time that reading them took.
        tokens_per_second: speed of a forward pass.
        chat: answers to prompts of ours: how many were `asked`, the numbers of those that are `right`, how many `ended` and are `looping`.
        tasks: the figures of each task.
        average: mean accuracy of the tasks and its standard error: `value`, `stderr`.
    """

    model: str
    params: int
    nonzero: int
    decoder_params: int | None
    weight_bytes: int
    dequantised: str | None = None
    windows_start_with: str | None = None
    perplexity: float | None = None
    nll: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    windows: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    chat: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, float] | None = None

    def __repr__(self) -> str:
        lines = [f"{self.model}: {self.params:,} parameters, {self.weight_bytes / 1e6:,.0f} MB"]
        if self.perplexity is not None:
            bits = "" if self.bits_per_byte is None else f" ({self.bits_per_byte:.4f} bits a byte)"
            lines.append(f"perplexity {self.perplexity:.2f}{bits}, over {self.tokens:,} tokens in {self.windows} windows")
        if self.tokens_per_second is not None:
            lines.append(f"reads {self.tokens_per_second:,.0f} tokens a second")
        if self.chat is not None:
            lines.append(answered(**self.chat, dense=None))
        for one in self.tasks:
            lines.append(f"{one['task']} {score(one['value'], one['stderr'], share=one['accuracy'])} ({one['metric']})")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether an artefact computes what the model computes; true if it does.

    Attributes:
        passed: no figure is beyond its tolerance.
        failures: a sentence for each figure that is.
        figures: all figures, as in `adapt-pruner verify --json`.
    """

    passed: bool
    failures: list[str]
    figures: Mapping[str, Any]

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        said = "it computes what the model computes" if "agreement" in self.figures else "it has the zeros that it promises"
        if not self.passed:
            return "\n".join(["it failed:", *self.failures])
        if "agreement" not in self.figures:
            return said
        engine, agreement = self.figures["engine"], self.figures["agreement"]
        return f"{said}: in {engine} the same token is on top at {agreement:.2%} of {self.figures['tokens']:,} tokens"


class Comparison:
    """Methods side by side at equal sizes, and the folder that has the table, the picture and the page.

    Attributes:
        path: the folder; a temporary one lives as long as this object.
        figures: the content of its compare.json.
    """

    def __init__(self, path: Path, figures: Mapping[str, Any], keep: Keeper | None = None) -> None:
        self.path, self.figures, self._keep = path, figures, keep

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a method and size, the dense model first: `method`, `size`, `params`, `texts`, `seconds`, … (see docs/compare.md)."""
        return [*self.figures["rows"], *self.figures["sparse_rows"][1:]]

    @property
    def page(self) -> Path:
        """The comparison as an HTML page."""
        return self.path / "compare.html"

    def __repr__(self) -> str:
        shown = [rows for rows in (self.figures["rows"], self.figures["sparse_rows"]) if len(rows) > 1]
        return "\n\n".join("\n".join(_aligned(*table(rows))) for rows in shown) + f"\n\n{self.path}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text: the first column left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


@in_python
def evaluate(
    model: Name | Saved | Any,
    *,
    tokenizer: Any = None,
    text: Spec | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    chat: int | None = None,
    tasks: str | Sequence[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Evaluation:
    """Measure a model's perplexity and reading speed on a text, its scores on tasks, or both.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer, which is written to a temporary folder first.
        tokenizer: needed only for a model in memory.
        text: the text for perplexity.
        window: tokens per window; windows do not overlap. 512 by default.
        max_windows: the most windows to read; the whole text by default.
        chat: number of our prompts to ask a chat model, at most 100; a rule checks each answer.
        tasks: commonsense, mmlu, or names that lm-eval knows (docs/evaluate.md).
        num_fewshot: examples before each item.
        limit: the most items of each task.
        task_dir: folder of lm-eval YAML files; needs `trust_remote_code`.
        cache_dir: folder that keeps task scores.
        device: auto, cpu, cuda, …
        dtype: number format of matrix products: auto, float32 or bfloat16.
        trust_remote_code: run Python code that comes with the model, a task folder, or a task that lm-eval marks as unsafe.
        progress: show a bar.
        listen: called with every event.

    Raises:
        UsageError: the model, text or task is not there, or nothing to measure is given.
        RunError: the model's files are damaged, or its loss is not a number.
    """
    how = Measures(
        text=None if text is None else as_spec("text", text), window=None if window is None else _whole("window", window, 2),
        max_windows=None if max_windows is None else _whole("max_windows", max_windows, 1),
        chat=None if chat is None else _whole("chat", chat, 1),
        tasks=None if tasks is None else ",".join(as_words("tasks", tasks, _word)), num_fewshot=num_fewshot, limit=None if limit is None else _whole("limit", limit, 1),
        task_dir=None if task_dir is None else as_place("task_dir", task_dir),
        cache_dir=None if cache_dir is None else as_place("cache_dir", cache_dir), device=_word("device", device), dtype=check_precision(dtype),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    how.check()
    with named(model, tokenizer, any_family=True) as name, heard(listen, progress=progress) as tell:
        rows, _ = measured([name], how, listen=tell)
    return Evaluation(**rows[0])


@in_python
def compare(
    model: Name | Saved | Any,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    methods: str | Sequence[str],
    text: Spec | Sequence[Spec],
    params: str | int | Sequence[str | int] | None = None,
    sparsity: str | Sequence[str] | None = None,
    calibration: Spec | None = None,
    calibration_ids: Sequence[str | Path] | None = None,
    calibration_samples: int | None = None,
    calibration_length: int | None = None,
    draws: int | None = None,
    window: int = 512,
    max_windows: int = 40,
    settings: Mapping[str, Any] | None = None,
    keep: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Comparison:
    """Prune a model by several methods to the same sizes, and measure the results alike.

    Each is pruned in a process of its own. A stopped comparison continues with the same call on the same `output`.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer.
        output: folder for figures, table, picture and page; without it a temporary one, which lives as long as the result.
        tokenizer: needed only for a model in memory.
        methods: names from `adapt-pruner methods`.
        text: one text or several to measure on.
        params: sizes to prune to, such as ["80%", "60%"], for methods that remove units.
        sparsity: shares of zeros or patterns, such as ["50%", "2:4"], for methods that make zeros.
        calibration: text to measure importance on, for every method; None for each method's own.
        calibration_ids: JSON files of token ids instead of it; each is one draw.
        calibration_samples: sequences of it per iteration; None for each method's own, mostly 64.
        calibration_length: tokens per sequence; None for each method's own, mostly 128.
        draws: seeds per method and size, counted from 0; 3 by default.
        window: tokens per window.
        max_windows: the most windows to read of each text.
        settings: further keys of a recipe for every method, such as {"calibration.samples": 16}.
        keep: keep the pruned checkpoints in `output`/models.
        device: auto, cpu, cuda, …
        dtype: number format of matrix products: auto, float32 or bfloat16.
        trust_remote_code: run Python code that comes with the model.
        progress: show what is done.
        listen: called with every event.

    Raises:
        UsageError: the request cannot be met; nothing has been pruned.
        RunError: the dense model cannot be measured, or something cannot be written. A cell that fails is a row with an `error`.
    """
    sizes = () if params is None else as_words("params", params, as_size)
    patterns = () if sparsity is None else as_words("sparsity", sparsity, _word)
    texts = [as_spec("text", one) for one in (text if isinstance(text, list | tuple) else [text])]
    files = [calibration_ids] if isinstance(calibration_ids, str | Path) else calibration_ids or ()
    keeper = Keeper() if output is None else None
    place = Path(keeper.name) / "compared" if keeper is not None else as_place("output", output)
    with named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        asked = Request(
            model=name, methods=as_words("methods", methods, _word), params=sizes, sparsity=patterns, texts=tuple(texts),
            calibration=None if calibration is None else as_spec("calibration", calibration),
            calibration_ids=tuple(str(as_place("calibration_ids", path)) for path in files), calibration_samples=calibration_samples,
            calibration_length=calibration_length,
            draws=None if draws is None else _whole("draws", draws, 1), window=_whole("window", window, 2), max_windows=_whole("max_windows", max_windows, 1),
            overrides=tuple(as_overrides(settings)), device=device, dtype=check_precision(dtype), trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return Comparison(place, comparison.compare(asked, place, listen=tell, keep=keep), keeper)


@in_python
def verify(
    model: Name | Saved | Any,
    artefact: str | Path | None = None,
    *,
    tokenizer: Any = None,
    text: Spec = "python-docs:heldout",
    window: int = 256,
    max_windows: int = 8,
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Verification:
    """Check that what `export` wrote computes, in its own engine, what the model computes in torch.

    Args:
        model: what was exported.
        artefact: what `export` wrote; without it the zeros of a sparse model are checked.
        tokenizer: needed only for a model in memory.
        text: text to compare on.
        window: tokens per window.
        max_windows: the most windows to read.
        trust_remote_code: run Python code that a foreign folder brings.
        progress: show a bar.
        listen: called with every event.

    Returns:
        The figures; the object is true if they are within tolerance.

    Raises:
        UsageError: there is no such model, artefact or text, an engine is not installed, or there is nothing to check.
        RunError: files are damaged, or the artefact is of another model.
    """
    with named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        figures = prove(
            name, None if artefact is None else as_place("artefact", artefact), text=as_spec("text", text), window=_whole("window", window, 2),
            max_windows=_whole("max_windows", max_windows, 1), trust_remote_code=trust_remote_code, listen=tell,
        )  # fmt: skip
    failures = [*figures.get("failures", []), *(figures.get("sparsity") or {}).get("failures", [])]
    return Verification(passed=figures["passed"], failures=failures, figures=figures)


@in_python
def chat(
    model: Name | Saved | Any,
    prompt: str,
    *,
    tokenizer: Any = None,
    system: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """The model's answer to a prompt, in its own chat template.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer.
        prompt: what you ask.
        tokenizer: needed only for a model in memory.
        system: system message before the prompt.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; a higher value draws at random.
        seed: seed of these draws; 0 by default.
        device: auto, cpu, cuda, …
        dtype: number format of matrix products: auto, float32 or bfloat16.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UsageError: there is no such model, or the prompt is empty or too long for it.
        RunError: the model's files are damaged, or a logit is not a number.
    """
    check_precision(dtype)
    _whole("max_new_tokens", max_new_tokens, 1)
    if of_kind("temperature", temperature, (int, float), "0 or a positive number") < 0:
        raise UsageError(f"temperature {temperature} is below 0; give 0, or a positive number such as 0.7")
    check_asked(_word("prompt", prompt), temperature=temperature, seed=seed)
    with named(model, tokenizer, any_family=True) as name, heard(None, progress=False):
        loaded = load(name, device=pick_device(device), trust_remote_code=trust_remote_code, any_family=True)
        said = answer(
            loaded.model, loaded.tokenizer, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed or 0,
            dtype=dtype,
        )  # fmt: skip
    return said.text


def _word(name: str, value: Any) -> str:
    return str(of_kind(name, value, str, "text"))


def _whole(name: str, value: Any, least: int) -> int:
    if of_kind(name, value, int, f"a whole number of at least {least}") < least:
        raise UsageError(f"{name} {value} is too small; give a whole number of at least {least}")
    return int(value)
