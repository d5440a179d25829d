"""Which key of a config.json keeps a model from being built, so that the weights are not blamed for it."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from adapt_pruner.checkpoint.untrusted import without_code
from adapt_pruner.errors import UsageError, first_line

__all__ = ["blaming_config", "no_count"]

_COUNT = re.compile(r"num_\w+|\w+_size|\w+_dim")
_LONGEST = 60  # characters of a value that a sentence repeats


@contextmanager
def blaming_config(folder: str, config: Any, name: str, *, build: Callable[[Any], Any]) -> Iterator[None]:
    """If this context fails and no model of the config can be built, name the key that prevents it.

    Args:
        folder: a folder or hub id with a config.json.
        config: the transformers config that was made of it.
        name: the model's name for messages.
        build: makes a model of such a config; after a failure it is called on the meta device, once for each key at most.

    Raises:
        UsageError: a model can be built without a key of the config, and not with it.
    """
    try:
        yield
    except Exception as error:  # transformers raises errors of many kinds
        from transformers import PreTrainedConfig

        raw, _ = PreTrainedConfig.get_config_dict(folder)
        if (wrong := _wrong_key(without_code(raw), config, build)) is not None:
            raise UsageError(
                f"model {name!r} cannot be built: {wrong} in its config.json ({first_line(error)}); correct that or get the right file"
            ) from error
        raise


def _wrong_key(raw: Mapping[str, Any], config: Any, build: Callable[[Any], Any]) -> str | None:
    """`KEY is VALUE` for the key without which a model can be built; None if one can be built, or no single key prevents it."""
    if _builds(build, lambda: config):
        return None
    if (wrong := no_count(raw)) is not None:
        return wrong
    for key, value in raw.items():
        others = {other: raw[other] for other in raw if other != key}
        if _builds(build, lambda others=others: type(config).from_dict(others)):  # type: ignore[misc]
            return _named(key, value)
    return None


def no_count(raw: Mapping[str, Any]) -> str | None:
    """`KEY is VALUE` for the first key of a config.json that counts something and is below 1; None if there is none."""
    counts = ((key, value) for key, value in raw.items() if _COUNT.fullmatch(str(key)) and isinstance(value, int))
    return next((_named(key, value) for key, value in counts if value < 1), None)


def _builds(build: Callable[[Any], Any], config: Callable[[], Any]) -> bool:
    try:
        with torch.device("meta"):
            build(config())
    except Exception:
        return False
    return True


def _named(key: str, value: Any) -> str:
    text = repr(value)
    return f"{key} is {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
