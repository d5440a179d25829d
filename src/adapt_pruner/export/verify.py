"""Whether an artefact computes what the model computes, in its own engine: logits, greedy text, perplexity, token ids.

difference   |logit of the artefact - logit of the model|, largest and mean, with the standard deviation of the model's logits
agreement    share of positions at which both have the same most likely token
perplexity   of the same windows of text, on both sides
greedy       tokens that each writes after the same prompt
encoding     share of pieces of text for which both make the same token ids

For a model with a mask over weights it also proves that every linear layer has the zeros that the mask's pattern promises.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded, load, load_that_fits
from adapt_pruner.core.events import Listener, Load, Warned, counting
from adapt_pruner.core.model.weight_mask import linear_layers, oriented
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.data.sources import SELF, texts
from adapt_pruner.data.tokens import text_bytes
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.export import form_of, forms, plain
from adapt_pruner.export.engines import Engine, torch_engine

_PROMPT, _WRITTEN = 16, 32  # tokens of a prompt, and tokens written after it
_PROMPTS = 4
_PIECES = 200
_TEXT, _WINDOW, _WINDOWS = "python-docs:heldout", 256, 8  # by which several artefacts are compared


@dataclass(frozen=True)
class Tolerance:
    """How far an artefact may be off.

    Attributes:
        difference: largest difference of a logit, in standard deviations of the model's logits; None for any.
        agreement: least share of positions with the same most likely token.
        perplexity: largest change of the perplexity, as a share of the model's.
        encoding: least share of pieces of text with the same token ids.
    """

    difference: float | None
    agreement: float
    perplexity: float
    encoding: float = 0.99


TOLERANCES = {
    32: Tolerance(0.05, 0.98, 0.005),
    16: Tolerance(None, 0.95, 0.01),
    8: Tolerance(None, 0.92, 0.02),
    5: Tolerance(None, 0.85, 0.10),
    4: Tolerance(None, 0.75, 0.25),
    2: Tolerance(None, 0.40, 2.0),
}
"""By bits per stored weight. An artefact takes the row with the most bits that are not above its own."""


def tolerance_for(stored: str) -> Tolerance:
    """The tolerance for weights stored as `f32`, `bf16`, `q4_k_m`, …"""
    digits = re.search(r"\d+", stored)
    bits = int(digits[0]) if digits else 32
    return TOLERANCES[max(row for row in TOLERANCES if row <= max(bits, min(TOLERANCES)))]


def prove(
    model: str,
    artefact: Path | None,
    *,
    text: str,
    window: int = 256,
    max_windows: int = 8,
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """`verify` with what a user names; without an artefact, check the zeros of the checkpoint.

    Returns:
        Plain data: the result of `verify`, and for a sparse model also `sparsity`, the result of `zeros_of`. Without an artefact
        only `model`, `sparsity` and `passed`.

    Raises:
        UsageError: there is no such model, artefact or text, an engine is not installed, or there is nothing to prove.
        RunError: files are damaged, or the artefact is of another model.
    """
    if artefact is None:
        loaded = load_that_fits(model, trust_remote_code=trust_remote_code)
        zeros = zeros_of(loaded)
        if zeros is None:
            lacks = "no mask over weights" if loaded.weight_mask is None else "a mask over weights that makes none of them zero"
            raise UsageError(
                f"{model} has {lacks}, so there is nothing to verify without an artefact; name the file or folder "
                "that `export` wrote"
            )
        return {"model": model, "sparsity": zeros, "passed": not zeros["failures"]}
    if text == SELF:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    if not artefact.exists():
        raise UsageError(f"{artefact} does not exist; name a .gguf file, a folder with model.onnx, or a Hugging Face folder")
    written = (line for document in texts(text) for line in document.splitlines() if line.strip())
    lines = list(itertools.islice(written, _PIECES))
    listen(Load(model=model))
    loaded = load_that_fits(model, trust_remote_code=trust_remote_code)
    windows = held_out_windows(loaded.tokenizer, source=text, window=window, max_windows=max_windows)
    figures = verify(
        loaded, artefact, windows, pieces=[*_chat(loaded.tokenizer, listen), *lines], trust_remote_code=trust_remote_code,
        on_window=counting(listen, "evaluate"),
    )  # fmt: skip
    zeros = zeros_of(loaded)
    return figures if zeros is None else figures | {"sparsity": zeros, "passed": figures["passed"] and not zeros["failures"]}


def _chat(tokenizer: Any, listen: Listener) -> list[str]:
    """A conversation in the chat template, so that special tokens are compared too; none if there is no template or it fails."""
    if not tokenizer.chat_template:
        return []
    try:
        return [
            rendered(tokenizer, [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]).text
        ]
    except ChatTemplateError as error:
        listen(Warned(message=f"no conversation was compared, because the chat template cannot write one: {error}"))
        return []


def verify(
    loaded: Loaded,
    artefact: Path,
    windows: Sequence[Tensor],
    *,
    pieces: Sequence[str],
    trust_remote_code: bool = False,
    on_window: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Compare an artefact with the torch model it was made from.

    Args:
        loaded: the model in float32, on the CPU.
        artefact: what `export` wrote.
        windows: text as int64 [1, length] tensors.
        pieces: text whose token ids are compared; the first 200.
        trust_remote_code: run Python code that comes with an artefact's folder.
        on_window: called with (done, of).

    Returns:
        Plain data: the figures, the tolerance, `passed`, and `failures`, a sentence for each figure beyond the tolerance.

    Raises:
        UsageError: the artefact has none of the known forms, or its engine is not installed.
        RunError: its engine cannot open it, or it is of another model.
    """
    reference = torch_engine(loaded.model, loaded.tokenizer)
    context = max(max(ids.shape[1] for ids in windows), _PROMPT + _WRITTEN)
    with opened(artefact, context=context, trust_remote_code=trust_remote_code) as other:
        if other.vocab_size != reference.vocab_size:
            raise RunError(
                f"{artefact} has {other.vocab_size:,} tokens and {loaded.source} has {reference.vocab_size:,}, so it comes from "
                "another model; export it again"
            )
        figures = _logits(reference, other, windows, on_window)
        figures["greedy"] = _greedy(reference, other, loaded.tokenizer, windows, figures["max_difference"])
        figures["encoding"] = _encoding(reference, other, pieces)
        tolerance = tolerance_for(other.stored)
        failures = _failures(figures, tolerance)
        return {
            "model": loaded.source, "artefact": str(artefact), "engine": other.name, "stored": other.stored, **figures,
            "tolerance": asdict(tolerance), "passed": not failures, "failures": failures,
        }  # fmt: skip


