"""Where a model comes from: its name on the hub and its licence, as far as its own files tell."""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_regular
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.core.system.terminal import one_line
from adapt_pruner.errors import UsageError

_SAID = ("name", "hub", "file", "license", "license_name", "license_link", "license_from")
_HUB_ID = r"[\w.-]+/[\w.-]+"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_LICENSE_TEXTS = {
    "apache-2.0": re.compile(r"Apache License\s+Version 2\.0, January 2004"),
    "mit": re.compile(r"Permission is hereby granted, free of charge, to any person obtaining a copy of this software and"),
}
_GGUF_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")))
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_README = 2**20  # the most bytes of a README.md or LICENSE that are read
_MOST = 2**16  # the most bytes of a string or entries of an array; anything larger is no description


def origin(name: str) -> dict[str, Any]:
    """The origin of the model with this name, as plain data.

    The licence is looked for in the front matter of its README.md, in its config.json, in the metadata of a GGUF file, and in a
    file LICENSE with the text of Apache 2.0 or MIT. For a hub name the README.md is fetched from the hub, as the weights were. If
    only a file names the hub model, the network is not used; only the cache is looked at.

    Args:
        name: as `checkpoint.load` takes it. One of our own checkpoints passes on what it says of its own origin.

    Returns:
        name: the name without the folders above it; hub: its name on the hub, or None; file: the GGUF file that its weights were
        dequantised from, if any; license, license_name, license_link: as in a model card of the hub, if known; license_from:
        where the licence was found, or None. A model that is missing or unreadable gives only its name.
    """
    from adapt_pruner.checkpoint.load import PACKAGED, locate  # here, so that a card is written without torch

    seen: set[str] = set()
    while (before := _named_before(name, seen)) is not None:
        name = before
    base: dict[str, Any] = {"name": Path(name).name or name, "hub": None, "license_from": None}
    try:
        where, gguf = locate(name)
    except UsageError:  # the model has been removed since
        return said_of_base(base)
    if gguf is not None:
        base |= {"name": Path(gguf).stem, "file": gguf} | _of_gguf(Path(where) / gguf)
    elif not Path(where).is_dir():
        base |= {"name": name, "hub": where} | _of_hub(where, fetch=len(seen) == 1)
    else:
        earlier = _json(Path(where) / filenames.PRUNING)
        if isinstance(earlier.get("base"), dict):
            return said_of_base(earlier["base"])
        base |= {"name": Path(where).resolve().name} | _of_folder(Path(where))
    packaged = None if Path(name).exists() else PACKAGED.get(name.lower())
    if packaged is not None and packaged.hub is not None:
        base |= {"name": packaged.hub.partition("/")[2], "hub": packaged.hub}
        if base.get("license") is None and packaged.license is not None:
            base |= {"license": packaged.license, "license_from": "its page on the hub"}
    return said_of_base(base)


