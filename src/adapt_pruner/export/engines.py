"""The engines that artefacts run in, all asked the same three things: logits, what is written greedily, and token ids."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.export import llama_cpp
from adapt_pruner.export.onnx import session

__all__ = ["Engine", "opened", "torch_engine"]


@dataclass(frozen=True)
class Engine:
    """An open artefact.

    Attributes:
        name: of the engine, with its version.
        stored: what the weights are stored in: `f32`, `bf16`, `q8_0`, …
        vocab_size: logits a token.
        logits: ids -> float32 [length, vocabulary].
        greedy: ids, n -> the n tokens of highest logit that follow, each put behind those before it.
        encode: text -> ids, with what the engine puts before a text by itself; None where it has no tokenizer.
    """

    name: str
    stored: str
    vocab_size: int
    logits: Callable[[list[int]], Tensor]
    greedy: Callable[[list[int], int], list[int]]
    encode: Callable[[str], list[int]] | None


@contextmanager
def opened(artefact: Path, *, context: int, trust_remote_code: bool = False) -> Iterator[Engine]:
    """An artefact in the engine it is for: a .gguf file, a folder with model.onnx, or a Hugging Face folder.

    Args:
        artefact: what `export` wrote.
        context: tokens that an engine has to hold at one time.
        trust_remote_code: run Python code that comes with a folder.

    Raises:
        UsageError: it is nothing of that kind, or its engine is not installed.
        RunError: its engine cannot open it.
    """
    if not artefact.exists():
        raise UsageError(f"{artefact} does not exist; name a .gguf file, a folder with model.onnx, or a Hugging Face folder")
    if artefact.is_file() and artefact.suffix == ".gguf":
        with _llama_cpp(artefact, context) as engine:
            yield engine
    elif artefact.suffix == ".onnx" or (artefact / "model.onnx").is_file():
        yield _onnx(artefact if artefact.is_file() else artefact / "model.onnx", trust_remote_code)
    elif (artefact / "config.json").is_file():
        with _stranger(artefact, trust_remote_code) as engine:
            yield engine
    else:
        raise UsageError(f"{artefact} is no artefact: neither a .gguf file, nor a folder with model.onnx or config.json")


def torch_engine(model: Any, tokenizer: Any) -> Engine:
    """The torch model that artefacts are compared with."""
    from transformers import GenerationConfig

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return found

    @torch.no_grad()
    def greedy(ids: list[int], count: int) -> list[int]:
        before = model.generation_config
        model.generation_config = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=0)
        try:
            asked = torch.tensor([ids])
            written = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=count)
        finally:
            model.generation_config = before
        found: list[int] = written[0, len(ids) :].tolist()
        return found

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return found

    return Engine(f"torch {torch.__version__}", "f32", model.get_input_embeddings().weight.shape[0], logits, greedy, encode)


@contextmanager
def _stranger(folder: Path, trust_remote_code: bool) -> Iterator[Engine]:
    """Stock transformers in a process that does not have this package."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("auto_map") and not trust_remote_code:
        raise UsageError(f"{folder} brings Python code to load it; pass --trust-remote-code to run it")
    command = [sys.executable, "-P", str(Path(__file__).with_name("stranger.py")), str(folder), str(torch.get_num_threads())]
    with subprocess.Popen(
        [*command, *(["trust"] if trust_remote_code else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        into, out = process.stdin, process.stdout

        def ask(question: dict[str, Any]) -> None:
            into.write(json.dumps(question).encode() + b"\n")
            into.flush()

        def line() -> Any:
            if not (said := out.readline()):
                raise RunError(
                    f"stock transformers ended on {folder} without a word; there may be too little memory for two models"
                )
            return json.loads(said)

        def logits(ids: list[int]) -> Tensor:
            ask({"logits": ids})
            length, vocab_size = line()
            return torch.frombuffer(bytearray(out.read(4 * length * vocab_size)), dtype=torch.float32).view(length, vocab_size)

        def greedy(ids: list[int], count: int) -> list[int]:
            ask({"greedy": ids, "tokens": count})
            found: list[int] = line()
            return found

        def encode(text: str) -> list[int]:
            ask({"encode": text})
            found: list[int] = line()
            return found

        try:
            hello = line()
            if "error" in hello:
                raise RunError(f"stock transformers cannot load {folder}: {hello['error']}")
            name = f"transformers {transformers.__version__}, {hello['class']}"
            yield Engine(name, "f32", hello["vocab_size"], logits, greedy, encode)
        finally:
            into.close()
            process.kill()


@contextmanager
def _llama_cpp(path: Path, context: int) -> Iterator[Engine]:
    """A GGUF file in llama.cpp, with a float32 cache so that only the weights differ."""
    module, said = llama_cpp.library()
    try:
        with llama_cpp.plain_kernels(module):
            llama = module.Llama(
                str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, type_k=module.GGML_TYPE_F32,
                type_v=module.GGML_TYPE_F32, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
                n_gpu_layers=0, verbose=False,
            )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        why = "; ".join(said[-2:]) or first_line(error)
        raise RunError(f"llama.cpp cannot load {path}: {why}; export it again") from error

    def logits(ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    def greedy(ids: list[int], count: int) -> list[int]:
        llama.reset()
        llama.eval(ids)
        found: list[int] = []
        while True:
            found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            if len(found) == count:
                return found
            llama.eval(found[-1:])

    def encode(text: str) -> list[int]:
        found: list[int] = llama.tokenize(text.encode(), add_bos=True, special=True)
        return found

    kind = int(llama.metadata.get("general.file_type", 0))
    stored = next((quant for quant, value in llama_cpp.file_types(module).items() if value == kind), "f32")
    try:
        yield Engine(f"llama.cpp ({llama.metadata['general.architecture']})", stored, llama.n_vocab(), logits, greedy, encode)
    finally:
        llama.close()


def _onnx(path: Path, trust_remote_code: bool) -> Engine:
    """An ONNX graph in onnxruntime; the tokenizer beside it, if there is one, is read by transformers."""
    opened = session(path)
    import onnxruntime

    def logits(ids: list[int]) -> Tensor:
        asked = np.array([ids], dtype=np.int64)
        (found,) = opened.run(None, {"input_ids": asked, "attention_mask": np.ones_like(asked)})
        return torch.from_numpy(found[0])

    def greedy(ids: list[int], count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found.append(int(logits(ids + found)[-1].argmax()))
        return found

    encode = None
    if (path.parent / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=trust_remote_code)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"the tokenizer beside {path} cannot be read ({first_line(error)}); where it brings Python code of its own, "
                "--trust-remote-code runs it"
            ) from error

        def encode(text: str) -> list[int]:
            found: list[int] = tokenizer(text, verbose=False)["input_ids"]
            return found

    return Engine(f"onnxruntime {onnxruntime.__version__}", "f32", opened.get_outputs()[0].shape[-1], logits, greedy, encode)
