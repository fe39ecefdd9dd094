"""All storage formats, found in this folder, and which of them a target's kernels read."""

from __future__ import annotations

import functools

from fuseline.compile import formats
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats import code_rows, codes
from fuseline.compile.formats.format import Format, Shape
from fuseline.compile.ops.registry import modules_of
from fuseline.compile.target import Target

BY_TARGET = {"cpu": "panels", "cuda": "rows"}
"""Format that the kernels of a target read, unless the configuration names a format."""


@functools.cache
def registry() -> dict[str, Format]:
    """Format by name; a new file needs no list."""
    found = (getattr(module, "FORMAT", None) for module in modules_of(formats))
    return {form.name: form for form in found if form is not None}


def format_named(name: str) -> Format:
    """A format of a file, or one of a layout of codes."""
    if name.startswith(code_rows.PREFIX):
        return code_rows.format_of(name.removeprefix(code_rows.PREFIX))
    return registry().get(name) or codes.format_of(name)


def format_of_codes(layout: str, shape: Shape, target: Target) -> Format | None:
    """The format in which a target's kernels read a weight of that layout; None where they do not."""
    of_target = {"cpu": codes, "cuda": code_rows}[target.kind]
    form = of_target.format_of(layout)
    return form if of_target.has_kernel(form.layout, shape) else None


def formats_for(config: CompileConfig, target: Target) -> tuple[Format, ...]:
    """Formats of weights, the preferred first. Raises ValueError for one that the target has not."""
    names = dict.fromkeys(name for name in (config.weight_format, BY_TARGET[target.kind]) if name)
    known = [name for name, form in sorted(registry().items()) if target.kind in form.targets]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"weight_format {unknown[0]} is none of {target.kind}: take one of {', '.join(known)}")
    return tuple(registry()[name] for name in names)
