"""Integers and decimal numbers within bounds, as grammar expressions.

Numbers are written plainly: integers of at most 18 digits unless a bound is longer, bounded decimals without exponent
and with at most 15 significant digits, so that reading them as binary numbers cannot move them across a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from fuseline.api.structured.ebnf import choice, repeat, sequence

MOST_DIGITS = 18
DIGIT = "[0-9]"
INTEGER = '("-"? ("0" | [1-9] [0-9]{0,17}))'
NUMBER = f'({INTEGER} ("." [0-9]{{1,16}})? ([eE] [+\\-]? [0-9]{{1,2}})?)'


@dataclass(frozen=True)
class Bound:
    value: Decimal
    is_strict: bool = False


def integer(low: int | None, high: int | None) -> str | None:
    """Integers from `low` to `high`; None if there are none."""
    if low is None and high is None:
        return INTEGER
    limit = 10**MOST_DIGITS - 1
    low = min(-limit, 10 * (high or 0)) if low is None else low
    high = max(limit, 10 * low) if high is None else high
    parts = []
    if low < 0:
        magnitudes = _naturals(max(1, -high), -low)
        parts += [f'"-" {choice(magnitudes)}'] if magnitudes else []
    if high >= 0:
        parts += _naturals(max(0, low), high)
    return choice(parts) if parts else None


def multiples(step: int, low: int | None, high: int | None, most: int = 1000) -> str | None:
    """Multiples of `step` in a range of at most `most`, or of all integers for a small step; None if neither."""
    if low is not None and high is not None:
        first = -(-low // step) * step
        if (high - first) // step < most:
            values = range(first, high + 1, step)
            return choice(f'"{value}"' for value in values) if values else None
    return None


def decimal(low: Bound | None, high: Bound | None) -> str | None:
    """Numbers between the bounds; None if there are none."""
    if low is None and high is None:
        return NUMBER
    if low and high and (low.value > high.value or (low.value == high.value and (low.is_strict or high.is_strict))):
        return None
    zero = Bound(Decimal(0))
    parts = []
    if low is None or low.value < 0:
        is_below = high is not None and high.value <= 0
        smallest = Bound(-high.value, high.is_strict) if is_below else zero
        largest = None if low is None else Bound(-low.value, low.is_strict)
        parts.append(f'"-" {choice(_positive(smallest, largest))}')
    if high is None or high.value > 0 or (high.value == 0 and not high.is_strict):
        smallest = low if low is not None and low.value >= 0 else zero
        parts += _positive(smallest, high)
    return choice(part for part in parts if part)


def _naturals(low: int, high: int) -> list[str]:
    """Expressions for low..high without leading zeros, digit by digit."""
    parts = []
    for count in range(len(str(low)), len(str(high)) + 1):
        begin = max(low, 10 ** (count - 1) if count > 1 else 0)
        end = min(high, 10**count - 1)
        if begin <= end:
            parts.append(_same_length(str(begin), str(end)))
    return parts


def _same_length(low: str, high: str) -> str:
    """Strings of digits, as long as both, between them."""
    if low == high:
        return f'"{low}"'
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return sequence(_digits(low[0], high[0]), repeat(DIGIT, rest, rest) if rest else "")
    if low[0] == high[0]:
        return sequence(f'"{low[0]}"', _same_length(low[1:], high[1:]))
    parts = [sequence(f'"{low[0]}"', _same_length(low[1:], "9" * rest))]
    if int(high[0]) - int(low[0]) > 1:
        middle = _digits(chr(ord(low[0]) + 1), chr(ord(high[0]) - 1))
        parts.append(sequence(middle, repeat(DIGIT, rest, rest)))
    parts.append(sequence(f'"{high[0]}"', _same_length("0" * rest, high[1:])))
    return choice(parts)


def _digits(low: str, high: str) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _positive(low: Bound, high: Bound | None) -> list[str]:
    """Numbers >= 0 without sign between the bounds."""
    low_int, low_frac = _split(low.value)
    if high is None:
        inner = integer(low_int + 1, None)
        most = max(15 - MOST_DIGITS, len(low_frac), 6)
        edge = f'"{low_int}" {_fraction(_Edge(low_frac, low.is_strict), None, most)}'
        return [edge, f'{inner} {_any_fraction(min(6, most))}']
    high_int, high_frac = _split(high.value)
    most = max(15 - len(str(high_int)), 1, len(low_frac), len(high_frac))
    lower, upper = _Edge(low_frac, low.is_strict), _Edge(high_frac, high.is_strict)
    if low_int == high_int:
        found = _fraction(lower, upper, most)
        return [f'"{low_int}" {found}'] if found else []
    parts = [f'"{low_int}" {_fraction(lower, None, most)}']
    parts += [f"{part} {_any_fraction(most)}" for part in _naturals(low_int + 1, high_int - 1)]
    last = _fraction(None, upper, most)
    return parts + ([f'"{high_int}" {last}'] if last else [])


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


@dataclass(frozen=True)
class _Edge:
    digits: str
    is_strict: bool


def _any_fraction(most: int) -> str:
    return f'("." [0-9]{{1,{most}}})?'


def _fraction(low: _Edge | None, high: _Edge | None, most: int) -> str | None:
    """What follows the integer part: nothing, or a point and digits, between the edges; None if nothing can."""
    parts = []
    if (low is None or not (low.digits or low.is_strict)) and (high is None or high.digits or not high.is_strict):
        parts.append('""')
    digits = _tail(low, high, most)
    if digits:
        parts.append(f'"." {digits}')
    return choice(parts) if parts else None


def _tail(low: _Edge | None, high: _Edge | None, left: int) -> str | None:
    """At least one digit, at most `left`, between the edges."""
    if left == 0:
        return None
    if low is not None and not low.digits and not low.is_strict:
        low = None
    if low is None and high is None:
        return f"[0-9]{{1,{left}}}"
    first = int(low.digits[:1] or 0) if low else 0
    last = int(high.digits[:1] or 0) if high else 9
    parts = []
    for digit in range(first, last + 1):
        below = _Edge(low.digits[1:], low.is_strict) if low and digit == first else None
        above = _Edge(high.digits[1:], high.is_strict) if high and digit == last else None
        parts.append(_with_digit(digit, below, above, left))
    found = [part for part in parts if part]
    return choice(found) if found else None


def _with_digit(digit: int, low: _Edge | None, high: _Edge | None, left: int) -> str | None:
    can_end = (low is None or not (low.digits or low.is_strict)) and (high is None or high.digits or not high.is_strict)
    rest = _tail(low, high, left - 1)
    if rest is None:
        return f'"{digit}"' if can_end else None
    return f'"{digit}" {repeat(rest, 0, 1) if can_end else rest}'
