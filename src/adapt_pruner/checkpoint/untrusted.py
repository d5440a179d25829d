"""Checks of a model folder of unknown origin: regular files only, plain numbers in safetensors, no code in its config.

Without them transformers would follow an index out of the folder and to pickles, apply an adapter beside the weights, and fetch
kernels from the hub that a config names.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_regular
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError, UsageError, first_line

_WHOLE = (".json", ".jinja", ".model", ".md", ".py", ".tiktoken", ".txt")  # endings of files that are read whole
_SHARD = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")

_HARMLESS = {"attn": (None, "eager", "sdpa", "flex_attention"), "experts": (None, "eager", "batched_mm", "grouped_mm")}
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them
_CODE = ("auto_map", "custom_generate", "custom_pipelines", "distributed_config", "kernel_config", "use_kernels")


def check_files(folder: Path) -> None:
    """Refuse a model folder with a file that is not regular (reading it may never end) or too large to be read whole.

    Raises:
        UsageError: the folder has such a file.
    """
    for inner in (folder, folder / "additional_chat_templates"):
        for path in sorted(inner.iterdir()) if inner.is_dir() else ():
            check_regular(path, **({} if path.suffix in _WHOLE else {"most": None}))


def check_weights(folder: str, named: Any, name: str) -> None:
    """Refuse weights outside the folder or not in safetensors, and an adapter beside them.

    Args:
        folder: a folder or hub id.
        named: `transformers_weights` of its config.json, a file to read instead of model.safetensors; None if it names none.
        name: the model's name for messages.

    Raises:
        UsageError: the weights are refused.
        RunError: the index cannot be read.
    """
    if found(folder, "adapter_config.json") is not None:
        raise UsageError(
            f"{name} has an adapter beside its weights (adapter_config.json), which would silently change the model; merge it "
            "with peft (merge_and_unload) and name the result, or remove adapter_config.json to load the weights without it"
        )
    index = named if isinstance(named, str) and named.endswith(".index.json") else filenames.WEIGHTS_INDEX
    if named is not None and index is not named and not _is_shard(named):
        raise UsageError(f"config.json of {name} names the weights {named!r}; only *.safetensors files of the folder are read")
    if Path(index).name != index:
        raise UsageError(
            f"config.json of {name} names the weights {named!r}, which are outside its folder; remove transformers_weights"
        )
    path = found(folder, index)
    if path is None:
        return
    try:
        shards = shards_in(path)
    except ValueError as error:
        raise RunError(f"{index} of {name} is damaged ({error}); get the file again") from error
    for shard in sorted(shards):
        if not _is_shard(shard):
            raise UsageError(f"{index} of {name} names the file {shard!r}; only *.safetensors files of the folder are read")


def shards_in(index: Path) -> set[str]:
    """The files that an index of weights names.

    Raises:
        ValueError: it cannot be read, or is no index.
    """
    try:
        return set(map(str, read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(first_line(error)) from error


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def found(folder: str, file: str) -> Path | None:
    """A file of a folder, or of a model on the hub (then fetched to the cache); None if there is no such file.

    Raises:
        UsageError: it is a device, a pipe or a socket.
    """
    if Path(folder).is_dir():
        path = Path(folder) / file
        check_regular(path, most=None)
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        path = cached_file(folder, file, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no network or no permission: loading the weights reports it, unless the cache has them
        return None
    return None if path is None else Path(path)


def stored_dtype(folder: str, named: Any) -> str | None:
    """The format of most numbers in the weights of a model, or in the first of several files.

    A config.json may name no format, or another one. The first tensor would not do, because safetensors writes the widest first,
    and these may be few: frequencies of a rope in an old checkpoint.

    Args:
        folder: a folder or hub id whose weights `check_weights` has passed.
        named: `transformers_weights` of its config.json, a file to read instead of model.safetensors; None if it names none.

    Returns:
        Its name in torch, such as `bfloat16`; None if there are no weights, or they cannot be read, which whoever loads them reports.
    """
    numbers: Counter[str] = Counter()
    try:
        for path in weight_files(folder, named)[:1]:
            for _, kind, shape in _tensors(path):
                if kind in FORMATS:
                    numbers[FORMATS[kind]] += math.prod(shape)
    except (SafetensorError, OSError, ValueError):
        return None
    return max(numbers, key=numbers.__getitem__, default=None)


def check_plain(model: Any, folder: str, named: Any, name: str) -> None:
    """Refuse weights that are stored as integers or truth values: those of a quantised model, which no config declares.

    Args:
        model: the model that was loaded.
        folder: a folder or hub id.
        named: as for `stored_dtype`.
        name: the model's name for messages.

    Raises:
        UsageError: a parameter of the model is stored so.
    """
    parameters = {key for full, _ in model.named_parameters() for key in (full, full.removeprefix(f"{model.base_model_prefix}."))}
    for path in weight_files(folder, named):
        for key, kind, _ in _tensors(path):
            if kind.startswith(("I", "U", "BOOL")) and key in parameters:
                raise UsageError(
                    f"the weights of {name} are no plain numbers: {key} is stored as {kind}, and its config.json has no "
                    "quantization_config; name the model that it was made from"
                )


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, format and shape of each tensor in a file, of which only the header is read."""
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_slice(name)
            yield name, tensor.get_dtype(), tensor.get_shape()


def weight_files(folder: str, named: Any) -> list[Path]:
    """The file of the weights, or those that their index names; empty if there is none."""
    for name in (filenames.WEIGHTS, filenames.WEIGHTS_INDEX) if named is None else (str(named),):
        if (path := found(folder, name)) is not None:
            shards = [found(folder, shard) for shard in sorted(shards_in(path))] if name.endswith(".json") else [path]
            return [shard for shard in shards if shard is not None]
    return []


def without_code(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json, as plain data, without fields that make code be fetched or run, in inner configs too."""
    return {key: _inner(value) for key, value in raw.items() if not _names_code(key, value)}


def _inner(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_code(value)
    return [_inner(item) for item in value] if isinstance(value, list) else value


def code_in(raw: Any) -> list[str]:
    """The fields that `without_code` removes, except auto_map, each with its value as text."""
    if isinstance(raw, list):
        return [field for item in raw for field in code_in(item)]
    if not isinstance(raw, Mapping):
        return []
    mine = [f"{key}: {value}" for key, value in raw.items() if _names_code(key, value) and key != "auto_map"]
    return mine + [field for value in raw.values() for field in code_in(value)]


def _names_code(key: Any, value: Any) -> bool:
    if match := _IMPLEMENTATION.fullmatch(str(key)):
        return not (value is None or isinstance(value, str)) or value not in _HARMLESS[match[1]]
    return key in _CODE and bool(value)
