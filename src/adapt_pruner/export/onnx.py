"""An ONNX graph of the forward pass, from token ids and attention mask to logits, for any batch and length; without a cache.

model.onnx        input_ids, attention_mask int64 [batch, length] -> logits float32 [batch, length, vocabulary]
model.onnx.data   its weights, if they are more than 2 GB
config.json, tokenizer*, …

Of a model of two towers it writes a graph of each; see `export.towers`.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.checkpoint.compatible_names import write_compatible_names
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import (
    check_finite,
    check_fits,
    check_target,
    towers_in,
    whole_or_nothing,
    write_generation_config,
)
from adapt_pruner.checkpoint.untrusted import check_files
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError, first_line, option
from adapt_pruner.export.engines import Engine
from adapt_pruner.export.loading import ropes_of, towers_of
from adapt_pruner.export.towers import loading as loading_towers
from adapt_pruner.export.towers import write_graph, write_graphs

ABOUT = "an ONNX graph in float32, without a cache"
LIBRARY = "onnx"

_TOLERANCE = 1e-3  # largest difference of a logit, as a share of the standard deviation of the logits
_LENGTHS = ((1, 3), (2, 17))  # sizes for the check; they differ from those of tracing


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def write(loaded: Loaded, path: Path, *, quant: str | None = None) -> list[str]:
    """Write `loaded` as an ONNX graph in float32, after onnxruntime has computed the same logits.

    Any model can be exported, even a sliced one or one with biases of a repair.

    Raises:
        UsageError: the folder is not empty, or a library is missing.
        RunError: torch cannot trace the model, onnxruntime computes something else, or the folder could not be written.
    """
    check_target(path)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX graphs are made with onnx, onnxscript and onnxruntime, and {error.name} is not installed; {to_install('onnx')}"
        ) from error
    model = loaded.model
    towers = bool(towers_in(model.config))
    ropes = ropes_of(getattr(model.config, "rope_parameters", None) or {})
    if any(rope.get("rope_type") == "dynamic" for rope in ropes):
        raise UsageError(
            "a graph is the same for texts of all lengths, and this model's rope 'dynamic' is not; use the form padded"
        )
    check_finite(path, model.state_dict(), dtype=torch.float32)
    check_fits(path, model.state_dict(), dtype=torch.float32)
    in_float32 = [] if loaded.dtype == torch.float32 else [f"the graph is in float32, the checkpoint in {str(loaded.dtype)[6:]}"]
    if towers:
        with whole_or_nothing(path) as folder, _traceable(model):
            write_graphs(loaded, folder, session=_session)
        return in_float32
    most = int(model.config.max_position_embeddings)
    example = torch.zeros(2, 8, dtype=torch.long)
    axes = {0: torch.export.Dim("batch", min=1, max=65_536), 1: torch.export.Dim("length", min=1, max=most)}
    with whole_or_nothing(path) as folder:
        with _traceable(model):
            inputs = {"input_ids": example, "attention_mask": torch.ones_like(example)}
            write_graph(_Logits(model), folder / "model.onnx", inputs, "logits", {"input_ids": axes, "attention_mask": axes})
        _check(model, folder / "model.onnx")
        config = copy.deepcopy(model.config)
        config.__dict__.pop("auto_map", None)
        config.save_pretrained(folder)
        write_generation_config(model, folder)
        loaded.tokenizer.save_pretrained(folder)
        write_compatible_names(folder)  # tools for ONNX pin transformers 4
    notes = in_float32
    for rope in ropes:
        if rope.get("rope_type") == "longrope":  # transformers changes its factors when a text passes that length
            short = rope.get("original_max_position_embeddings") or model.config.original_max_position_embeddings
            notes.append(f"the graph computes what the checkpoint does on texts of up to {short:,} tokens; longer ones differ")
    return notes


def holds(artefact: Path) -> bool:
    """Whether it is an ONNX file, or a folder with model.onnx."""
    return artefact.suffix == ".onnx" or (artefact / "model.onnx").is_file()


def loading(config: Mapping[str, Any]) -> Iterator[str]:
    """Commands for its card that use ONNX Runtime."""
    if towers_of(config):
        yield from loading_towers()
        return
    yield (
        "**ONNX Runtime**:\n\n```python\nimport numpy, onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # where this file lies\n'
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        'ids = tokenizer("The capital of France is", return_tensors="np").input_ids.astype(numpy.int64)\n'
        '(logits,) = session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})\n'
        "print(tokenizer.decode(logits[0, -1].argmax()))\n```"
    )


@contextmanager
def opened(artefact: Path, *, context: int, trust_remote_code: bool) -> Iterator[Engine]:
    """The graph in onnxruntime. If a tokenizer lies beside it, transformers reads it.

    Raises:
        UsageError: onnxruntime is not installed, a file beside the graph is not a regular file, or the tokenizer brings Python
            code and `trust_remote_code` is not set.
        RunError: the file is damaged.
    """
    path = artefact if artefact.is_file() else artefact / "model.onnx"
    graph = _session(path)
    import onnxruntime

    def logits(ids: list[int]) -> Tensor:
        input_ids = np.array([ids], dtype=np.int64)
        (batch,) = graph.run(None, {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)})
        return torch.from_numpy(batch[0])

    tokenizer: Any = None
    if (path.parent / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        check_files(path.parent)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=trust_remote_code)
        except Exception as error:  # the tokenizers library raises plain ones
            raise UsageError(
                f"the tokenizer beside {path} cannot be read ({first_line(error)}); if it brings its own Python code, pass "
                f"{option('trust_remote_code', True)}"
            ) from error

    encode = None if tokenizer is None else lambda text: tokenizer(text, verbose=False)["input_ids"]
    yield Engine(f"onnxruntime {onnxruntime.__version__}", "f32", graph.get_outputs()[0].shape[-1], logits, encode)


def _session(path: Path) -> Any:
    """An ONNX file, open in onnxruntime on the CPU.

    Raises:
        UsageError: onnxruntime is not installed.
        RunError: the file is damaged.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"ONNX graphs run in onnxruntime, which is not installed; {to_install('onnx')}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other public base class
        raise RunError(f"onnxruntime cannot open {path} ({first_line(error)}); export it again") from error


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Within this context attention is plain operations, which any exporter can trace, and torch's exporter gives no notices."""
    attention, logger = model.config._attn_implementation, logging.getLogger("torch.onnx")
    level = logger.level
    try:
        model.set_attn_implementation("eager")
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
        model.set_attn_implementation(attention)


@torch.no_grad()
def _check(model: Any, path: Path) -> None:
    """Refuse a graph whose logits differ from the model's, at sizes other than those of tracing."""
    opened = _session(path)
    generator = torch.Generator().manual_seed(0)
    for batch, length in _LENGTHS:
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 4] = 0  # as for a text that is shorter than the batch
        (logits,) = opened.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        read = mask.bool()
        difference = float((torch.from_numpy(logits)[read] - expected[read]).abs().max() / expected[read].std())
        if not difference <= _TOLERANCE:
            raise RunError(
                f"the graph's logits differ from the model's by {difference:.1e} of their deviation (at most {_TOLERANCE:.0e}) "
                f"at batch {batch}, length {length}; nothing was written"
            )
