"""Several kernels for one op: which of them computes a call follows from its phase and its number of rows.

Rows are known only at run time, so an op of several candidates is a function that looks at its arguments' shapes and
calls the kernel of their range. Shapes are on the host: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper

from torch import Tensor

from fuseline.compile.kernels.registry import Implementation

Ranges = Sequence[tuple[int, str]]
"""(rows up to which, label of the candidate), ascending, ANY last."""
Choices = Mapping[str, Ranges]
"""By phase."""


def default_choices(candidates: Sequence[Implementation]) -> dict[str, list[tuple[int, str]]]:
    """For every phase and number of rows the first candidate that takes it."""
    found: dict[str, list[tuple[int, str]]] = {}
    for phase in dict.fromkeys(phase for candidate in candidates for phase in candidate.phases):
        ranges = found[phase] = []
        for candidate in candidates:
            if phase in candidate.phases and (not ranges or candidate.max_rows > ranges[-1][0]):
                ranges.append((candidate.max_rows, candidate.label))
    return found


def chosen_label(ranges: Ranges, rows: int) -> str:
    return next(label for most, label in ranges if rows <= most)


def dispatcher(
    candidates: Sequence[Implementation], choices: Choices, size: Callable[..., tuple[str, int]]
) -> Implementation:
    """One implementation that runs the chosen ones: its label names all, `into` is there where one of them has it.

    `size` gives a call's phase and rows from its arguments.
    """
    used = list(dict.fromkeys(label for ranges in choices.values() for _, label in ranges))
    if len(used) == 1:
        only = next(candidate for candidate in candidates if candidate.label == used[0])
        return replace(only, run=named(only.run))
    of_phase = {(phase, candidate.label): candidate for candidate in candidates for phase in candidate.phases}
    tables = {phase: [(most, of_phase[phase, label]) for most, label in ranges] for phase, ranges in choices.items()}

    def chosen(args: tuple) -> Implementation:
        phase, rows = size(*args)
        return next(candidate for most, candidate in tables[phase] if rows <= most)

    def by_rows(*args):
        return chosen(args).run(*args)

    def into(out: Tensor, *args) -> None:
        candidate = chosen(args)
        if candidate.into is None:
            out.copy_(candidate.run(*args))
        else:
            candidate.into(out, *args)

    has_into = any(candidate.into for table in tables.values() for _, candidate in table)
    first = candidates[0]
    return Implementation(first.op, " | ".join(used), first.device, by_rows, into=into if has_into else None)


def named(run: Callable) -> Callable:
    """With a name, which a graph's code needs of what it calls and a partial has not."""
    return run if hasattr(run, "__name__") else update_wrapper(partial(run), run.func, updated=())
