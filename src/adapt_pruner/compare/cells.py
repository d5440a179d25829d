"""How a cell gets its figures: it is pruned in a process of its own, then measured beside the dense model."""

import contextlib
import gc
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded, load_that_fits
from adapt_pruner.core.events import TOLD_AS, Listener, Warned, counting, parse_line
from adapt_pruner.core.events.comparison import CellLine, InCell
from adapt_pruner.core.events.run import chatted
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.weight_mask import count_nonzero
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.processes import deferred, module
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.data.tokens import in_other_tokens, text_bytes
from adapt_pruner.errors import RunError, option
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.speed import forward_speed
from adapt_pruner.recipe import Recipe

_PATIENCE = 30.0  # seconds that a process may tidy up after it is told to stop


def prune_apart(recipe: Recipe, path: Path, *, listen: Listener, trust_remote_code: bool = False) -> None:
    """Prune by a recipe in a process of its own until `path` is written, so that its memory and seconds are its own.

    Args:
        recipe: of one model and one size, without training.
        path: where its checkpoint goes, whole or not at all.
        listen: told of everything that the process says on the way.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        RunError: the process failed; the message is its own sentence.
    """
    with contextlib.ExitStack() as after:
        written = Path(after.enter_context(TemporaryDirectory(prefix="adapt-pruner-"))) / "recipe.yaml"
        written.write_text(recipe.to_yaml(), encoding="utf-8")
        trust = ["--trust-remote-code"] if trust_remote_code else []
        command = module("adapt_pruner", "prune", str(written), "-o", str(path), "--json", *trust)
        with deferred():  # Ctrl-C, until something can stop the process
            # In a session of its own, so that Ctrl-C reaches only this process, which then stops the other one once.
            process = after.enter_context(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
                start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1", TOLD_AS: "json"},
            ))  # fmt: skip
            after.callback(_stop, process)
        reason = _heard(process, listen)
        status = process.wait()
    if status < 0:
        reason = f"the process was killed by signal {-status}, which a machine that runs out of memory does"
    if status:
        raise RunError(reason or f"prune ended with status {status}")


def _heard(process: "subprocess.Popen[str]", listen: Listener) -> str:
    """Pass on what a process says until it ends; returns the sentence of its error, if it had one."""
    reason = ""
    assert process.stderr is not None
    for line in map(str.strip, process.stderr):
        event = parse_line(line) if line.startswith("{") else None
        kind, _, text = line.partition(": ")
        if isinstance(event, Warned):
            listen(event)
        elif event is not None:
            listen(InCell(said=event.to_dict()))
        elif kind == "error":
            reason = text
        elif line:
            listen(CellLine(text=line))
    return reason


def _stop(process: "subprocess.Popen[str]") -> None:
    """End a process, if it still runs, so that it can tidy up."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(loaded: Loaded, windows: Mapping[str, Sequence[Tensor]], *, dtype: str, listen: Listener) -> dict[str, Any]:
    """Sizes of a model, counted in the model itself, and its mean loss on each text.

    Args:
        loaded: the model.
        windows: SPEC of a text -> int64 [1, length] each.
        dtype: precision of the matrix products.
        listen: called with every event of progress.

    Returns:
        `params`, `decoder_params`, `nonzero` (parameters that are not zero), `vocab_size`, and `nll`: SPEC -> nats per token.

    Raises:
        RunError: a loss is not finite.
    """
    losses = {}
    for text, seen in windows.items():
        losses[text] = perplexity(loaded.model, seen, dtype=dtype, on_window=counting(listen, "evaluate")).nll
        if not math.isfinite(losses[text]):
            raise RunError(
                f"the loss on {text} is infinite; the model overflows: give {option('dtype', 'float32')}, or compare milder sizes"
            )
    return {
        "params": count_parameters(loaded.model),
        "decoder_params": decoder_parameters(loaded.model),
        "nonzero": count_nonzero(loaded.model),
        "vocab_size": loaded.model.config.get_text_config().vocab_size,
        "nll": losses,
    }


def measure_beside(
    dense: Loaded, path: Path, windows: Mapping[str, Sequence[Tensor]], *, dtype: str, size: int, listen: Listener
) -> dict[str, Any]:
    """The figures of a checkpoint: those of `measure`, `speed_up` against the dense model, what its pruning took, and its answers to our
    prompts if the recipe asks them (`evaluation.chat`).

    A model with another tokenizer, for example with fewer tokens, reads the same text in its own tokens. Its `nll` is still in
    nats per token of the dense model: nats per byte × bytes of such a token. So losses, perplexities and bits per byte all
    compare.

    Args:
        dense: the model it was made from.
        path: the checkpoint.
        windows: as for `measure`; speed is measured on the first.
        dtype: precision of the matrix products.
        size: parameters it may have.
        listen: called with every event of progress.

    Raises:
        RunError: a loss is not finite, or the model has more than `size` parameters.
    """
    pruned = load_that_fits(str(path), device=next(dense.model.parameters()).device)
    params = count_parameters(pruned.model)
    if params > size:  # matrices that a method adds count too
        raise RunError(f"the model it saves has {params:,} parameters, {params - size:,} more than asked for")
    read = windows
    if pruned.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        read = {
            text: in_other_tokens(seen, read_by=dense.tokenizer, tokenizer=pruned.tokenizer) for text, seen in windows.items()
        }
    figures = measure(pruned, read, dtype=dtype, listen=listen)
    for text in () if read is windows else windows:
        figures["nll"][text] *= _bytes_a_token(dense, windows[text]) / _bytes_a_token(pruned, read[text])
    slow, fast = forward_speed([dense.model, pruned.model], next(iter(windows.values()))[0], dtype=dtype)
    made = read_json(path / filenames.PRUNING)
    took = {key: made["figures"][key] for key in ("iterations", "seconds", "peak_bytes", "peak_rss_bytes")}
    chats = chatted(made["figures"])
    answers = {"chat": {"asked": chats[-1].asked, "right": chats[-1].right, "dense": chats[-1].dense}} if len(chats) > 1 else {}
    return {**figures, **took, **answers, "speed_up": fast / slow, "made_by": made["made_by"]}


def _bytes_a_token(loaded: Loaded, windows: Sequence[Tensor]) -> float:
    """Mean bytes of text per predicted token of the windows."""
    return text_bytes(loaded.tokenizer, windows) / sum(ids.numel() - 1 for ids in windows)


def release() -> None:
    """Return the memory of models that are no longer held to the system, for the next process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
