"""All ops of the vocabulary, from the modules that declare them."""

from __future__ import annotations

from fuseline.compile import ops
from fuseline.compile.ops.library import Op


def registry() -> dict[str, Op]:
    """Ops by name."""
    found = [value.op for name in ops.__all__ for value in vars(getattr(ops, name)).values() if hasattr(value, "op")]
    return {entry.name: entry for entry in found if isinstance(entry, Op)}
