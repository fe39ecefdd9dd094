"""Numbers for JSON values: equal ones have the same, and each value is looked at once."""

from __future__ import annotations

from typing import Any


class Interned:
    """Takes time in proportion to the values' size, however often they are asked for."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple, int] = {}
        self._by_id: dict[int, tuple[Any, int]] = {}
        self.num_steps = 0
        """Values looked at."""

    def number(self, value: Any) -> int:
        """The number of a value, which must not change from now on."""
        if not isinstance(value, dict | list):
            self.num_steps += 1
            return self._of_shape((type(value), value))
        known = self._by_id.get(id(value))
        if known is None:
            self.num_steps += 1
            # The value is kept, so that no other gets its id.
            known = self._by_id[id(value)] = value, self._of_shape(self._shape(value))
        return known[1]

    def _shape(self, value: dict[str, Any] | list[Any]) -> tuple:
        """Objects whose keys have another order differ: their grammars do."""
        if isinstance(value, dict):
            return (dict, *((key, self.number(inner)) for key, inner in value.items()))
        return (list, *map(self.number, value))

    def _of_shape(self, shape: tuple) -> int:
        return self._by_shape.setdefault(shape, len(self._by_shape))
