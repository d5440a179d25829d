"""llama.cpp's own library, through llama-cpp-python: quantising a GGUF file, and running one."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.errors import RunError, UsageError, first_line, nearest

__all__ = ["file_types", "library", "plain_kernels", "quantise"]

_ERROR = 4  # ggml's log level
_said: list[str] = []


def library() -> tuple[Any, list[str]]:
    """The module `llama_cpp`, silenced, and the errors its library reports, which are collected from now on.

    Raises:
        UsageError: it is not installed, or does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the last two where its shared library does not load
        missing = isinstance(error, ImportError) and error.name == "llama_cpp"
        why = "is not installed" if missing else f"does not load ({first_line(error)})"
        raise UsageError(
            f"llama.cpp's library {why}; pip install 'adapt-pruner[verify]' builds it (minutes, with a C++ compiler)"
        ) from error
    _said.clear()
    llama_cpp.llama_log_set(_callback(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp, _said


@functools.cache
def _callback(module: Any) -> Any:
    """What the library calls with every line it logs; kept for as long as the process lives, as it may call at any time."""

    def hear(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _said.append(text.decode("utf-8", "replace").strip())

    return module.llama_log_callback(hear)


@contextmanager
def plain_kernels(module: Any) -> Iterator[None]:
    """Models that are opened meanwhile keep the file's own blocks: no repacking, and so none of the kernels for repacked ones.

    On CPUs with AMX llama.cpp repacks matrices of q8_0 and others, and its kernels for them are wrong for narrow ones (a model
    64 wide is off by 0.69 standard deviations of its logits on average, and by 0.02 with the plain kernels; llama-cpp-python 0.3.36,
    Xeon with AMX; see also https://github.com/ggml-org/llama.cpp/pull/16315). A file is to be judged, not those. `Llama` has
    no argument for it, so the defaults it starts from are changed.
    """
    inner = module.llama_cpp
    given = inner.llama_model_default_params

    def params() -> Any:
        settings = given()
        settings.use_extra_bufts = False  # llama-cpp-python before llama.cpp had it: an attribute of no effect
        return settings

    inner.llama_model_default_params = params
    try:
        yield
    finally:
        inner.llama_model_default_params = given


def file_types(module: Any) -> dict[str, int]:
    """What files of quantised matrices are called -> their number in `general.file_type`; `f32` among them."""
    mostly = "LLAMA_FTYPE_MOSTLY_"
    types = {name.removeprefix(mostly).lower(): getattr(module, name) for name in dir(module) if name.startswith(mostly)}
    return types | {"f32": module.LLAMA_FTYPE_ALL_F32}


def quantise(source: Path, target: Path, quant: str) -> None:
    """Write the GGUF file `source` to `target` with its matrices quantised.

    Raises:
        UsageError: this llama.cpp has no such type.
        RunError: it failed.
    """
    module, said = library()
    kinds = file_types(module)
    if quant not in kinds:
        raise UsageError(f"this llama.cpp does not know the quantisation {quant!r}; {nearest(quant, kinds)}")
    params = module.llama_model_quantize_default_params()
    params.ftype = kinds[quant]
    if module.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RunError(f"llama.cpp could not quantise the model to {quant}: {'; '.join(said[-2:]) or 'it does not say why'}")
