"""How much faster one model could be than another: by multiply-adds for a prompt, by bytes moved for each written token.

The formulas are those of `run.estimate`. Logits of a prompt are counted at its last token only, since engines that go on to write
do so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.run.estimate import Shapes, bytes_moved, multiply_adds

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Weights:
    """What an engine holds of a model.

    Attributes:
        shapes: shapes of the matrices in the engine, padding included.
        weight: mean bytes per weight.
        cached: bytes per number in the cache of keys and values.
    """

    shapes: Shapes
    weight: float
    cached: float


def ideal_speed_up(slow: Weights, fast: Weights, *, phase: Phase, batch: int, prompt: int, generate: int) -> float:
    """How many times as fast as `slow` the model `fast` could be.

    prefill: multiply-adds of slow / those of fast, for a row of `prompt` tokens. decode: bytes that slow moves per step / those
    of fast, at the mean context prompt + generate / 2.

    Args:
        slow: the dense model.
        fast: the pruned one.
        phase: reading the prompt, or writing after it.
        batch: rows at one time.
        prompt: tokens of a prompt.
        generate: tokens written after it.
    """
    if phase == "prefill":
        ours, theirs = (multiply_adds(of.shapes, length=prompt, logits=1) for of in (fast, slow))
        return theirs / ours
    context = prompt + generate / 2
    read = [bytes_moved(of.shapes, context=context, batch=batch, weight=of.weight, cached=of.cached) for of in (fast, slow)]
    return read[1] / read[0]


def of_gguf(path: Path) -> Weights:
    """What llama.cpp holds for a GGUF file: all of its tensors, and a cache in 16 bits.

    Raises:
        UsageError: the gguf library is not installed.
        RunError: the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"the sizes in {path} are read with the gguf library; {to_install('verify')}") from error
    try:
        reader = gguf.GGUFReader(path)
        tensors = list(reader.tensors)
        by_name = {tensor.name: [int(length) for length in tensor.shape] for tensor in tensors}  # inputs first
        width, vocabulary = by_name["token_embd.weight"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise RunError(f"{path} cannot be read ({first_line(error)}); export it again") from error

    def outputs(name: str) -> list[int]:
        return [shape[1] for key, shape in by_name.items() if key.endswith(f".{name}.weight")]

    def heads(key: str) -> int:
        """Outputs of all layers' queries or keys where they are one matrix with the values: heads times their size."""
        found = {
            name.partition(".attention.")[2]: field.contents() for name, field in reader.fields.items() if ".attention." in name
        }
        count = found.get(key, found["head_count"])
        each = count if isinstance(count, list) else [count] * len(layers)
        return int(found.get("key_length", width // max(each))) * sum(map(int, each))

    fused = any(name.endswith(".attn_qkv.weight") for name in by_name)

    layers: dict[str, int] = {}
    for tensor in tensors:
        head, _, rest = tensor.name.partition(".")
        if head == "blk":
            number = rest.partition(".")[0]
            layers[number] = layers.get(number, 0) + int(tensor.n_elements)
    params = sum(int(tensor.n_elements) for tensor in tensors)
    shapes = Shapes(
        params=params, decoder=sum(layers.values()), largest=max(layers.values(), default=0), layers=len(layers),
        vocabulary=vocabulary, width=width, queries=heads("head_count") if fused else sum(outputs("attn_q")),
        keys=heads("head_count_kv") if fused else sum(outputs("attn_k")), neurons=sum(outputs("ffn_up")),
        widest=max(outputs("ffn_up"), default=0),
    )  # fmt: skip
    return Weights(shapes, sum(int(tensor.n_bytes) for tensor in tensors) / params, 2)


def of_torch(facts: dict[str, Any]) -> Weights:
    """What torch holds, from the facts that the worker tells."""
    return Weights(Shapes(**facts["shapes"]), facts["weight"], facts["weight"])
