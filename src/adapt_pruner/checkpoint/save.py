"""Writing a model as a Hugging Face folder, whole or not at all.

config.json             the dense config with the present sizes; `per_layer_config` if layers differ
model*.safetensors      weights
tokenizer*, …           the tokenizer
generation_config.json  if the dense model has one
modeling_pruned.py      if layers differ, or have biases of a repair or sums of AST: classes for stock transformers (`auto_map`)
modeling_sliced.py      if the model is sliced, beside modeling_pruned.py
mask.json               which units of the dense model stayed
sparsity/               if single weights are zero: which ones (see `checkpoint.weight_mask_file`)
pruning.json            how the model was made
README.md               for a result, the model card (see `report.card`)
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from adapt_pruner import families
from adapt_pruner.checkpoint.compatible_names import stock_name, write_compatible_names
from adapt_pruner.checkpoint.shards import tensors_of, write_shards
from adapt_pruner.checkpoint.weight_mask_file import write_weight_mask
from adapt_pruner.core.model import modeling_pruned, modeling_sliced
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut, write_sizes
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.shelf import is_shelved
from adapt_pruner.core.model.weight_mask import WeightMask
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_place, folder_beside, is_there, lacks_disk_space, named, sync, why, write_failure
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.families import admission

SHARD_BYTES = 50_000_000_000  # the most bytes that transformers writes into one weight file


def check_target(path: Path) -> None:
    """Refuse a target that exists and is not an empty folder, before any work is done.

    Raises:
        UsageError: the folder is not empty, the target is not a folder, a disk is mounted there, or `check_place` refuses it.
    """
    check_place(path)
    check_empty(path)
    if path.is_dir() and path.is_symlink():
        check_place(path.resolve())
    if os.path.ismount(path):
        raise UsageError(f"{path} is a mount point, which a result cannot replace; name a folder in it")


def check_empty(path: Path) -> None:
    """Refuse anything that exists and is not an empty folder.

    Raises:
        UsageError: the path is refused.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} exists and is not empty; name another folder or empty it first")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({why(error)}); name another folder") from error
    if is_there(path) and not path.is_dir():
        raise UsageError(f"{path} exists and is not a folder; name another")


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`. It gets its name at the end, or is removed if anything fails.

    Raises:
        RunError: the folder could not be written (disk full, no permission); nothing is left under `path`.
    """
    path = path.resolve()  # a folder can be renamed to its full name, but not to "." or to a link
    with or_unwritten(path), folder_beside(path) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes files readable by their owner only
            sync(file)
        sync(partial)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        if path.exists():
            rescued = named(partial, path.with_name(f"{path.name}-{partial.name[-8:]}"))
            raise RunError(f"another program wrote into {path} meanwhile; the complete result is in {rescued}")
        named(partial, path)
        sync(path.parent)


@contextmanager
def or_unwritten(path: Path) -> Iterator[None]:
    """Within this context a failure of the disk is told as one.

    Raises:
        RunError: `path` could not be written.
    """
    try:
        yield
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise unwritten(path, reason) from error


def check_fits(path: Path, *files: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse to write tensors if there is no room for them, before the first is written.

    Args:
        path: where the tensors go.
        files: the tensors of each file, by name; tied ones are written once.
        dtype: precision in which floating-point tensors are written.

    Raises:
        RunError: there is too little room, or the system allows no file of this size.
    """
    sizes = []
    for tensors in files:
        distinct = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in tensors.values()}.values()
        sizes.append(
            sum(tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in distinct)
        )
    if reason := lacks_disk_space(path, sum(sizes), largest=min(max(sizes), SHARD_BYTES)):
        raise unwritten(path, reason)


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> None:
    """Refuse to write weights that are NaN or infinity, or would become so in the number format of the file.

    The least and the greatest number of a tensor tell, since NaN passes through both. They take one pass over the weights and no
    memory: a thirtieth of the time of `isfinite`.

    Args:
        path: where the tensors go.
        tensors: by name.
        dtype: precision in which floating-point tensors are written.

    Raises:
        RunError: a tensor holds such a number.
    """
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        for number in map(float, tensor.aminmax()):
            if not abs(number) <= most:
                raise RunError(
                    f"{path} was not written: {name} holds {number:g}, and weights in {str(dtype).removeprefix('torch.')} are numbers up to "
                    f"{most:.2e}; if the model's own files hold it, get them again, else set dtype=float32 or another repair"
                )


def unwritten(path: Path, reason: str) -> RunError:
    """The error to raise if nothing could be written to `path`."""
    return RunError(f"{path} could not be written: {reason}; nothing was left there, free some space or name another folder")


def save(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    mask: Mask | None = None,
    pruning: dict[str, Any] | None = None,
    dtype: torch.dtype,
    weights: Mapping[str, torch.Tensor] | None = None,
    weight_mask: WeightMask | None = None,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write model, tokenizer, mask and history to `path`; the model is left as found.

    Args:
        model: causal LM of a known family, cut or not.
        tokenizer: a transformers tokenizer.
        path: a folder that does not exist or is empty.
        mask: against the dense model.
        pruning: how the model was made; plain data.
        dtype: precision of the saved weights.
        weights: by name, if they are not in the model (because it is sharded or has adapters), or not all are to be written.
        weight_mask: which single weights stay, if others are zero.
        write_more: called at the end to write more files into the folder.

    Raises:
        RunError: a weight is not finite, or the folder could not be written; nothing is left under `path`.
    """
    config = _config(model, dtype, as_it_says=weights is not None)
    shelved = is_shelved(model)
    if weights is None:
        weights = tensors_of(model) if shelved else model.state_dict()
    state: dict[str, torch.Tensor] = dict(weights)
    if not shelved:
        check_finite(Path(path), state, dtype=dtype)
    check_fits(Path(path), state, dtype=dtype)
    with whole_or_nothing(Path(path)) as folder:
        if shelved:
            write_shards(
                state, folder, dtype=dtype, check=lambda name, tensor: check_finite(Path(path), {name: tensor}, dtype=dtype)
            )
            write_generation_config(model, folder)
        else:
            _save_weights(model, folder, dtype, state, as_named=bool(_built_by(config)[1]))
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_compatible_names(folder)
        for name in _built_by(config)[1]:
            shutil.copyfile(Path(str(modeling_pruned.__file__)).with_name(f"{name}.py"), folder / f"{name}.py")
        if mask is not None:
            (folder / filenames.MASK).write_text(to_json(mask.to_json()) + "\n", encoding="utf-8")
        if weight_mask is not None:
            write_weight_mask(weight_mask, folder)
        if pruning is not None:
            (folder / filenames.PRUNING).write_text(to_json(pruning, indent=2) + "\n", encoding="utf-8")
        write_more(folder)


def towers_in(config: Any) -> list[Any]:
    """The configs of the two towers of a model; none of a model that has only one."""
    towers = [getattr(config, f"{tower}_config", None) for tower in ("text", "vision")]
    return towers if all(towers) else []


def needs_own_code(config: Any) -> bool:
    """Whether no stock class builds a model of this config, but one of modeling_pruned.py or modeling_sliced.py does."""
    if any(map(needs_own_code, towers_in(config))):
        return True
    added = getattr(config, "output_bias", False) or getattr(config, "block_sums", 0)
    narrow = not config.is_heterogeneous and modeling_pruned.has_narrow_heads(config)
    return bool(config.is_heterogeneous or narrow or added or families.is_sliced(config))


def stock_class(model: Any) -> str:
    """The name of the stock class that a model is or comes from."""
    return stock_name(type(model).__name__)


_COMES_BACK: dict[str, bool] = {}  # of this process, by `admission.fingerprint`


def can_save_unequal_layers(model: Any) -> bool:
    """Whether modeling_pruned.py builds such a model with layers that differ in size.

    For a type that no family file names, a tiny model of its class is cut to unequal layers, saved and built again: its logits must
    be equal, and it must write the same tokens with a cache as without.
    """
    if towers_in(model.config):
        return families.family_of(model.config) is not None
    layer = decoder_layers(model)[0]
    if not hasattr(modeling_pruned, f"Pruned{stock_class(model)}"):
        return False
    if families.family_of(model.config) is not None:
        return hasattr(layer, "self_attn") and hasattr(layer, "mlp")
    config = admission.shrunk(model.config)
    name = admission.fingerprint(config)
    if name not in _COMES_BACK:
        _COMES_BACK[name] = _comes_back(admission.tiny_model(config))
    return _COMES_BACK[name]


@torch.no_grad()
def _comes_back(tiny: Any) -> bool:
    axes = families.axes(tiny)
    try:
        unlike = [
            axis for axis in axes if axis.layer is not None and axis.layer % 2 == 0 and not axis.per_token
        ]  # experts go alike
        cut(tiny, axes, admission.random_mask(unlike, seed=0))
        config = _config(tiny, torch.float64, as_it_says=False)
        built = getattr(modeling_pruned, f"Pruned{stock_class(tiny)}")
        with admission.Wide():
            config = built.config_class.from_dict(json.loads(config.to_json_string()))
            config._experts_implementation = "eager"
            twin = built(config).double().eval()
            twin.load_state_dict(tiny.state_dict())
            ids = torch.tensor([[5, 9, 14, 7, 3, 20]])
            same = torch.allclose(twin(ids).logits, tiny(ids).logits, rtol=0, atol=1e-6)
            written = [twin.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    except Exception:  # stock code of any type may fail in any way
        return False
    return same and torch.equal(*written)


def _config(model: Any, dtype: torch.dtype, *, as_it_says: bool) -> Any:
    """The model's config with the class that builds it. Sizes are read from the weights, unless the weights are elsewhere."""
    config = copy.deepcopy(model.config)
    if not as_it_says:
        write_sizes(config, families.axes(model))
    stock = stock_class(model)
    config.dtype = dtype
    config.architectures = [stock]
    config.__dict__.pop("auto_map", None)
    prefix, files = _built_by(config)
    if files:
        file = modeling_sliced if families.is_sliced(config) else modeling_pruned
        built = getattr(file, f"{prefix}{stock}", None)
        if built is None:
            raise UsageError(f"{stock} has no class in {files[0]}.py, so layers that differ in size cannot be saved; add one")
        config.architectures = [built.__name__]
        config.auto_map = {
            "AutoConfig": f"{files[0]}.{built.config_class.__name__}",
            "AutoModel": f"{files[0]}.{getattr(built, 'base_class', built).__name__}",
        }
        if not hasattr(built, "base_class"):
            return config
        config.auto_map["AutoModelForCausalLM"] = f"{files[0]}.{built.__name__}"
        for task in ("SequenceClassification", "TokenClassification"):
            name = f"{built.base_class.__name__.removesuffix('Model')}For{task}"
            if hasattr(file, name):  # transformers lacks this class for some models
                config.auto_map[f"AutoModelFor{task}"] = f"{files[0]}.{name}"
    return config


def _built_by(config: Any) -> tuple[str, tuple[str, ...]]:
    """The prefix of the names of the classes that build the model, and the files with these classes; empty for a stock model."""
    if families.is_sliced(config):
        return "Sliced", ("modeling_sliced", "modeling_pruned")
    return ("Pruned", ("modeling_pruned",)) if needs_own_code(config) else ("", ())


def _save_weights(model: Any, folder: Path, dtype: torch.dtype, state: dict[str, torch.Tensor], *, as_named: bool) -> None:
    """Save the weights in `dtype`; `state` is changed in place.

    With `as_named` tensors have the names that they have in the model. transformers writes the names of a type's first files instead
    (`embed_out` of GPT-NeoX, experts one by one), and reads these for its own classes only.
    """
    if any(tensor.dtype != dtype for tensor in state.values() if tensor.is_floating_point()):
        cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = cast.setdefault(tensor.data_ptr(), tensor.to(dtype))
    save_unchecked(model, folder, state_dict=state, save_original_format=not as_named)


def save_unchecked(model: Any, folder: Path, **options: Any) -> None:
    """Save a model as its `save_pretrained(folder, **options)` does, with whatever its generation_config says.

    transformers refuses to save one that was changed and has settings for sampling, such as `temperature`, without `do_sample`.
    Many published models have those, and a cut changes the numbers of the tokens in it.
    """
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, **options)
    finally:
        if generation is not None:
            model.generation_config = generation
    write_generation_config(model, folder)


def write_generation_config(model: Any, folder: Path) -> None:
    """Write a model's generation_config.json to `folder`, with whatever it says; see `save_unchecked`."""
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
