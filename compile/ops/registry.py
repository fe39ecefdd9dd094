"""All ops of the vocabulary, from the modules of this folder that declare them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from fuseline.compile import ops
from fuseline.compile.ops.library import Op, op_name


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Every module in the folder of a package, by name; a new file needs no list."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


@functools.cache
def registry() -> dict[str, Op]:
    """Op by name."""
    found = [getattr(value, "op", None) for module in modules_of(ops) for value in vars(module).values()]
    return {entry.name: entry for entry in found if isinstance(entry, Op)}


def op_of(target: object) -> Op | None:
    """The declared op that a node of this target calls."""
    return registry().get(op_name(target))