def bits_per_byte(
    model: str, artefacts: Sequence[Path], *, trust_remote_code: bool = False, listen: Listener = lambda event: None
) -> dict[Path, float]:
    """How well each artefact reads 8 windows of 256 tokens of Python's language reference, in its own engine.

    Args:
        model: the checkpoint, whose tokenizer reads the text.
        artefacts: what `export` wrote of it.
        trust_remote_code: run Python code that comes with a foreign folder.
        listen: called with every event.

    Returns:
        Bits per byte of text.

    Raises:
        UsageError: an engine is not installed.
        RunError: its engine cannot open an artefact.
    """
    tokenizer = load(model, trust_remote_code=trust_remote_code).tokenizer
    windows = held_out_windows(tokenizer, source=_TEXT, window=_WINDOW, max_windows=_WINDOWS)
    num_bytes, found, told = text_bytes(tokenizer, windows), {}, counting(listen, "evaluate")
    for done, artefact in enumerate(artefacts, start=1):
        nats = 0.0
        with opened(artefact, context=_WINDOW, trust_remote_code=trust_remote_code) as engine:
            for ids in windows:
                log_p = engine.logits(ids[0].tolist())[:-1].log_softmax(-1)
                nats -= float(log_p.gather(1, ids[0, 1:, None]).double().sum())
        found[artefact] = nats / math.log(2) / num_bytes
        told(done, len(artefacts))
    return found


def zeros_of(loaded: Loaded) -> dict[str, Any] | None:
    """Whether the weights have the zeros that the model's mask over weights promises; None if nothing is promised.

    Returns:
        `pattern` (None if a cut has broken it), `layers` (masked layers), `masked` (weights that the mask says are zero), `zeros`
        (zeros in these layers), `weights` (all weights in them), and `failures`, a sentence for each layer that does not hold the
        promise.
    """
    mask, model = loaded.weight_mask, loaded.model
    if mask is None or not mask.num_zeros:
        return None
    filled = [f"{name} has weights that are not zero where the mask says so" for name in mask.unmasked(model)]
    masked = [oriented(module) for name, module in linear_layers(model).items() if name in mask.kept]
    return {
        "pattern": None if mask.pattern is None else str(mask.pattern),
        "layers": len(masked),
        "masked": mask.num_zeros,
        "zeros": sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in masked),
        "weights": sum(weight.numel() for weight in masked),
        "failures": [*filled, *mask.broken(model)],
    }


def opened(artefact: Path, *, context: int, trust_remote_code: bool = False) -> AbstractContextManager[Engine]:
    """An artefact in the engine of its form. If no other form fits, it must be a Hugging Face folder.

    Args:
        artefact: what `export` wrote.
        context: tokens that an engine must hold at one time.
        trust_remote_code: run Python code that comes with a folder.

    Raises:
        UsageError: the artefact has none of the known forms, or its engine is not installed.
        RunError: its engine cannot open it.
    """
    if not artefact.exists():
        raise UsageError(f"{artefact} does not exist; name a .gguf file, a folder with model.onnx, or a Hugging Face folder")
    for form in sorted(map(form_of, forms()), key=lambda form: form.holds is plain.holds):
        if form.holds(artefact):
            return form.opened(artefact, context=context, trust_remote_code=trust_remote_code)
    raise UsageError(f"{artefact} is not an artefact: it is neither a .gguf file, nor a folder with model.onnx or config.json")


