"""The config of a model: read from a folder of unknown origin, the class that it names, and the key that keeps it from being built."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.compatible_names import stock_name, stock_type
from adapt_pruner.checkpoint.save import needs_own_code
from adapt_pruner.checkpoint.untrusted import code_in, without_code
from adapt_pruner.core.model import modeling_pruned, modeling_sliced
from adapt_pruner.core.model.task import LOADED_BY
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError, UsageError, first_line, is_out_of_memory, option

_COUNT = re.compile(r"num_\w+|\w+_size|\w+_dim")
_LONGEST = 60  # characters of a value that a sentence repeats


def read_config(folder: str, options: dict[str, Any], name: str, *, any_family: bool = False) -> Any:
    """The transformers config of a model; `options` are those of its loading, of which trust is taken back, in place, if no code is needed.

    Raises:
        UsageError: it is no causal LM of a known family, or its config cannot be read.
        RunError: the GGUF file is damaged.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw: dict[str, Any] = {}
    try:
        if "gguf_file" not in options:
            if (path := Path(folder, filenames.CONFIG)).is_file() and not isinstance(read_json(path), dict):
                raise UsageError(f"model {name!r} cannot be loaded: its config.json holds no JSON object; get the folder again")
            raw, _ = PreTrainedConfig.get_config_dict(folder)
            types = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *families.model_types()}
            if "model_type" in raw and stock_type(raw) in types:
                raw["model_type"] = stock_type(raw)
            _check_type(raw, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name, any_family=any_family)
            plain = without_code(raw)
            if quantised := _quantised(raw):
                kind = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
                raise UsageError(
                    f"{name} is quantised{kind and f' ({kind})'}, and only unquantised weights can be loaded; name the model it "
                    "was made from"
                )
            if (stock := families.stock_config(plain)) is not None:  # stock code computes what the checkpoint's own code does
                options["trust_remote_code"] = False
                return stock
            ours = any(
                inner.get(key)
                for inner in (raw, *(raw.get(f"{tower}_config") or {} for tower in ("text", "vision")))
                for key in ("per_layer_config", "output_bias", "block_sums", "keeps_head_dim", "sliced_hidden_size")
            )
            if ours and raw.get("model_type") in types:  # its auto_map is for tools without this library
                options["trust_remote_code"] = False
                return AutoConfig.for_model(**plain)
        config = AutoConfig.from_pretrained(folder, **options)
        if "gguf_file" not in options and not options["trust_remote_code"] and code_in(raw):
            config = type(config).from_dict({**plain, "model_type": config.model_type}, name_or_path=folder)
        if not options["trust_remote_code"]:
            config.__dict__.pop("auto_map", None)  # otherwise our results would pass it on to people who trust us
    except (UsageError, RunError, KeyboardInterrupt):
        raise
    except Exception as error:  # transformers and huggingface_hub raise errors of many kinds
        pass_on_memory(error)
        why = first_line(error)
        if "trust_remote_code" in str(error):
            why = f"it needs to run its own Python code; pass {option('trust_remote_code', True)} if you trust it"
        elif not Path(folder).exists():
            why = (
                f"it is not on this machine and could not be fetched from the hub ({why}); check the name, the network, or give a "
                "local folder"
            )
        if (wrong := _no_count(raw)) is not None:
            why = f"{wrong} in its config.json; get the right file"
        if "gguf_file" in options and not _is_whole(Path(folder) / options["gguf_file"]):
            raise RunError(f"{name} is damaged or cut off ({why}); get the file again") from error
        raise UsageError(f"model {name!r} cannot be loaded: {why}") from error
    _check_type(config.to_dict(), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name, any_family=any_family)
    if not (any_family or families.is_known(config)):
        raise UsageError(f"{name} cannot be pruned: {families.why_unknown(config)}")
    return config


def _quantised(raw: Any) -> Any:
    """The quantization_config of a config or of an inner config; None if its weights are not quantised."""
    if not isinstance(raw, dict):
        return None
    return raw.get("quantization_config") or next(filter(None, map(_quantised, raw.values())), None)


