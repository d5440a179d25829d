"""llama.cpp's own library, used through llama-cpp-python to quantise a GGUF file and to run one."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError, first_line, nearest

_ERROR = 4  # ggml's log level
_errors: list[str] = []


def library() -> tuple[Any, list[str]]:
    """The module `llama_cpp`, silenced, and a list that from now on collects the errors of its library.

    Raises:
        UsageError: it is not installed, or does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # OSError and RuntimeError if its shared library does not load
        missing = isinstance(error, ImportError) and error.name == "llama_cpp"
        why = "is not installed" if missing else f"does not load ({first_line(error)})"
        raise UsageError(
            f"llama.cpp's library {why}; {to_install('verify')}, which builds it (minutes, with a C++ compiler)"
        ) from error
    _errors.clear()
    llama_cpp.llama_log_set(_callback(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp, _errors


@functools.cache
def _callback(module: Any) -> Any:
    """The function that the library calls with every line it logs; kept until the process ends, as it may be called any time."""

    def hear(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _errors.append(text.decode("utf-8", "replace").strip())

    return module.llama_log_callback(hear)


@contextmanager
def plain_kernels(module: Any) -> Iterator[None]:
    """Within this context, opened models keep the blocks of the file: nothing is repacked, so no kernels for repacked blocks run.

    On CPUs with AMX llama.cpp repacks matrices of q8_0 and other types, and its kernels for them are wrong for narrow matrices. A
    model 64 wide is off by 0.69 standard deviations of its logits on average, and by 0.02 with the plain kernels
    (llama-cpp-python 0.3.36, Xeon with AMX; see also https://github.com/ggml-org/llama.cpp/pull/16315). We want to judge the
    file, not those kernels. `Llama` has no argument for it, so its default parameters are changed.
    """
    inner = module.llama_cpp
    defaults = inner.llama_model_default_params

    def params() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False  # has no effect in older versions of llama-cpp-python, which lack the setting
        return settings

    inner.llama_model_default_params = params
    try:
        yield
    finally:
        inner.llama_model_default_params = defaults


def file_types(module: Any) -> dict[str, int]:
    """The name of each quantised file type -> its number in `general.file_type`; `f32` is included."""
    mostly = "LLAMA_FTYPE_MOSTLY_"
    types = {name.removeprefix(mostly).lower(): getattr(module, name) for name in dir(module) if name.startswith(mostly)}
    return types | {"f32": module.LLAMA_FTYPE_ALL_F32}


def quantise(source: Path, target: Path, quant: str) -> None:
    """Write the GGUF file `source` to `target` with its matrices quantised.

    Raises:
        UsageError: this llama.cpp has no such type.
        RunError: llama.cpp failed.
    """
    module, errors = library()
    kinds = file_types(module)
    if quant not in kinds:
        raise UsageError(f"this llama.cpp does not know the quantisation {quant!r}; {nearest(quant, kinds)}")
    params = module.llama_model_quantize_default_params()
    params.ftype = kinds[quant]
    params.max_buf_size = 2**28  # bytes of rows at once; 8 GiB by default; has no effect in older versions of llama-cpp-python
    if module.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RunError(f"llama.cpp could not quantise the model to {quant}: {'; '.join(errors[-2:]) or 'it does not say why'}")
