"""YAML that holds keys: what YAML itself lets pass without a word, a key that is given twice, is refused."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from adapt_pruner.errors import UsageError

__all__ = ["read_keys"]


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands in a table twice."""


class _Strict(yaml.SafeLoader):
    """YAML's own loader takes the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Twice(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_keys(path: Path, name: str) -> dict[str, Any]:
    """The keys of a YAML file that goes by `name`.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: it cannot be read, is not YAML, gives a key twice, or holds no keys; with the line where one is to blame.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise UsageError(f"recipe {name!r} is a folder; name a YAML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {name!r} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"recipe {name!r} cannot be read: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        if isinstance(error, _Twice):
            raise UsageError(f"recipe {name!r}, line {line}: {error.problem}; leave one of them out") from error
        raise UsageError(
            f"recipe {name!r} is not YAML: line {line}, {error.problem}; mend the line, or quote the value"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name!r} is not YAML: {error}; write lines like `model: smollm2-135m-instruct`") from error
    if not isinstance(data, dict):
        raise UsageError(f"recipe {name!r} holds no keys; write lines like `model: smollm2-135m-instruct`")
    return data