def _logits(reference: Engine, other: Engine, windows: Sequence[Tensor], on_window: Callable[[int, int], None]) -> dict[str, Any]:
    """Differences, agreement and perplexities over all windows; only one window's logits exist at a time."""
    largest = 0.0
    # |difference|, logit, logit², agreeing, positions, loss of the model, of the artefact
    sums = torch.zeros(7, dtype=torch.float64)
    predicted = logits = 0
    for done, window in enumerate(windows, start=1):
        ids: list[int] = window[0].tolist()
        ours, theirs = reference.logits(ids), other.logits(ids).float()
        difference = (ours - theirs).abs()
        largest = max(largest, float(difference.max())) if bool(difference.isfinite().all()) else math.inf
        wide = ours.double()
        losses = [F.cross_entropy(side[:-1], window[0, 1:], reduction="sum").double() for side in (ours, theirs)]
        same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
        sums += torch.stack([difference.double().sum(), wide.sum(), wide.square().sum(), same, torch.tensor(len(ids)), *losses])
        predicted, logits = predicted + len(ids) - 1, logits + ours.numel()
        on_window(done, len(windows))
    total, first, second, same, positions, loss, loss_other = sums.tolist()
    perplexities = [math.exp(min(700.0, value / predicted)) if math.isfinite(value) else math.inf for value in (loss, loss_other)]
    return {
        "windows": len(windows), "tokens": int(positions), "max_difference": largest, "mean_difference": total / logits,
        "deviation": math.sqrt(max(0.0, second / logits - (first / logits) ** 2)), "agreement": same / positions,
        "perplexity": {"model": perplexities[0], "artefact": perplexities[1]},
    }  # fmt: skip


def _greedy(reference: Engine, other: Engine, tokenizer: Any, windows: Sequence[Tensor], largest: float) -> dict[str, Any]:
    """What both write after the beginnings of some windows, and whether they differ only where the model itself is undecided.

    Suppose that the artefact only computes less exactly. Then, where the texts part, the model's logits of the two tokens are
    less than twice the largest difference apart.
    """
    same, undecided, texts = 0, True, []
    prompts = [window[0, :_PROMPT].tolist() for window in windows[:_PROMPTS]]
    for prompt in prompts:
        ours, theirs = reference.greedy(prompt, _WRITTEN), other.greedy(prompt, _WRITTEN)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True)))
        same += alike
        texts.append({"model": tokenizer.decode(ours), "artefact": tokenizer.decode(theirs), "same_tokens": alike})
        if alike < _WRITTEN:
            logits = reference.logits(prompt + ours[:alike])[-1]
            undecided &= float(logits[ours[alike]] - logits[theirs[alike]]) <= 2 * largest + 1e-6
    return {"same_tokens": same, "of": len(prompts) * _WRITTEN, "parts_only_where_undecided": undecided, "texts": texts}


def _encoding(reference: Engine, other: Engine, pieces: Sequence[str]) -> dict[str, Any] | None:
    """The pieces of text for which both make the same ids; None if the artefact has no tokenizer."""
    if reference.encode is None or other.encode is None:
        return None
    taken = list(pieces[:_PIECES])
    differing = [piece for piece in taken if reference.encode(piece) != other.encode(piece)]
    return {"same": len(taken) - len(differing), "of": len(taken), "example": differing[0][:200] if differing else None}


def _failures(figures: dict[str, Any], tolerance: Tolerance) -> list[str]:
    """A sentence for every figure beyond the tolerance."""
    failures = []
    relative = figures["max_difference"] / (figures["deviation"] or 1.0)
    if tolerance.difference is not None and not relative <= tolerance.difference:
        failures.append(f"a logit is off by {relative:.2g} standard deviations (at most {tolerance.difference:g})")
    if figures["agreement"] < tolerance.agreement:
        failures.append(
            f"the likeliest token agrees at {figures['agreement']:.1%} of positions (at least {tolerance.agreement:.0%})"
        )
    model, artefact = figures["perplexity"]["model"], figures["perplexity"]["artefact"]
    change = abs(artefact / model - 1) if math.isfinite(artefact) else math.inf
    if not change <= tolerance.perplexity:
        failures.append(f"perplexity is {artefact:.4g} instead of {model:.4g} (at most {tolerance.perplexity:.1%} off)")
    if tolerance.difference is not None and not figures["greedy"]["parts_only_where_undecided"]:
        failures.append(
            "greedy text differs from the model's where the model is sure of its token, so the engine's cache is wrong"
        )
    encoding = figures["encoding"]
    if encoding and encoding["same"] < tolerance.encoding * encoding["of"]:
        failures.append(
            f"{encoding['of'] - encoding['same']} of {encoding['of']} pieces of text become other tokens, for example {encoding['example']!r}"
        )
    return failures
