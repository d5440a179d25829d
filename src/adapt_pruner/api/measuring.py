"""`evaluate`, `compare`, `verify` and `chat`: how good a model is, in one call each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from adapt_pruner.api.arguments import (
    Count,
    Keeper,
    Listener,
    Model,
    Place,
    Settings,
    Spec,
    Takes,
    Window,
    as_overrides,
    heard,
    in_python,
    named,
    placed,
)
from adapt_pruner.core.events.words import answered, score
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import expanded

Draws = Annotated[int, Takes("a whole number from 1 to 1000", None, int, least=1, most=1000)]
Files = Annotated[str | Path | Sequence[str | Path], Takes("one file or several, as str or Path", "FILE", list[Path])]
Patterns = Annotated[str | Sequence[str], Takes('patterns such as ["50%", "2:4"]', "50%,2:4")]
Prompt = Annotated[str, Takes("text")]
Prompts = Annotated[int, Takes("a whole number from 1 to 100", None, int, least=1, most=100)]
Seed = Annotated[int, Takes("a whole number from 0 to 2**63 - 1", None, int, least=0, most=2**63 - 1)]
Sizes = Annotated[str | int | Sequence[str | int], Takes('sizes such as ["80%", "110M", 90_000_000]')]
Specs = Annotated[str | Path | Sequence[str | Path], Takes("one text or several, as str or Path", "SPEC", list[str])]
Temperature = Annotated[float, Takes("a number from 0 to 100 such as 0.7", None, float, least=0, most=100)]
Whole = Annotated[int, Takes("a whole number of at least 0", None, int, least=0)]
Words = Annotated[str | Sequence[str], Takes("text, or a list of texts", "NAMES")]


def _several(values: str | int | Sequence[str | int] | None) -> tuple[str, ...]:
    """Several values; text may hold several with commas."""
    if values is None:
        return ()
    return tuple(map(str, values if isinstance(values, list | tuple) else str(values).split(",")))


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
        tokens_per_second: speed of a forward pass; of a model that reads pictures, pairs a second.
        judged: what else the model's task measures, such as the retrieval of CLIP.
        by_text: nll on each text of a mixture.
        chat: answers to prompts of ours: how many were `asked`, the numbers of those that are `right`, how many `ended` and are `looping`.
        tasks: the figures of each task.
        average: mean accuracy of the tasks and its standard error: `value`, `stderr`.
        experts: of a model whose experts lay on a shelf: the `share` of the needed ones that were already in memory. `read_bytes` and `waited`
            (seconds) say what reading the others took.
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
    judged: dict[str, float] = field(default_factory=dict)
    by_text: dict[str, float] = field(default_factory=dict)
    chat: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, float] | None = None
    experts: dict[str, float] | None = None

    def __repr__(self) -> str:
        lines = [f"{self.model}: {self.params:,} parameters, {self.weight_bytes / 1e6:,.0f} MB"]
        if self.perplexity is not None:
            bits = "" if self.bits_per_byte is None else f" ({self.bits_per_byte:.4f} bits a byte)"
            lines.append(f"perplexity {self.perplexity:.2f}{bits}, over {self.tokens:,} tokens in {self.windows} windows")
        lines += [f"{name} {share:.1%}" for name, share in self.judged.items()]
        if self.tokens_per_second is not None:
            lines.append(f"reads {self.tokens_per_second:,.0f} tokens a second")
        if self.chat is not None:
            lines.append(answered(**self.chat, dense=None))
        for task in self.tasks:
            lines.append(f"{task['task']} {score(task['value'], task['stderr'], share=task['accuracy'])} ({task['metric']})")
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
        if not self.passed:
            return "\n".join(["it failed:", *self.failures])
        if "agreement" not in self.figures:
            return "it has the zeros that it promises"
        on_top = f"{self.figures['agreement']:.2%} of {self.figures['tokens']:,} tokens"
        return f"it computes what the model computes: in {self.figures['engine']} the same token is on top at {on_top}"


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
        return self.path / filenames.COMPARISON_PAGE

    def __repr__(self) -> str:
        from adapt_pruner.compare.table import table

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
    model: Model,
    *,
    tokenizer: Any = None,
    text: Spec | None = None,
    window: Window | None = None,
    max_windows: Count | None = None,
    chat: Prompts | None = None,
    tasks: Words | None = None,
    num_fewshot: Whole | None = None,
    limit: Count | None = None,
    task_dir: Place | None = None,
    cache_dir: Place | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Evaluation:
    """Measure a model's perplexity and reading speed on a text, its scores on tasks, or both.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer, which is written to a temporary folder first.
        tokenizer: needed only for a model in memory.
        text: text to measure perplexity on: file, folder, glob, hub:NAME, python-docs:heldout.
        window: tokens per window; windows do not overlap. 512 by default.
        max_windows: most windows to read; the whole text by default.
        chat: number of our prompts to ask a chat model, at most 100; a rule checks each answer.
        tasks: tasks to score: commonsense, mmlu, or names that lm-eval knows (docs/evaluate.md).
        num_fewshot: examples shown before each item; as the task says by default.
        limit: most items to score in each task; all by default.
        task_dir: folder of lm-eval YAML files with your own tasks, or with other data for known tasks; needs `trust_remote_code`.
        cache_dir: folder that keeps task scores, so that no task is scored twice; ~/.cache/adapt-pruner/tasks by default.
        device: device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        offload: where weights lie while no pass needs them: none (in memory), cpu (in memory, as stored), disk (in the model's files;
            of experts only those are read that a router chooses), or auto (disk if memory has no room for them).
        trust_remote_code: run Python code that comes with the model, a task folder, or a task that lm-eval marks as unsafe.
        progress: show a bar.
        listen: called with every event.

    Raises:
        UsageError: the model, text or task is not there, or nothing to measure is given.
        RunError: the model's files are damaged, or its loss is not a number.
    """
    from adapt_pruner.compare.measures import Measures

    how = Measures(
        text=None if text is None else str(text), window=window, max_windows=max_windows, chat=chat, tasks=",".join(_several(tasks)) or None,
        num_fewshot=num_fewshot, limit=limit, task_dir=None if task_dir is None else expanded(task_dir),
        cache_dir=None if cache_dir is None else expanded(cache_dir), device=device, dtype=dtype, offload=offload, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    how.check()
    from adapt_pruner.compare.models import measured

    with named(model, tokenizer, any_family=True) as name, heard(listen, progress=progress) as tell:
        rows, _ = measured([name], how, listen=tell)
    return Evaluation(**rows[0])


@in_python
def compare(
    model: Model,
    output: Place | None = None,
    *,
    tokenizer: Any = None,
    methods: Words,
    text: Specs,
    params: Sizes | None = None,
    sparsity: Patterns | None = None,
    calibration: Spec | None = None,
    calibration_ids: Files | None = None,
    calibration_samples: Count | None = None,
    calibration_length: Count | None = None,
    draws: Draws | None = None,
    window: Window = 512,
    max_windows: Count = 40,
    settings: Settings | None = None,
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
        methods: names from `adapt-pruner methods`, such as ["magnitude", "random"].
        text: text to measure on: file, folder, glob, …; one or several.
        params: sizes to prune to, such as ["80%", "60%"], for methods that remove units.
        sparsity: shares of zeros or patterns, such as ["50%", "2:4"], for methods that make zeros, such as wanda.
        calibration: text to measure importance on, for every method; each method's own by default.
        calibration_ids: JSON files with input_ids instead of `calibration`; each file is one draw.
        calibration_samples: calibration sequences per iteration; each method's own by default, mostly 64.
        calibration_length: tokens per calibration sequence; each method's own by default, mostly 128.
        draws: seeds per method and size, counted from 0; 3 by default.
        window: tokens per window; windows do not overlap.
        max_windows: most windows to read of each text.
        settings: further keys of a recipe for every method, such as {"calibration.samples": 16}.
        keep: keep the pruned checkpoints, in models/ of the folder.
        device: device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        trust_remote_code: run Python code that comes with the model.
        progress: show what is done.
        listen: called with every event.

    Raises:
        UsageError: the request cannot be met; nothing has been pruned.
        RunError: the dense model cannot be measured, or something cannot be written. A cell that fails is a row with an `error`.
    """
    from adapt_pruner.compare.request import Request

    files = [calibration_ids] if isinstance(calibration_ids, str | Path) else calibration_ids or ()
    keeper, place = placed(output, "compared")
    with named(model, tokenizer) as name:
        request = Request(
            model=name, methods=_several(methods), params=_several(params), sparsity=_several(sparsity),
            texts=tuple(map(str, text if isinstance(text, list | tuple) else [text])), calibration=None if calibration is None else str(calibration),
            calibration_ids=tuple(str(expanded(path)) for path in files), calibration_samples=calibration_samples,
            calibration_length=calibration_length, draws=draws, window=window, max_windows=max_windows,
            overrides=tuple(as_overrides(settings)), device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        ).checked()  # fmt: skip
        from adapt_pruner.compare import comparison

        with heard(listen, progress=progress) as tell:
            return Comparison(place, comparison.compare(request, place, listen=tell, keep=keep), keeper)


