"""`Pattern`: how many weights of a matrix are zero, and where they may lie; read from `50%` or `2:4`. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from adapt_pruner.errors import UsageError

_LARGEST = 1024  # the most inputs of a group


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in the weight of a linear layer, [outputs, inputs].

        N:M            of every M consecutive inputs of an output, M - N weights are zero
        unstructured   outputs · ⌊share · inputs⌋ weights of the matrix are zero, anywhere (Wanda: ⌊share · inputs⌋ of each
        output)

    Attributes:
        n: weights of a group that stay; 0 if the pattern is unstructured.
        m: inputs of a group; 0 if the pattern is unstructured.
        share: share of the weights that are zero, above 0 and below 1; (M - N) / M for N:M.
    """

    n: int
    m: int
    share: Fraction

    @classmethod
    def parse(cls, written: object) -> Pattern:
        """Read `2:4`, or a share of zeros such as `50%`.

        Raises:
            UsageError: it is neither, or it leaves no weight or no zero.
        """
        text = str(written).strip()
        remedy = "write the share of zeros, such as 50%, or N:M, such as 2:4"
        if match := re.fullmatch(r"(\d{1,9})\s*:\s*(\d{1,9})", text):
            n, m = int(match[1]), int(match[2])
            if not 1 <= n < m <= _LARGEST:
                raise UsageError(
                    f"sparsity {text!r} keeps {n} of every {m} weights; N:M needs N from 1 to M - 1, and M up to {_LARGEST:,}: {remedy}"
                )
            return cls(n, m, Fraction(m - n, m))
        if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?\s*%", text):
            raise UsageError(f"sparsity {text!r} is neither a share nor a pattern; {remedy}")
        share = Fraction(text[:-1].strip()) / 100
        if not 0 < share < 1:
            raise UsageError(f"sparsity {text!r} makes {'no weight' if share == 0 else 'all weights'} zero; {remedy}")
        return cls(0, 0, share)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{float(self.share * 100):.9g}%"

    @property
    def words(self) -> str:
        """What the pattern is called in a sentence: `2:4`, `50% unstructured`."""
        return str(self) if self.m else f"{self} unstructured"

    def zeros_of(self, inputs: int) -> int:
        """Zeros of each output of a layer with this number of inputs; for an unstructured pattern, on average."""
        return inputs // self.m * (self.m - self.n) if self.m else int(self.share * inputs)

    def check_inputs(self, name: str, inputs: int) -> None:
        """Refuse a layer whose inputs cannot be split into groups of M, or which has too few inputs for a single zero.

        Raises:
            UsageError: the layer is refused.
        """
        if self.m and inputs % self.m:
            raise UsageError(
                f"{name} has {inputs:,} inputs, which is not a multiple of {self.m}, so sparsity {self} does not fit it; give a "
                f"share such as {min(99, max(1, round(100 * float(self.share))))}%, or prune to widths that are multiples of {self.m} (multiple_of)"
            )
        if not self.zeros_of(inputs):
            raise UsageError(f"{name} has {inputs:,} inputs, of which sparsity {self} makes none zero; give a larger share")