def _check_type(raw: dict[str, Any], causal: Any, name: str, *, any_family: bool) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise UsageError(f"{name} is not a model: its config.json names no model_type")
    types = families.model_types()
    if model_type in types:
        return
    named = raw.get("architectures") or []
    if model_type in causal:
        stock = [stock_name(str(architecture)) for architecture in named]
        is_causal = not named or causal[model_type] in stock  # else an encoder, or a decoder saved without its head
    else:
        is_causal = "AutoModelForCausalLM" in (raw.get("auto_map") or {})
    if raw.get("is_encoder_decoder") or not is_causal:
        raise UsageError(
            f"{name} is of type {model_type!r}, which is not a causal language model; known families: {', '.join(types)}"
        )
    if any_family or model_type in causal:
        return
    raise UsageError(
        f"{name} is of type {model_type!r}, which belongs to no known family; known: {', '.join(types)} "
        "(a new family is one file: see docs/extending.md)"
    )


def model_class(config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that builds a model of `config`, and the `options` that it takes."""
    import transformers

    kind: Any = getattr(transformers, LOADED_BY[families.task_of(config)][0])
    if not needs_own_code(config):
        return kind, options
    stock = kind._model_mapping[type(config)].__name__
    if families.is_sliced(config):
        return getattr(modeling_sliced, f"Sliced{stock}"), {}
    return getattr(modeling_pruned, f"Pruned{stock}"), {}


def random_model(config: Any, options: dict[str, Any], **more: Any) -> Any:
    """A model with weights as its class initialises them; `more` options are those of transformers' `from_config`."""
    kind, options = model_class(config, options)
    if needs_own_code(config):
        return kind(config)
    return kind.from_config(config, trust_remote_code=options["trust_remote_code"], **more)


@contextmanager
def blaming(folder: str, config: Any, options: dict[str, Any], name: str) -> Iterator[None]:
    """If this context fails and no model of the config can be built, name the key that prevents it.

    Args:
        folder: a folder or hub id with a config.json, or the folder of a GGUF file, which has none to blame.
        config: the transformers config that was made of it.
        options: those of its loading.
        name: the model's name for messages.

    Raises:
        UsageError: a model can be built without a key of the config, and not with it.
    """
    try:
        yield
    except Exception as error:  # transformers raises errors of many kinds
        from transformers import PreTrainedConfig

        raw = {} if "gguf_file" in options else PreTrainedConfig.get_config_dict(folder)[0]
        if raw and (wrong := _wrong_key(without_code(raw), config, options)) is not None:
            raise UsageError(
                f"model {name!r} cannot be built: {wrong} in its config.json ({first_line(error)}); correct that or get the right file"
            ) from error
        raise


def _wrong_key(raw: Mapping[str, Any], config: Any, options: dict[str, Any]) -> str | None:
    """`KEY is VALUE` for the key without which a model can be built; None if one can be built, or no single key prevents it."""

    def builds(made: Callable[[], Any]) -> bool:
        try:
            with torch.device("meta"):
                random_model(made(), options)
        except Exception:
            return False
        return True

    if builds(lambda: config):
        return None
    if (wrong := _no_count(raw)) is not None:
        return wrong
    for key, value in raw.items():
        others = {other: raw[other] for other in raw if other != key}
        if builds(partial(type(config).from_dict, others)):
            return _named(key, value)
    return None


def _no_count(raw: Mapping[str, Any]) -> str | None:
    """`KEY is VALUE` for the first key of a config.json that counts something and is below 1; None if there is none."""
    counts = ((key, value) for key, value in raw.items() if _COUNT.fullmatch(str(key)) and isinstance(value, int))
    return next((_named(key, value) for key, value in counts if value < 1), None)


def _named(key: str, value: Any) -> str:
    text = repr(value)
    return f"{key} is {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"


def _is_whole(path: Path) -> bool:
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception:  # the kind of error depends on where the file ends
        return False
    return True


def pass_on_memory(error: Exception) -> None:
    """Raise MemoryError if an error means that memory was too small, so that the files are not blamed.

    Raises:
        MemoryError: memory was too small.
    """
    if is_out_of_memory(error):
        raise MemoryError(first_line(error)) from error
