"""What a search tries next: candidates made from the best ones so far, all within the same budget."""

import random as chance
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.kinds import kind_of
from adapt_pruner.core.system.parts import part

_REACH = 4  # levels that an axis may be above or below its start
_SWAPS = 3

Sizes = dict[str, int]
"""Axis name -> units to keep."""


@dataclass(frozen=True)
class Candidate:
    """Sizes, and the loss that was measured with them."""

    sizes: Sizes
    loss: float


@dataclass(frozen=True)
class Space:
    """The sizes that a search may try: whole levels away from `base`, with the same total of units of each kind.

    Attributes:
        base: the start.
        kinds: kind -> names of its axes; a kind with one axis keeps its size.
        level: kind -> units in a level.
        least: axis name -> fewest units that it keeps.
        most: axis name -> units it has.
    """

    base: Sizes
    kinds: Mapping[str, tuple[str, ...]]
    level: Mapping[str, int]
    least: Mapping[str, int]
    most: Mapping[str, int]

    @classmethod
    def around(cls, axes: Sequence[Axis], base: Sizes, *, level: float, multiple: int = 1) -> "Space":
        """The space around `base`.

        Args:
            axes: those that may shrink.
            base: the start.
            level: neurons in a level, as a share of the widest layer's; of other units a level has one.
            multiple: levels are multiples of so many neurons, and every layer keeps as many at least.
        """
        kinds: dict[str, tuple[str, ...]] = {}
        for axis in axes:
            kinds[axis.kind] = (*kinds.get(axis.kind, ()), axis.name)
        widest = max((axis.size for axis in axes if axis.kind == "neurons"), default=1)
        neurons = max(1, round(level * widest / multiple)) * multiple
        units = {kind: neurons if kind == "neurons" else 1 for kind in kinds}
        least = {axis.name: min(axis.size, max(axis.least, multiple * (axis.kind == "neurons"))) for axis in axes}
        return cls(base, kinds, units, least, {axis.name: axis.size for axis in axes})

    def levels(self, name: str) -> list[int]:
        """The sizes that an axis may have. The list is equally long for all axes: the smallest and largest size may repeat."""
        unit = self.level[kind_of(name)]
        steps = [self.base[name] + k * unit for k in range(-_REACH, _REACH + 1)]
        allowed = [size for size in steps if self.least[name] <= size <= self.most[name]]
        return [min(max(size, allowed[0]), allowed[-1]) for size in steps]

    def swapped(self, sizes: Sizes, draw: chance.Random, times: int) -> Sizes:
        """Sizes after `times` random swaps; a swap moves one axis of a kind a level up and another a level down."""
        swapped = dict(sizes)
        for _ in range(times):
            kinds = [kind for kind in self.kinds if self._movable(swapped, kind, 1) and self._movable(swapped, kind, -1)]
            if not kinds:
                break
            kind = draw.choice(kinds)
            up = draw.choice(self._movable(swapped, kind, 1))
            if down := [name for name in self._movable(swapped, kind, -1) if name != up]:
                swapped[up] += self.level[kind]
                swapped[draw.choice(down)] -= self.level[kind]
        return swapped

    def drawn(self, draw: chance.Random) -> Sizes:
        """Sizes drawn at random: after so many swaps that nothing is left of `base` but the totals."""
        return self.swapped(self.base, draw, 4 * len(self.base))

    def mended(self, sizes: Sizes, draw: chance.Random) -> Sizes:
        """Bring sizes back into the space: each to the nearest level, then each kind to as many units as `base` has."""
        mended = {name: min(self.levels(name), key=lambda size: (abs(size - sizes[name]), size)) for name in self.base}
        for kind, names in self.kinds.items():
            while missing := sum(self.base[name] - mended[name] for name in names):
                move = 1 if missing > 0 else -1
                mended[draw.choice(self._movable(mended, kind, move))] += move * self.level[kind]
        return mended

    def _movable(self, sizes: Sizes, kind: str, move: int) -> list[str]:
        """The axes of a kind that may go a level up (1) or down (-1)."""
        return [name for name in self.kinds[kind] if sizes[name] + move * self.level[kind] in self.levels(name)]


@part("proposal")
def evolution(population: Sequence[Candidate], space: Space, draw: chance.Random, number: int) -> list[Sizes]:
    """Half are mutations of one candidate by one to three swaps, half crossings of two, which take each axis from either.

    A parent is the better of two candidates that are drawn at random.
    """
    offspring = []
    for index in range(number):
        parent = _drawn(population, draw)
        if index % 2 == 0 or len(population) < 2:
            offspring.append(_mutated(parent, space, draw))
        else:
            other = _drawn(population, draw)
            crossed = {name: draw.choice((size, other.sizes[name])) for name, size in parent.sizes.items()}
            offspring.append(space.mended(crossed, draw))
    return offspring


@part("proposal")
def mutation(population: Sequence[Candidate], space: Space, draw: chance.Random, number: int) -> list[Sizes]:
    """All are mutations of a candidate by one to three swaps, fewer being likelier; no two are alike (EvoPress).

    The list is shorter if there are not so many mutations.
    """
    known = {tuple(candidate.sizes.values()) for candidate in population}
    offspring: list[Sizes] = []
    for _ in range(10 * number):
        if len(offspring) == number:
            break
        mutated = _mutated(draw.choice(population), space, draw)
        if (key := tuple(mutated.values())) not in known:
            known.add(key)
            offspring.append(mutated)
    return offspring


@part("proposal")
def random(population: Sequence[Candidate], space: Space, draw: chance.Random, number: int) -> list[Sizes]:
    """All are drawn anew, up to as many swaps from the start as there are axes: the control that learns nothing."""
    return [space.swapped(space.base, draw, draw.randint(1, len(space.base))) for _ in range(number)]


def _mutated(parent: Candidate, space: Space, draw: chance.Random) -> Sizes:
    return space.swapped(parent.sizes, draw, min(draw.randint(1, _SWAPS), draw.randint(1, _SWAPS)))


def _drawn(population: Sequence[Candidate], draw: chance.Random) -> Candidate:
    return population[min(draw.randrange(len(population)), draw.randrange(len(population)))]