@in_python
def verify(
    model: Model,
    artefact: Place | None = None,
    *,
    tokenizer: Any = None,
    text: Spec = "python-docs:heldout",
    window: Window = 256,
    max_windows: Count = 8,
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Verification:
    """Check that what `export` wrote computes, in its own engine, what the model computes in torch.

    Args:
        model: what was exported.
        artefact: what `export` wrote; without it the zeros of a sparse model are checked.
        tokenizer: needed only for a model in memory.
        text: text to compare on: file, folder, glob, hub:NAME, …
        window: tokens per window; windows do not overlap.
        max_windows: most windows to read.
        trust_remote_code: run Python code that a foreign folder brings.
        progress: show a bar.
        listen: called with every event.

    Returns:
        The figures; the object is true if they are within tolerance.

    Raises:
        UsageError: there is no such model, artefact or text, an engine is not installed, or there is nothing to check.
        RunError: files are damaged, or the artefact is of another model.
    """
    from adapt_pruner.export.verify import prove

    file = None if artefact is None else expanded(artefact)
    with named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        figures = prove(
            name, file, text=str(text), window=window, max_windows=max_windows, trust_remote_code=trust_remote_code, listen=tell
        )
    failures = [*figures.get("failures", []), *(figures.get("sparsity") or {}).get("failures", [])]
    return Verification(passed=figures["passed"], failures=failures, figures=figures)


@in_python
def chat(
    model: Model,
    prompt: Prompt,
    *,
    tokenizer: Any = None,
    system: str | None = None,
    max_new_tokens: Count = 200,
    temperature: Temperature = 0.0,
    seed: Seed | None = None,
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
        temperature: 0 always takes the likeliest token; a higher value draws tokens at random.
        seed: seed of the random draws of `temperature`; 0 by default.
        device: device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …
        dtype: number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it).
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UsageError: there is no such model, or the prompt is empty or too long for it.
        RunError: the model's files are damaged, or a logit is not a number.
    """
    from adapt_pruner.checkpoint.load import load, pick_device
    from adapt_pruner.evaluate.answer import answer, check_asked
    from adapt_pruner.recipe import check_precision

    check_precision(dtype)
    check_asked(prompt, temperature=temperature, seed=seed)
    with named(model, tokenizer, any_family=True) as name, heard(None, progress=False):
        loaded = load(name, device=pick_device(device), trust_remote_code=trust_remote_code, any_family=True)
        return answer(
            loaded.model, loaded.tokenizer, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed or 0,
            dtype=dtype,
        ).text  # fmt: skip
