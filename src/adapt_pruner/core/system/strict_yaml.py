"""Read YAML keys strictly: a key given twice, which YAML itself accepts silently, is refused, and so are values without end."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.core.system.files import read_plain
from adapt_pruner.errors import UsageError, first_line

_MOST_BYTES = 2**20
_DEEPEST = 32  # nested tables and lists
_MOST_VALUES = 100_000  # each alias `*name` counts as all the values that it stands for
_LONGEST_NUMBER = 100  # characters


class _Refused(yaml.constructor.ConstructorError):
    """Good YAML that no recipe may contain."""


class _Strict(yaml.SafeLoader):
    """Refuses what YAML's own loader accepts: keys given twice, keys that are not words, and values that never end."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST + 1:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _Refused(None, None, f"tables and lists are nested more than {_DEEPEST} deep; use fewer levels", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _count(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Refused(None, None, f"{key.value} is given twice; leave one of them out", key.start_mark)
            seen.add(str(key.value))
        made = super().construct_mapping(node, deep)
        for key in made:
            if not isinstance(key, str):
                raise _Refused(None, None, f"the key {str(key)[:40]} is not a string; quote it", node.start_mark)
        return made

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        scalar = node.value if isinstance(node, yaml.ScalarNode) else ""
        if "\0" in scalar:
            raise _Refused(None, None, "a value contains the character NUL; remove it", node.start_mark)
        if len(scalar) > _LONGEST_NUMBER and node.tag.rpartition(":")[2] in ("int", "float"):
            raise _Refused(
                None,
                None,
                f"a number has {len(scalar):,} characters; at most {_LONGEST_NUMBER} are allowed; shorten it",
                node.start_mark,
            )
        try:
            made = super().construct_object(node, deep)
            return _whole(made) if isinstance(made, str) else made
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _Refused(None, None, f"{scalar[:40]!r} is not a valid {kind}; quote it", node.start_mark) from error


def _whole(text: str) -> str:
    """The text with pairs of half characters joined: JSON writes characters beyond U+FFFF as two escapes, YAML reads each by itself."""
    return (
        text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if re.search("[\ud800-\udbff]", text) else text
    )


_Strict.yaml_implicit_resolvers = {  # a date is a word, and so is 2:4, to YAML the number 124: no key of a recipe takes such
    first: [
        (tag, re.compile(f"(?!.*:){form.pattern}", form.flags) if tag.endswith((":int", ":float")) else form)
        for tag, form in forms
        if not tag.endswith(":timestamp")
    ]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values below a node; an alias counts all its values each time. 0 marks a node that is being counted."""
    if counts.get(id(node)) == 0:
        raise _Refused(None, None, "a value contains itself; remove its alias", node.start_mark)
    if id(node) not in counts:
        counts[id(node)] = 0
        inner = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in inner)
    if counts[id(node)] > _MOST_VALUES:
        raise _Refused(
            None, None, f"aliases expand to more than {_MOST_VALUES:,} values; write out what is needed", node.start_mark
        )
    return counts[id(node)]


def value_of(text: str, name: str) -> Any:
    """The data in YAML text; `name` begins the error message.

    Raises:
        UsageError: it is not YAML, gives a key twice, has a key that is not a word, or expands without end.
    """
    try:
        return yaml.load(text, Loader=_Strict)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        if isinstance(error, _Refused):
            raise UsageError(f"{name}, line {line}: {error.problem}") from error
        raise UsageError(f"{name} is not YAML: line {line}, {error.problem}; correct the line, or quote the value") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {first_line(error)}; write lines like `model: smollm2-135m-instruct`") from error
    except RecursionError as error:  # the parser itself has no limit on nesting
        raise UsageError(f"{name}: tables and lists are nested more than {_DEEPEST} deep; use fewer levels") from error


def read_keys(path: Path, name: str) -> dict[str, Any]:
    """The keys of a YAML file; `name` begins the error message.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: it cannot be read, is not YAML, gives a key twice, or holds no keys. The message names the line if one is at
            fault.
    """
    try:
        text = read_plain(path, most=_MOST_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(error)) from error
    except IsADirectoryError as error:
        raise UsageError(f"recipe {name!r} is a folder; name a YAML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {name!r} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"recipe {name!r} cannot be read: {error.strerror or error}; name a YAML file") from error
    data = value_of(text, f"recipe {name!r}")
    if not isinstance(data, dict):
        raise UsageError(f"recipe {name!r} contains no keys; write lines like `model: smollm2-135m-instruct`")
    return data
