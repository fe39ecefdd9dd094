"""Logits processors that requests name: imported, made and called for each sequence (SPEC 6.6)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fuseline.engine.params import LogitsProcessor

if TYPE_CHECKING:  # the API looks names up without torch
    from torch import Tensor


@dataclass(frozen=True)
class Processor:
    """One processor of one sequence. `call` takes (generated, row), or (prompt, generated, row) if it has three
    parameters, and returns the row."""

    call: Callable[..., Any]
    takes_prompt: bool

    def __call__(self, prompt: Sequence[int], generated: Sequence[int], row: Tensor) -> Any:
        return self.call(prompt, generated, row) if self.takes_prompt else self.call(generated, row)


def find_callable(qualname: str) -> Callable[..., Any]:
    """What a dotted name stands for; the longest importable part of it is the module. Raises ValueError."""
    parts = qualname.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise ValueError(str(error)) from error
        except Exception as error:  # a module's own fault
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for part in parts[count:]:
            found = getattr(found, part, None)
        if not callable(found):
            raise ValueError(f"{name} has no callable {'.'.join(parts[count:])}")
        return found
    raise ValueError(f"no module of {qualname} can be imported")


def make_processor(spec: LogitsProcessor) -> Callable[..., Any]:
    """The callable that a request names. Raises ValueError."""
    found = find_callable(spec.qualname)
    if not spec.is_factory:
        return found
    try:
        made = found(*spec.args, **spec.kwargs)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError("it makes no callable")
    return made


def for_sequence(made: Callable[..., Any]) -> Processor:
    """A processor of one sequence: a clone where there is `clone()`, since it may keep a state."""
    clone = getattr(made, "clone", None)
    call = clone() if callable(clone) else made
    try:
        num_parameters = len(inspect.signature(call).parameters)
    except (TypeError, ValueError):  # a builtin tells nothing
        num_parameters = 2
    return Processor(call, num_parameters == 3)
