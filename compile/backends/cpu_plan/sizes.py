"""Sizes known only at run time, read from two interpretations of a graph.

A graph is interpreted on meta tensors twice, with FIRST and with SECOND for its unknown sizes, so torch computes all
shapes, strides and offsets. `read` recovers the symbolic size from the two numbers:

    768, 768                                     ->  768
    5 + 64 * FIRST["T"], 5 + 64 * SECOND["T"]    ->  Linear(5, 64, 0): 5 + 64 T

The two values of each size differ by a distinct large prime, so a difference identifies its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

STEPS = {
    "T": 536870923, "S": 537870929, "S1": 538870961, "R": 539870963, "M": 540870991, "N": 541871017, "E": 542871019,
    "L": 543871007,
}  # fmt: skip
"""T tokens, S sequences, S1 = S + 1, R logits rows, M columns of the block table, N blocks of a cache, E given
embeddings, L slots of recurrent states: SECOND - FIRST, distinct primes."""
FIRST = {"T": 1000003, "S": 1000033, "S1": 1000037, "R": 1000039, "M": 1000081, "N": 1000099, "E": 1000117,
         "L": 1000121}  # fmt: skip
SECOND = {name: FIRST[name] + step for name, step in STEPS.items()}
SYMBOLS = tuple(STEPS)
MAX_FACTOR = 1 << 28
"""A larger factor indicates another unknown size."""


class SizeError(ValueError):
    """A size, stride or offset is not linear in one of the sizes known only at run time."""


class Linear(NamedTuple):
    """constant + factor * (the size of this index in SYMBOLS)."""

    constant: int
    factor: int
    symbol: int


Size = int | Linear


def read(first: int, second: int) -> Size:
    """The size that is `first` in the first interpretation and `second` in the second. Raises SizeError."""
    difference = second - first
    if difference == 0:
        return first
    for index, (name, step) in enumerate(STEPS.items()):
        factor, rest = divmod(difference, step)
        if rest == 0 and 0 < factor < MAX_FACTOR:
            return Linear(first - factor * FIRST[name], factor, index)
    raise SizeError(f"a size is {first}, then {second}: it is not linear in one size known only at run time")


def evaluate(size: Size, values: Sequence[int]) -> int:
    """Evaluates the size for known sizes; `values` in the order of SYMBOLS."""
    return size.constant + size.factor * values[size.symbol] if isinstance(size, Linear) else size


def from_json(value: int | Sequence[int]) -> Size:
    """The size that JSON holds as a number or [constant, factor, symbol]."""
    return value if isinstance(value, int) else Linear(*value)
