"""Where pictures with captions come from: a SPEC, as typed on the command line, becomes pairs of a picture and a caption.

shapes/                             a folder with pictures and `metadata.jsonl`, a line a pair: `file_name`, `text`, and perhaps `label`
                                    (the layout `imagefolder` of the datasets library)
captions_val2017.json               captions as COCO has them; the pictures lie beside the file, or in ../val2017
saved/                              a folder written by `datasets.save_to_disk`, with columns `image`, `text` and perhaps `label`
hub:NAME[:config][:split][:field]   a data set by its name, with such columns; `field` instead of `text`

SPEC#train  SPEC#heldout            for any of these: the part to train on, or the held-out part, one picture in 20
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.data.readers import hub_table
from adapt_pruner.errors import UsageError, first_line

METADATA = "metadata.jsonl"
_HELD_OUT = 20  # one picture in this many is held out
_ROW = '{"file_name": "0001.png", "text": "a red circle"}'


@dataclass(frozen=True)
class Pair:
    """A picture and one of its captions.

    Attributes:
        name: of the picture; pairs of the same picture have the same.
        text: the caption.
        label: the class of the picture; None if nobody says.
        open: gives the picture as PIL has it.
    """

    name: str
    text: str
    label: str | None
    open: Callable[[], Any]


def pairs(spec: str) -> list[Pair]:
    """The pairs that `spec` names, in a fixed order.

    Raises:
        UsageError: nothing is there, it holds no pairs, or pillow, which opens pictures, is not installed.
    """
    try:
        import PIL  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise UsageError(f"pictures are opened by the package pillow, which is not installed; {to_install('images')}") from error
    base, _, part = spec.partition("#")
    if part not in ("", "train", "heldout"):
        raise UsageError(f"{spec!r} has no part {part!r}; write {base}#train or {base}#heldout")
    found = [pair for pair in _read(base) if not part or (part == "heldout") == _is_held_out(pair.name)]
    if not found:
        raise UsageError(f"{spec!r} holds no pairs of a picture and a caption; a line of {METADATA} is like {_ROW}")
    return found


def holds_pictures(spec: str) -> bool:
    """Whether a SPEC is of pictures by its files; of the columns of a table, the table itself tells."""
    base = expanded(spec.partition("#")[0])
    return (base / METADATA).is_file() or (base.suffix == ".json" and base.is_file())


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % _HELD_OUT == 0


def _read(base: str) -> Iterable[Pair]:
    if base.startswith("hub:"):
        return _of_table(base, *hub_table(base))
    path = expanded(base)
    if (path / METADATA).is_file():
        return _of_folder(path)
    if path.suffix == ".json" and path.is_file():
        return _of_coco(path)
    if (path / "dataset_info.json").is_file():
        import datasets

        return _of_table(base, datasets.load_from_disk(str(path)), "text")
    raise UsageError(
        f"{base!r} holds no pictures with captions; give a folder with {METADATA}, a .json of captions as COCO has them, a folder of "
        "datasets.save_to_disk, or hub:NAME"
    )


def _of_folder(folder: Path) -> list[Pair]:
    found, path = [], folder / METADATA
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text, label = row["file_name"], row["text"], row.get("label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, line {number}, is no pair ({first_line(error)}); a line is like {_ROW}") from error
        found.append(Pair(str(name), str(text), None if label is None else str(label), _opener(folder / str(name))))
    return found


def _of_coco(path: Path) -> list[Pair]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: str(image["file_name"]) for image in data["images"]}
        captions = [(files[row["image_id"]], str(row["caption"])) for row in data["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not hold `images` and `annotations` as COCO's captions do ({first_line(error)})"
        ) from error
    places = [path.parent, path.parent.parent / path.stem.rpartition("_")[2]]
    first = captions[0][0] if captions else ""
    folder = next((place for place in places if (place / first).is_file()), places[0])
    return [Pair(name, text, None, _opener(folder / name)) for name, text in captions]


def _of_table(base: str, table: Any, field: str) -> list[Pair]:
    if field not in table.column_names or "image" not in table.column_names:
        names = ", ".join(table.column_names)
        raise UsageError(
            f"{base!r} has no columns image and {field}; its columns: {names}; name the captions: hub:NAME:CONFIG:SPLIT:FIELD"
        )
    labels: list[Any] = [None] * len(table)
    if "label" in table.column_names:
        named = getattr(table.features["label"], "int2str", str)
        labels = [named(label) for label in table["label"]]
    texts = list(table[field])

    def opener(number: int) -> Callable[[], Any]:
        return lambda: table[number]["image"]

    return [
        Pair(str(number), str(text), label, opener(number))
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def _opener(path: Path) -> Callable[[], Any]:
    def opened() -> Any:
        from PIL import Image

        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"picture {path} cannot be opened ({first_line(error)}); put it there, or take it out of the list"
            ) from error

    return opened
