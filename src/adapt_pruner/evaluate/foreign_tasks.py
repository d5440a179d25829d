"""Whether a folder of lm-eval YAML files would run code, judged by their text; and a sandbox for templates.

lm-eval imports the Python file that a tag `!function` names. It lets the evaluate library run a metric that it does not know
itself. It renders templates without a sandbox. A file may do all this through the files that it includes.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.core.files import check_regular
from adapt_pruner.errors import UsageError

__all__ = ["check_no_code", "sandbox"]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = "tag:yaml.org,2002:"  # prefix of YAML's own types; lm-eval also knows `!function`
_ALWAYS = {
    "class": "names a Python class",
    "custom_dataset": "names a Python function",
    "use_prompt": "takes its prompts from another library or file",
    "custom_generate": "names Python code that generates",
}
_IF_TRUE = {
    "hf_evaluate": "has the evaluate library run a metric's Python file",
    "trust_remote_code": "asks to run Python code",
    "unsafe_code": "asks to run what a model writes",
}
_BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # safe builders of the datasets library; another one reads pickles


@functools.cache
def sandbox() -> Any:
    """The environment of lm-eval's templates in jinja's sandbox, which refuses attributes that lead to Python itself."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    made = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline)
    made.filters["regex_replace"] = utils.env.filters["regex_replace"]
    return made


def check_no_code(folder: Path) -> None:
    """Refuse a folder of tasks that would run code. The files are read as YAML; no object of them is built.

    Args:
        folder: every YAML file in it is checked, with the files it includes, but not lm-eval's own files.

    Raises:
        UsageError: a file would run code (the message names file and line), or is no regular file.
    """
    import lm_eval

    theirs, waiting, seen = Path(lm_eval.__file__).resolve().parent, sorted(folder.glob("**/*.yaml")), set()
    while waiting:
        path = Path(os.path.realpath(waiting.pop()))
        if path in seen or path.is_relative_to(theirs):
            continue
        seen.add(path)
        check_regular(path)
        try:
            root = yaml.compose(path.read_bytes(), Loader=_LOADER)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue  # lm-eval cannot read it either, and reports it when the task is asked for
        for node, why in _found(root):
            if why == "":
                waiting.append(path.parent / node.value.replace("\0", ""))
                continue
            raise UsageError(
                f"task file {path}, line {node.start_mark.line + 1}, {why}, and foreign code runs only if you allow it; read "
                "it, and pass --trust-remote-code if you trust it"
            )


def _found(root: Any) -> Iterator[tuple[Any, str]]:
    """Nodes that would run code, and why; nodes that name a file to include come with an empty reason."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias may lead back to a node above it
            continue
        seen.add(id(node))
        if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python/"):
            yield node, f"has the tag {node.tag} ({node.value if isinstance(node.value, str) else '…'})"
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    yield from _of_key(key, value)


def _of_key(key: Any, value: Any) -> Iterator[tuple[Any, str]]:
    said = value.value if isinstance(value, yaml.ScalarNode) else None
    nothing = isinstance(value, yaml.ScalarNode) and value.tag == f"{_PLAIN}null"
    if key.value == "include":
        names = value.value if isinstance(value, yaml.SequenceNode) else [value]
        yield from ((name, "") for name in names if isinstance(name, yaml.ScalarNode))
    elif key.value in _ALWAYS and not nothing:
        yield key, f"{_ALWAYS[key.value]} ({key.value}: {said or '…'})"
    elif key.value in _IF_TRUE and not nothing and str(said).lower() not in ("false", "no", "off"):
        yield key, f"{_IF_TRUE[key.value]} ({key.value}: {said})"
    elif key.value == "metric" and said is not None and not _is_known_metric(said):
        yield value, f"names a metric that lm-eval does not have ({said}), which would be looked for as a Python file"
    elif key.value == "dataset_path" and said is not None and (said.endswith(".py") or _is_other_builder(said)):
        yield value, f"reads data in a way that may run code (dataset_path: {said}; {', '.join(_BUILDERS)} may not)"


def _is_known_metric(name: str) -> bool:
    import lm_eval.api.metrics  # noqa: F401 (which fills the list)
    from lm_eval.api.registry import metric_registry

    return name in metric_registry


def _is_other_builder(name: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES and name not in _BUILDERS
