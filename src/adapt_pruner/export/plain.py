"""A plain Hugging Face folder: how such a form is recognised, loaded, and proved in stock transformers."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.checkpoint.untrusted import check_files, check_weights, code_in
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.processes import talking
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError, UsageError, first_line, option
from adapt_pruner.export.engines import Engine
from adapt_pruner.export.loading import in_transformers, in_vllm, not_in_mlx


def holds(artefact: Path) -> bool:
    """Whether it has a config.json. Folders of other forms may have one too, so those forms are asked first."""
    return (artefact / filenames.CONFIG).is_file()


def loading(config: Mapping[str, Any]) -> Iterator[str]:
    """Commands for its card that use transformers and vLLM."""
    own_code = bool(config.get("auto_map"))
    yield in_transformers(own_code)
    yield "**vLLM**:\n\n```sh\nvllm serve . --trust-remote-code\n```" if own_code else in_vllm(config)
    yield from not_in_mlx(config)


def loading_padded(config: Mapping[str, Any]) -> Iterator[str]:
    """The same for a folder whose layers are padded with zeros."""
    yield from loading(config)
    yield (
        "**DoRA** (peft's `use_dora`) gives NaN on this folder, because it divides by the length of each row of a weight, and the rows that pad "
        "a layer are zero. LoRA without DoRA works; or adapt the checkpoint that this folder was made of."
    )


@contextmanager
def opened(artefact: Path, *, context: int, trust_remote_code: bool) -> Iterator[Engine]:
    """The artefact in stock transformers, in a process without this package.

    Raises:
        UsageError: it brings Python code and `trust_remote_code` is not set, or its files are not allowed in a model folder.
        RunError: transformers cannot load it.
    """
    import transformers

    check_files(artefact)
    try:
        config = read_json(artefact / filenames.CONFIG)
        if isinstance(config, dict):  # what transformers reads, which may lie in another file that this one names
            config, _ = transformers.PreTrainedConfig.get_config_dict(artefact)
    except (OSError, ValueError) as error:
        raise UsageError(f"{artefact / 'config.json'} cannot be read: {first_line(error)}; get the folder again") from error
    if not isinstance(config, dict):
        raise UsageError(f"{artefact / 'config.json'} is not the config of a model; get the folder again")
    if config.get("auto_map") and not trust_remote_code:
        raise UsageError(f"{artefact} brings Python code to load it; pass {option('trust_remote_code', True)} to run it")
    if (named := code_in(config)) and not trust_remote_code:
        raise UsageError(
            f"{artefact / 'config.json'} names code of the hub ({named[0]}); pass {option('trust_remote_code', True)} to fetch and run it"
        )
    check_weights(str(artefact), config.get("transformers_weights"), str(artefact))
    command = [sys.executable, "-P", str(Path(__file__).with_name("stranger.py")), str(artefact), str(torch.get_num_threads())]
    silent = f"stock transformers ended on {artefact} without a message; there may be too little memory for two models"
    with talking([*command, *(["trust"] if trust_remote_code else [])], silent=silent) as child:

        def logits(ids: list[int]) -> Tensor:
            length, vocab_size = child.ask({"logits": ids})
            buffer = bytearray(child.read(4 * length * vocab_size))
            return torch.frombuffer(buffer, dtype=torch.float32).view(length, vocab_size)

        hello = child.hear()
        if "error" in hello:
            raise RunError(f"stock transformers cannot load {artefact}: {hello['error']}")
        name = f"transformers {transformers.__version__}, {hello['class']}"
        yield Engine(
            name, "f32", hello["vocab_size"], logits, encode=lambda text: child.ask({"encode": text}),
            written=lambda ids, count: child.ask({"greedy": ids, "tokens": count}),
        )  # fmt: skip
