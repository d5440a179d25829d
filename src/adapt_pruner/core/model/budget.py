"""How many parameters a model has and how many are to stay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapt_pruner.errors import UsageError

if TYPE_CHECKING:  # recipes read budgets, and reading a recipe does not wait for torch
    from torch import nn

    from adapt_pruner.core.model.axes import Slice


_LESS = re.compile(r"-\s*(\d*\.?\d+)\s*%|(\d*\.?\d+)\s*%\s*(?:less|fewer|smaller|off|gone|removed)", re.IGNORECASE)
"""A share that goes, as people write it by mistake."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module; one that is shared (tied embeddings) counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def parse_count(text: str | int) -> int:
    """A count as people write it: `110M`, `110_000_000`, `1.5B`, `100k`.

    Raises:
        UsageError: it is not a positive count.
    """
    whole = r"(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)"  # a comma parts thousands; 1,5M is no count
    match = re.fullmatch(rf"\s*({whole}(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbBgGtT]?)\s*", str(text))
    number = float(re.sub("[_,]", "", match[1])) * _UNITS[match[2].upper()] if match else 0.0
    value = round(number) if 1 <= number < 1e18 else 0
    if value < 1:
        raise UsageError(f"{text!r} is not a count; write it like 110M, 110_000_000 or 1.5B")
    return value


def check_written(budget: Any) -> str:
    """The budget as written (`110M`, `110_000_000`, `80%`, `80% of decoder` or `75% of experts`), once it is known to be a valid one.

    Raises:
        UsageError: it is neither a count nor a share.
    """
    written = str(budget).strip()
    number, percent, of = written.partition("%")
    if slip := _LESS.fullmatch(written):
        left = 100 - float(slip[1] or slip[2])
        remedy = f"write {left:g}%" if left > 0 else "write it like 70%"
        raise UsageError(f"budget {written!r} says what goes, and a budget is what stays; {remedy}")
    if percent:
        is_share = of.strip() in ("", "of decoder", "of experts") and re.fullmatch(r"\d*\.?\d+", number.strip())
        if not (is_share and 0 < float(number) <= 100):
            raise UsageError(
                f"budget {written!r} is not a share of the dense model; write it like 80% or '80% of decoder', above 0% and up to 100%"
            )
        return written
    try:
        parse_count(written)
    except UsageError as error:
        raise UsageError(
            f"budget {written!r} is neither a count nor a share; write it like 110M, 110_000_000, 80% or '80% of decoder'"
        ) from error
    return written


def unit_cost(model: nn.Module, slices: Iterable[Slice]) -> int:
    """Parameters that one unit owns in `slices`."""
    total = 0
    for piece in slices:
        parameter = model.get_parameter(piece.parameter)
        total += parameter.numel() // parameter.shape[piece.dim] * piece.width
    return total


@dataclass(frozen=True)
class Budget:
    """The number of parameters to keep, tied weights counted once.

    Attributes:
        keep: the most parameters that may stay.
        total: parameters the model has now.
    """

    keep: int
    total: int

    @property
    def excess(self) -> int:
        """Parameters that must still go; negative or zero when the model is small enough."""
        return self.total - self.keep

    @classmethod
    def parse(cls, text: str | int, *, dense: int, decoder: int, outside: int, experts: int = 0) -> Budget:
        """Read `110M`, `110_000_000`, `80%` (of `dense`), `80% of decoder` or `75% of experts`, which keep all other parameters.

        Args:
            text: the budget.
            dense: parameters of the dense model.
            decoder: parameters in the decoder layers of the dense model.
            outside: parameters outside (embedding, head, final norm) that stay.
            experts: those of `decoder` that belong to experts which a router chooses.

        Raises:
            UsageError: not a count or a share, above the model's own size, or a share of experts that the model does not have.
        """
        written = check_written(text)
        number, percent, of = written.partition("%")
        if not percent:
            keep = parse_count(written)
        else:
            share = float(number) / 100
            parts = {"": dense, "of decoder": decoder, "of experts": experts}
            part, whole = parts[of.strip()], outside + decoder if of.strip() else dense
            if not part:
                raise UsageError(
                    f"budget {written!r} is a share of experts, and this model has none that may be removed; write it like 80%"
                )
            keep = whole - part + int(part * share)
        if keep > dense:
            raise UsageError(f"budget {keep:,} is above the {dense:,} parameters the model has; lower it")
        return cls(keep=keep, total=dense)

    def check_reachable(self, floor: int, *, when: str) -> None:
        """Refuse a budget below `floor`, the parameters left `when` nothing more can go.

        Raises:
            UsageError: the budget is below; the message gives the smallest possible count.
        """
        if self.keep < floor:
            raise UsageError(
                f"budget {self.keep:,} is too small: {floor:,} parameters remain when {when}; the smallest possible budget is {floor:,}"
            )
