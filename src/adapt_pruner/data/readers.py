"""Read text files, rows of files and data sets: they become (name, text or messages), one after another."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import expanded, is_card, read_plain
from adapt_pruner.core.system.strict_json import of_json
from adapt_pruner.errors import UsageError, first_line

Row = tuple[str, str | list[Mapping[str, Any]]]
_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".parquet")
_WHOLE = (".txt", ".md")  # of which a file is one document
_ASKED_FOR = (".json.gz", ".json.zst")  # by their names or a glob; in a folder they are often metadata, as .json is
_JSON = (".json", *_ASKED_FOR, *(suffix for suffix in _SUFFIXES if "json" in suffix))
_TABLES = (".csv", ".tsv")
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}  # how a file of each begins
_LONGEST_LINE = 2**26  # characters
_MOST_OF_ONE_TEXT = 2**32  # the most bytes of a file that is one document
_UNPACKED, _UNFOLDS = 2**28, 100  # characters that any packed file may hold; a larger one may hold this many times its size
_ROWS = 1024  # the most rows of a parquet file that are read at one time
_TEXT, _CHAT = "text", "messages"
_SHARED, _TASK, _GIVEN, _REPLY = "conversations", "instruction", "input", "output"  # of ShareGPT files, and of Alpaca files
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
}  # fmt: skip
_FORMS = (
    f'{{"{_TEXT}": "…"}} or {{"{_CHAT}": [{{"role": "user", "content": "…"}}, …]}}, or as in files of ShareGPT ("{_SHARED}": "from", '
    f'"value") or Alpaca ("{_TASK}", "{_GIVEN}", "{_REPLY}")'
)


def local(spec: str) -> Iterator[Row]:
    """The rows of a file, of all files in a folder or under a glob, or of a folder of `datasets.save_to_disk`."""
    folder = expanded(spec)
    if _is_saved(folder):
        yield from _saved(folder)
    else:
        for path in _paths(spec):
            yield from _file(path)


def stamp(spec: str) -> Hashable:
    """What changes when a file of a local text does."""
    paths = sorted(expanded(spec).rglob("*")) if _is_saved(expanded(spec)) else _paths(spec)
    return tuple(
        (str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]
    )


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def hub(spec: str) -> Iterator[Row]:
    """The rows of `hub:NAME[:config][:split][:field]`, streamed."""
    _, _, split, field = _hub_parts(spec)
    try:
        for number, row in enumerate(_hub_builder(spec).as_streaming_dataset(split=split), start=1):
            content = _content(row, field)
            if content is None and _is_null(row, field):
                continue
            if content is None:
                raise UsageError(
                    f"{spec!r} has no text in a field {field!r}; its fields: {', '.join(row)}; name one of them: hub:NAME:CONFIG:SPLIT:FIELD"
                )
            yield f"{spec} row {number}", content
    except UsageError:
        raise
    except Exception as error:  # the datasets library raises errors of many libraries when a data set cannot be had
        raise _not_to_be_had(spec, error) from error


def hub_table(spec: str) -> tuple[Any, str]:
    """The rows of `hub:NAME[:config][:split][:field]` as a table that opens each row when it is asked for, and the field."""
    import datasets

    name, config, split, field = _hub_parts(spec)
    try:
        return datasets.load_dataset(name, config or None, split=split), field
    except Exception as error:  # as in `hub`
        raise _not_to_be_had(spec, error) from error


def hub_revision(spec: str) -> str:
    """A string that changes when the data set does: a hash over its files as the hub lists them."""
    return str(_hub_builder(spec).hash)


def _hub_parts(spec: str) -> tuple[str, str, str, str]:
    name, config, split, field = (spec.split(":")[1:] + ["", "", ""])[:4]
    if not name:
        raise UsageError(f"text {spec!r} names no data set; write it like hub:NAME or hub:NAME:CONFIG:SPLIT")
    return name, config, split or "train", field or _TEXT


def _hub_builder(spec: str) -> Any:
    import datasets

    name, config, _, _ = _hub_parts(spec)
    try:
        return datasets.load_dataset_builder(name, config or None)
    except Exception as error:  # as in `hub`
        raise _not_to_be_had(spec, error) from error


def _not_to_be_had(spec: str, error: Exception) -> UsageError:
    cause = first_line(error)
    return UsageError(f"data set {spec!r} could not be loaded ({cause}); check the name and the network, or give a local file")


def _content(row: Any, field: str = _TEXT) -> str | list[Mapping[str, Any]] | None:
    """The text of a row, or its messages if `field` (or, by default, `messages`) holds a conversation; None if it has neither."""
    if not isinstance(row, Mapping):
        return None
    content = row.get(field)
    if content is None and field == _TEXT:
        content = row.get(_CHAT)
        content = _translated(row) if content is None else content
    if isinstance(content, str):
        return _utf8(content)
    if not isinstance(content, list) or not all(isinstance(message, Mapping) for message in content):
        return None
    if not all(isinstance(message.get(key), str) for message in content for key in ("role", "content")):
        return None
    return [
        {key: _utf8(value) if isinstance(value, str) else value for key, value in message.items() if value is not None}
        for message in content
    ] or None


def _translated(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a row of a ShareGPT or an Alpaca file; None if it is neither."""
    turns, task = row.get(_SHARED), row.get(_TASK)
    if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns):
        return [
            {"role": _SPEAKERS.get(turn.get("from")), "content": turn.get("value")} if "from" in turn else dict(turn)
            for turn in turns
        ]
    if isinstance(task, str) and isinstance(row.get(_REPLY), str):
        given = row.get(_GIVEN)
        prompt = f"{task}\n\n{given}" if isinstance(given, str) and given.strip() else task
        system = row.get("system")
        before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        return [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": row[_REPLY]}]
    return None


def _is_null(row: Mapping[str, Any], field: str = _TEXT) -> bool:
    """Whether a row has the field, or by default `messages` in its place, and null or [] in it; such a row is left out."""
    fields = {field, _CHAT, _SHARED} if field == _TEXT else {field}
    return bool(fields & row.keys()) and all(row.get(name) in (None, []) for name in fields)


def _lack(row: Any) -> str:
    """Words for what keeps a row from being a text or a conversation."""
    chat = row if isinstance(row, Mapping) and row.get(_TEXT) is None else {}
    if empty := next((field for field in (_CHAT, _SHARED) if chat.get(field) == []), None):
        return f"no messages in its field {empty!r}"
    if chat.get(_CHAT) is None and isinstance(turns := chat.get(_SHARED), list):
        unknown = (turn.get("from") for turn in turns if isinstance(turn, Mapping) and turn.get("from") not in _SPEAKERS)
        return f"turns in its field {_SHARED!r} that are not from {', '.join(_SPEAKERS)}" + "".join(
            f": {name!r}" for name in [*unknown][:1]
        )
    messages = chat.get(_CHAT)
    for number, message in enumerate(messages if isinstance(messages, list) else [], start=1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                return f"no text in {key!r} of message {number}"
    return f"no text in a field {_TEXT!r}"


def _utf8(text: str) -> str:
    """The text with U+FFFD for what UTF-8 cannot encode: half a surrogate pair, which JSON from the web sometimes has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _saved(folder: Path) -> Iterator[Row]:
    import datasets

    try:
        dataset: Any = datasets.load_from_disk(folder)
    except Exception as error:  # as in `hub`
        raise UsageError(f"{folder} is not a folder that datasets.save_to_disk wrote: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UsageError(f"{folder} has no split 'train'; name one by its folder, for example {folder / min(dataset)}")
        dataset = dataset["train"]
    for number, row in enumerate(dataset, start=1):
        content = _content(row)
        if content is None and _is_null(row):
            continue
        if content is None:
            raise UsageError(f"{folder}, row {number}, has no text; a row is like {_FORMS}; its fields: {', '.join(row)}")
        yield f"{folder} row {number}", content


def _paths(spec: str) -> list[Path]:
    path = expanded(spec)
    if path.is_file():
        return [path]
    matches = _below(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    suffixes = _SUFFIXES if path.is_dir() else (*_SUFFIXES, *_ASKED_FOR)
    paths = sorted(match for match in matches if match.is_file() and _ends(match, *suffixes))
    if not paths:
        what = "does not exist"
        if path.exists():
            what = "contains no text file" if path.is_dir() else "is a pipe or a device"
        raise UsageError(
            f"text {spec!r} {what}; give a file ({', '.join(_SUFFIXES)}), a folder or a glob of them, hub:NAME, python-docs or self"
        )
    return paths


def _below(folder: Path) -> Iterator[Path]:
    """Files in a folder and below it, but for hidden ones and for those in folders that adapt-pruner wrote or links lead to."""
    for where, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".") and not _is_ours(Path(where, name))]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a run, a comparison, a model or an export of ours, whose logs and cards are no text of the user."""
    return any((folder / name).exists() for name in (filenames.MARK, filenames.PRUNING)) or is_card(folder / filenames.CARD)


def _file(path: Path) -> Iterator[Row]:
    if _ends(path, *_TABLES):
        raise UsageError(f"{path} is a table; convert it to a .jsonl or .parquet file with a column {_TEXT!r}")
    try:
        if _ends(path, ".parquet"):
            yield from _parquet(path)
        elif _ends(path, *_JSON):
            with _open(path) as lines:
                yield from _lines(lines, path)
        else:
            text = read_plain(path, most=_MOST_OF_ONE_TEXT).decode("utf-8")  # read_text would change line ends
            yield str(path), text.removeprefix("\ufeff")  # the byte order mark that some editors write
    except UnicodeDecodeError as error:
        if packed := next((how for magic, how in _PACKED.items() if error.object.startswith(magic)), ""):
            raise UsageError(f"{path} is packed by {packed}; unpack it, or name another file") from error
        wide = error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")  # a byte order mark of UTF-16
        if not wide and b"\0" in error.object:
            raise UsageError(f"{path} is no text (it contains NUL bytes); name another file") from error
        where = f"byte {error.start} is " if _ends(path, *_WHOLE) else "it has the byte "  # lines are decoded a piece at a time
        raise UsageError(
            f"{path} is not UTF-8 text ({where}0x{error.object[error.start]:02x}); "
            f"convert it first, for example: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8 {path.name}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}; get the file again, or name another one") from error


def _ends(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends so, in small or in capital letters."""
    return path.name.lower().endswith(suffixes)


def _open(path: Path) -> IO[str]:
    encoding = "utf-8-sig"  # UTF-8, with the byte order mark that some editors write or without
    if _ends(path, ".gz"):
        return gzip.open(path, "rt", encoding=encoding)
    if _ends(path, ".zst"):
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding=encoding)
    return path.open(encoding=encoding)


def _bounded(lines: IO[str], path: Path) -> Iterator[str]:
    """The lines of a file, with limits, because a damaged or hostile file may have lines without end."""
    packed = path.stat().st_size if _ends(path, ".gz", ".zst") else None
    number = read = 0
    while line := lines.readline(_LONGEST_LINE + 1):
        number, read = number + 1, read + len(line)
        if len(line) > _LONGEST_LINE:
            raise UsageError(
                f"{path}, line {number}, has more than {_LONGEST_LINE:,} characters, which is the limit; divide its text"
            )
        if packed is not None:
            _check_unfolded(path, packed, read, remedy="unpack it")
        yield line


def _check_unfolded(path: Path, packed: int, read: int, *, remedy: str) -> None:
    """Refuse a file of `packed` bytes whose unpacked content is larger than allowed for its size."""
    if read > max(_UNPACKED, _UNFOLDS * packed):
        raise UsageError(
            f"{path} of {packed:,} bytes unpacks to more than {read:,}, which is more than {_UNFOLDS} times its size; "
            f"{remedy} if you trust it, and name the unpacked file"
        )


def _lines(lines: IO[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(_bounded(lines, path), start=1):
        if not line.strip():
            continue
        try:
            row = of_json(line)
            content = _content(row)
        except ValueError as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise UsageError(f"{path}, line {number}, is not JSON ({why}); a .jsonl file has one JSON object per line") from error
        if content is None:
            raise UsageError(f"{path}, line {number}, has {_lack(row)}; each line is an object like {_FORMS}")
        yield f"{path} line {number}", content


def _chunk_sizes(metadata: Any, column: str) -> list[int]:
    """Decompressed bytes of a column in each row group of a parquet file; repeated values count once."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return [
        sum(
            chunk.total_uncompressed_size
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema.split(".")[0] == column
        )
        for group in groups
    ]


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        column = next((name for name in (_TEXT, _CHAT, _SHARED, _TASK) if name in names), None)
        if column is None:
            raise UsageError(f"{path} has no column {_TEXT!r} or {_CHAT!r}; rename the column that contains the text")
        columns = [column] if column != _TASK else [name for name in (_TASK, _GIVEN, _REPLY, "system") if name in names]
        packed, remedy = path.stat().st_size, "write its rows to a .jsonl file"
        chunks = [sum(sizes) for sizes in zip(*(_chunk_sizes(file.metadata, name) for name in columns), strict=True)]
        _check_unfolded(path, packed, sum(chunks), remedy=remedy)
        # A row may be as long as a chunk, and all rows of a batch may be equal, though the file holds the value only once.
        rows = max(1, min(_ROWS, _UNPACKED // max([*chunks, 1])))
        number = read = 0
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            read += batch.nbytes
            _check_unfolded(path, packed, read, remedy=remedy)
            for row in batch.to_pylist():
                number += 1
                content = _content(row)
                if content is None and row[column] not in (None, []):
                    raise UsageError(f"{path}, row {number}, has no text in column {column!r}; a row is like {_FORMS}")
                if content is not None:
                    yield f"{path} row {number}", content
    except (pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a parquet file with a column {_TEXT!r}: {error}") from error
