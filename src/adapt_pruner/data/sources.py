"""Where text comes from: a SPEC, as written on the command line, to a list of documents.

notes.txt                     one document
books/  'corpus/*/*.jsonl.gz' every .txt, .md, .jsonl[.gz|.zst] and .parquet below a folder or under a glob
data.jsonl.gz  data.parquet   one document a row, its field `text`
hub:NAME[:config][:split][:field]   a data set by its name, through the datasets library (split `train`, field `text`)
python-docs[:train|:heldout]  Python's own language reference, which comes with Python
self                          text the model writes itself (see data.selfwritten; needs the model)
"""

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from adapt_pruner.errors import UsageError

__all__ = ["SELF", "documents"]

SELF = "self"
_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_FIELD = "text"
_MAX_HUB_DOCUMENTS = 200_000


def documents(spec: str) -> list[str]:
    """The documents that `spec` names, in a fixed order; empty ones are left out.

    Args:
        spec: as described at the top of this file, `self` excepted.

    Raises:
        UsageError: nothing is there, it holds no text, or it is not what its name says; with the remedy.
    """
    if spec.partition(":")[0] == "python-docs":
        found = _python_docs(spec.partition(":")[2] or "all")
    elif spec.startswith("hub:"):
        found = _hub(spec)
    else:
        found = [text for path in _paths(spec) for text in _read(path, _FIELD)]
    found = [text for text in found if text.strip()]
    if not found:
        raise UsageError(f"text {spec!r} is empty; name a file or folder that holds text")
    return found


def _paths(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    matches = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    found = sorted(match for match in matches if match.is_file() and match.name.endswith(_SUFFIXES))
    if not found:
        what = "holds no text file" if path.is_dir() else "does not exist"
        raise UsageError(
            f"text {spec!r} {what}; give a file ({', '.join(_SUFFIXES)}), a folder or a glob of them, hub:NAME, python-docs or self"
        )
    return found


def _read(path: Path, field: str) -> list[str]:
    name = path.name
    try:
        if name.endswith(".parquet"):
            return _parquet(path, field)
        if name.endswith((".jsonl", ".json", ".jsonl.gz", ".jsonl.zst")):
            with _open(path) as lines:
                return list(_rows(lines, path, field))
        return [path.read_bytes().decode("utf-8")]  # as it is: read_text would change line ends
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"convert it first, for example: iconv -f latin1 -t utf-8 {name}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise UsageError(f"{path} needs the zstandard package; pip install 'adapt-pruner[zstd]'") from error
        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True), encoding="utf-8")
    return path.open(encoding="utf-8")


def _rows(lines: IO[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}, line {number}, is not JSON ({error.msg}); a .jsonl file holds one JSON object a line"
            ) from error
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UsageError(
                f'{path}, line {number}, has no text in a field {field!r}; each line is an object like {{"{field}": "…"}}'
            )
        yield text


def _parquet(path: Path, field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=[field])
    except (pyarrow.ArrowException, ValueError) as error:
        raise UsageError(f"{path} is not a parquet file with a column {field!r}: {error}") from error
    if field not in table.column_names:
        raise UsageError(f"{path} has no column {field!r}; rename the column that holds the text")
    return [str(text) for text in table.column(field).to_pylist() if text is not None]


def _hub(spec: str) -> list[str]:
    name, *rest = spec.split(":")[1:]
    config, split, field = (rest + ["", "", ""])[:3]
    split, field = split or "train", field or _FIELD
    import datasets

    try:
        stream: Any = datasets.load_dataset(name, config or None, split=split, streaming=True)
        found = []
        for row in stream:
            if not isinstance(row.get(field), str):
                raise UsageError(f"{spec!r} has no text in a field {field!r}; its fields: {', '.join(row)}")
            found.append(row[field])
            if len(found) == _MAX_HUB_DOCUMENTS:
                break
        return found
    except UsageError:
        raise
    except Exception as error:  # the datasets library raises errors of many libraries for one cause: it is not to be had
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"data set {spec!r} could not be had ({cause}); check the name and the network, or give a local file"
        ) from error


def _python_docs(part: str) -> list[str]:
    """Python's language reference by topic; a tenth of it is held out and shares no paragraph with the rest."""
    if part not in ("all", "train", "heldout"):
        raise UsageError(f"python-docs has no part {part!r}; known: train, heldout")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python was installed without pydoc_data, so python-docs is not to be had; give a text file"
        ) from error
    if part == "all":
        return [text for _, text in sorted(topics.items())]
    held_out = {name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}
    if part == "heldout":
        return [topics[name] for name in sorted(held_out)]
    # Topics quote each other: what the held-out ones say is taken out of the rest, paragraph by paragraph.
    said = {_squeezed(paragraph) for name in held_out for paragraph in topics[name].split("\n\n")}
    kept = []
    for name in sorted(set(topics) - held_out):
        kept.append("\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if _squeezed(paragraph) not in said))
    return kept


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())
