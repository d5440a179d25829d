"""How we recognise our own files: by their names, a mark in the folders that we write, and a foot on our pages."""

from contextlib import suppress
from pathlib import Path

from adapt_pruner.core.files import write_whole

__all__ = ["MARK", "PAGE_FOOT", "PROGRESS", "UNMERGED_FILE", "WEIGHT_MASK_FILE", "is_card", "is_marked", "is_page", "mark"]

MARK = ".adapt-pruner"
"""The file in a folder that says what the folder is."""

PAGE_FOOT = "Written by adapt-pruner"
"""The text at the foot of every page."""

WEIGHT_MASK_FILE = "sparsity/weight_mask.safetensors"
"""The file of a mask over weights, within a model folder (see `checkpoint.weight_mask_file`)."""

UNMERGED_FILE = "lora.safetensors"
"""The file of LoRA adapters in training, within a checkpoint of a run (see `checkpoint.state`)."""

PROGRESS = "progress.json"
"""The file in a run's folder that says where the run stands (see `core.progress`)."""

_DOCTYPE = b"<!doctype html"


def mark(folder: Path, kind: str) -> bool:
    """Mark a folder as a run or a comparison. Returns whether the mark is new.

    Raises:
        OSError: the mark could not be written.
    """
    if is_marked(folder, kind):
        return False
    write_whole(folder / MARK, f"adapt-pruner {kind}\n")
    return True


def is_marked(folder: Path, kind: str) -> bool:
    """Whether a folder bears the mark of its kind."""
    place = folder / MARK
    with suppress(OSError, ValueError):
        return place.is_file() and not place.is_symlink() and place.read_text(encoding="utf-8") == f"adapt-pruner {kind}\n"
    return False


def is_card(path: Path) -> bool:
    """Whether a README.md is a model card that we wrote: its front matter has our tag."""
    with suppress(OSError):
        if path.is_file():
            front = path.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
            return "\n- adapt-pruner\n" in f"{front}\n"
    return False


def is_page(path: Path) -> bool:
    """Whether a file is an HTML page that we wrote."""
    with suppress(OSError):
        if path.is_file():  # neither a device nor a pipe
            content = path.read_bytes()
            return content[: len(_DOCTYPE)].lower() == _DOCTYPE and PAGE_FOOT.encode() in content
    return False
