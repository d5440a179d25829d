"""The kinds of axes: what people call their units, and which kinds go with a whole unit. Needs no torch."""

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Literal

Prunable = Literal[
    "neurons", "kv_heads", "query_heads", "experts", "residual", "layers", "attentions", "mlps"
]  # in `axes` of a recipe
USUAL: tuple[Prunable, ...] = ("neurons", "kv_heads")  # what a recipe removes if it does not say
HEADS = ("kv_heads", "query_heads")
BLOCKS = {
    "attentions": HEADS,
    "mlps": ("neurons", "experts"),
}  # whose one unit is a block of a layer -> the kinds that go with it
WHOLE = ("layers", *BLOCKS)  # a distance scores them, and a `depth.…` chooser says how many go
OF_THE_MODEL = ("layers", "residual", "vocabulary")  # a model has each once; a cut of them leaves all layers alike

LABELS = {
    "neurons": "MLP neurons", "kv_heads": "KV heads", "query_heads": "query heads of each KV head", "layers": "layers",
    "experts": "experts", "residual": "channels of the stream", "width": "channels of the stream", "vocabulary": "tokens",
}  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of an axis, from its name `layers`, `layers.I.KIND` or KIND."""
    return name.rpartition(".")[2]


def layer_of(name: str) -> int | None:
    """I of a name `layers.I.KIND`; None for other names."""
    head, _, rest = name.removeprefix(tower_of(name)).partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "layers" and number.isdecimal() else None


def first_layers(names: Iterable[str]) -> dict[str, int]:
    """Tower -> the number of its first layer, where the layers of all towers are counted one after the other."""
    depths = Counter(tower_of(name) for name in {name.rpartition(".")[0] for name in names if layer_of(name) is not None})
    towers = sorted(depths)
    return dict(zip(towers, accumulate((depths[tower] for tower in towers[:-1]), initial=0), strict=False))


def tower_of(name: str) -> str:
    """`text.` of `text.layers.3.neurons`: the tower that an axis lies in; empty where a model has only one, or of the whole model."""
    head, layers, _ = name.partition("layers")
    return head if layers and head.endswith(".") else ""
