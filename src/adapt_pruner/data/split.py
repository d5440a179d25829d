"""Split a user's text in two: one part to train on, and one held out."""

from adapt_pruner.data.sources import SELF, read
from adapt_pruner.errors import UsageError

__all__ = ["split_off_heldout"]


def split_off_heldout(spec: str) -> tuple[str, str, int]:
    """The SPECs of the training part and of the held-out part, and the number of characters of the training part.

    Args:
        spec: a text, or its training part.

    Raises:
        UsageError: there is no such text, it is written by the model itself, or it is too short to split.
    """
    if spec == SELF:
        raise UsageError("--text self would train the model on its own text; name a file, a folder or a data set")
    base = spec.removesuffix("#train")
    if base == "python-docs" or base.startswith("python-docs:"):
        parts = "python-docs:train", "python-docs:heldout"
    elif base.startswith("hub:"):
        return f"{base}#train", f"{base}#heldout", 10**12  # it is streamed, so it counts as endless
    else:
        parts = f"{base}#train", f"{base}#heldout"
        next(read(parts[1]))
    return *parts, sum(len(document.text) for document in read(parts[0]))
