"""Several kernels for one op: which of them computes a call follows from its phase and its number of rows.

Rows are known only at run time, so an op of several candidates is a function that looks at its arguments' shapes and
calls the kernel of their range. Shapes are on the host: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

ROWS, DECODE, PREFILL = "rows", "decode", "prefill"
"""Phases: all calls of most ops; of attention, steps of one token a sequence and steps of more."""
ANY = 1 << 30
"""More rows than any call has."""

Ranges = Sequence[tuple[int, str]]
"""(rows up to which, label of the candidate), ascending, ANY last."""
Choices = Mapping[str, Ranges]
"""By phase."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op."""

    label: str
    """Who computes it: torch.linear (cuBLASLt), triton.rms_norm. Distinct within a phase of an op."""
    run: Callable
    """Takes the op's arguments and gives its results; never waits for the device."""
    most_rows: int = ANY
    phases: tuple[str, ...] = (ROWS,)
    plan: Callable[[Mapping[str, Tensor]], None] | None = None
    """Is given a step's inputs on the host, by placeholder name, before the step's ops, by the thread that runs it."""
    into: Callable | None = None
    """As `run`, but the result is written to a tensor that comes first."""


def default_choices(candidates: Sequence[Candidate]) -> dict[str, list[tuple[int, str]]]:
    """For every phase and number of rows the first candidate that takes it."""
    found: dict[str, list[tuple[int, str]]] = {}
    for phase in dict.fromkeys(phase for candidate in candidates for phase in candidate.phases):
        ranges = found[phase] = []
        for candidate in candidates:
            if phase in candidate.phases and (not ranges or candidate.most_rows > ranges[-1][0]):
                ranges.append((candidate.most_rows, candidate.label))
    return found


def chosen_label(ranges: Ranges, rows: int) -> str:
    return next(label for most, label in ranges if rows <= most)


def dispatcher(
    candidates: Sequence[Candidate], choices: Choices, size: Callable[..., tuple[str, int]]
) -> tuple[str, Callable, Callable | None]:
    """(labels of what may run, the op as a function, the same into a tensor that comes first where a kernel can).

    `size` gives a call's phase and rows from its arguments.
    """
    if len(candidates) == 1:
        return candidates[0].label, candidates[0].run, candidates[0].into
    if len(labels := {label for ranges in choices.values() for _, label in ranges}) == 1:
        only = next(candidate for candidate in candidates if candidate.label in labels)
        return only.label, named(only.run), only.into
    of_phase = {(phase, candidate.label): candidate for candidate in candidates for phase in candidate.phases}
    tables = {phase: [(most, of_phase[phase, label]) for most, label in ranges] for phase, ranges in choices.items()}
    labels = dict.fromkeys(label for ranges in choices.values() for _, label in ranges)

    def chosen(args: tuple) -> Candidate:
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
    return " | ".join(labels), by_rows, into if has_into else None


def named(run: Callable) -> Callable:
    """With a name, which a graph's code needs of what it calls and a partial has not."""

    def call(*args):
        return run(*args)

    return call
