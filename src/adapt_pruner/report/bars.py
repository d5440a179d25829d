"""The anatomy of a model in one line: a bar for each layer, as high as the share of it that is left."""

from collections.abc import Sequence

from adapt_pruner.core.events import Cut, Event, Start
from adapt_pruner.core.model.kinds import HEADS
from adapt_pruner.report.figures import after, sizes_of

__all__ = ["Bars"]

_HEIGHTS = " ▁▂▃▄▅▆▇█"


class Bars:
    """Follows the sizes of a model through the events of its run."""

    def __init__(self) -> None:
        self._began: dict[int, dict[str, int]] = {}
        self._now: dict[int, dict[str, int]] = {}
        self._left: Sequence[int] | None = None

    def hear(self, event: Event) -> None:
        """Take in a start or a cut. A log without the original sizes gives no bars."""
        if isinstance(event, Start) and event.began:
            self._began, self._left = sizes_of(event.began, None)[0], event.layers_left
            sizes = sizes_of(event.sizes, self._left)[0]
            self._now = {layer: sizes[layer] for layer in self._began if layer in sizes}
        elif isinstance(event, Cut) and self._began:
            self._now, self._left = after(event, self._now, self._left)

    def lines(self, width: int) -> list[str]:
        """Bars of neurons, and of heads if one is gone; side by side if `width` characters are enough."""
        lines = []
        for kind in ("neurons", *HEADS):
            before = [sizes.get(kind, 0) for sizes in self._began.values()]
            now = [self._now.get(layer, {}).get(kind, 0) for layer in self._began]
            if any(before) and (kind == "neurons" or now != before):
                name = kind.replace("kv_", "KV ").replace("_", " ")
                lines.append(f"{name} {''.join(map(_bar, now, before))} {sum(now) / sum(before):.0%}")
        if len(together := "  ".join(lines)) <= width:
            return [together]
        return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _bar(now: int, before: int) -> str:
    """A character of eight heights. It is empty only if nothing is left, and full only if nothing is gone."""
    if not now or not before:
        return _HEIGHTS[0]
    return _HEIGHTS[8] if now >= before else _HEIGHTS[max(1, min(7, round(8 * now / before)))]