def said_of_base(facts_read: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a model's origin, restricted to valid values: one line each, a hub name, an address."""
    facts = {key: one_line(value) for key in _SAID if isinstance(value := facts_read.get(key), str) and one_line(value)}
    if not re.fullmatch(_HUB_ID, facts.get("hub", "")):
        facts.pop("hub", None)
    if not re.fullmatch(r"https?://[^\s<>()|`\\\"']+", facts.get("license_link", "")):
        facts.pop("license_link", None)
    return {"name": "a model without a name", "hub": None, "license_from": None} | facts


def _named_before(name: str, seen: set[str]) -> str | None:
    """The model that a checkpoint inside a run was made of, as its recipe names it; None if there is none or it has been seen."""
    path = Path(name).expanduser()
    seen.add(os.path.realpath(path) if path.is_dir() else name)
    earlier = _json(path / filenames.PRUNING) if path.is_dir() else {}
    if not earlier or isinstance(earlier.get("base"), dict):
        return None
    try:
        before = earlier["recipe"]["model"]
        again = os.path.realpath(Path(before).expanduser()) if Path(before).expanduser().is_dir() else before
    except (KeyError, TypeError, ValueError, RuntimeError, OSError):
        return None
    return before if again not in seen else None


def _of_folder(folder: Path) -> dict[str, Any]:
    if license_ := _of_readme(_text(folder / filenames.CARD)):
        if not _is_address(license_.get("license_link", "")):  # it names a file that is not passed on
            license_.pop("license_link", None)
        return license_
    if isinstance(named := _json(folder / filenames.CONFIG).get("license"), str):
        return {"license": named.lower(), "license_from": filenames.CONFIG}
    for path in sorted(folder.glob("[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*")):
        text = re.sub(r"\s+", " ", _text(path))
        for license_id, pattern in _LICENSE_TEXTS.items():
            if pattern.search(text):
                return {"license": license_id, "license_from": path.name}
    return {}


def _of_hub(hub_id: str, *, fetch: bool) -> dict[str, Any]:
    """What the README.md of a model on the hub says; nothing if it has none or it cannot be fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError is that of the HTTP library beneath

    try:
        path = Path(hf_hub_download(hub_id, filenames.CARD, local_files_only=not fetch))
    except (HTTPError, HFValidationError, OSError):  # no such file, no network, no permission
        return {}
    fields = _of_readme(_text(path))
    link = fields.get("license_link")
    if link is not None and not _is_address(link):  # it names a file beside that README.md
        fields["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return fields


def _is_address(link: str) -> bool:
    return link.startswith(("http://", "https://"))


def _of_readme(text: str) -> dict[str, Any]:
    """The licence in the front matter of a README.md."""
    if not text.startswith("---"):
        return {}
    from huggingface_hub import ModelCard

    try:
        data: dict[str, Any] = dict(ModelCard(text, ignore_metadata_errors=True).data.__dict__)
    except Exception:  # the front matter is no YAML or no mapping; several libraries raise errors for that
        return {}
    license_ = {key: str(data[key]) for key in _LICENSE_KEYS if isinstance(data.get(key), str)}
    return license_ | {"license_from": filenames.CARD} if "license" in license_ else {}


def _of_gguf(path: Path) -> dict[str, Any]:
    """What the first keys of a GGUF file (`general.…`) say of the model."""
    keys: dict[str, Any] = {}
    with suppress(OSError), path.open("rb") as file:
        keys = dict(_general(file))
    fields: dict[str, Any] = {}
    if match := re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", str(keys.get("general.base_model.0.repo_url"))):
        fields["hub"] = match[1]
    if isinstance(license_ := keys.get("general.license"), str):
        fields |= {"license": license_.lower(), "license_from": "general.license of the GGUF file"}
        named = {"license_name": keys.get("general.license.name"), "license_link": keys.get("general.license.link")}
        fields |= {key: value for key, value in named.items() if isinstance(value, str)}
    return fields


def _general(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The `general.…` keys at the beginning of a GGUF file and their values, up to the first other key.

    The gguf library is not used because it first reads the whole vocabulary: two seconds for 49,152 tokens, a minute for 262,144.
    """

    def number(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def text() -> str:
        if (size := number("<Q")) > _MOST:
            raise ValueError(size)
        return file.read(size).decode("utf-8", errors="replace")

    def value(kind: int) -> Any:
        if kind == _GGUF_STRING:
            return text()
        if kind != _GGUF_ARRAY:
            return number(_GGUF_SCALARS[kind] or "")
        of, count = number("<I"), number("<Q")
        if count > _MOST:
            raise ValueError(count)
        return [value(of) for _ in range(count)]

    try:
        if file.read(4) != b"GGUF" or number("<I") < 2:  # in version 1 sizes are narrower
            return
        number("<Q")  # the number of tensors
        for _ in range(number("<Q")):
            key = text()
            if not key.startswith("general."):
                return
            yield key, value(number("<I"))
    except (struct.error, ValueError, KeyError, IndexError):
        return


def _text(path: Path) -> str:
    """The text of a file; empty if it is missing or unreadable."""
    try:
        check_regular(path, most=None)
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_README)
    except (OSError, UsageError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
