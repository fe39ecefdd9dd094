"""Sizes known only at run time, as large primes while a graph is lowered.

The graph is interpreted on meta tensors whose unknown sizes are distinct large primes. Torch's own shape rules then do
all shape and stride arithmetic, and a number that a prime divides is read back as a multiple of that size.
"""

from __future__ import annotations

from collections.abc import Sequence

PRIMES = {"T": 1000003, "S": 1000033, "S1": 1000037, "R": 1000039, "M": 1000081, "N": 1000099}
"""T tokens, S sequences, S1 = S + 1, R logits rows, M columns of the block table, N blocks of a cache."""
SYMBOLS = tuple(PRIMES)


def decode(number: int) -> int | tuple[int, int]:
    """A number, or (factor, symbol index). Raises ValueError for a product of two unknown sizes."""
    factor, found = number, []
    for index, prime in enumerate(PRIMES.values()):
        while factor and factor % prime == 0:
            factor //= prime
            found.append(index)
    if len(found) > 1:
        raise ValueError("a size is the product of two sizes known only at run time")
    return (factor, found[0]) if found else number


def evaluate(number: int, values: Sequence[int]) -> int:
    """The number once the symbols are known."""
    for index, prime in enumerate(PRIMES.values()):
        while number and number % prime == 0:
            number = number // prime * values[index]
    return number
