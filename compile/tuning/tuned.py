"""Cached tuning results of this machine: a choice for each problem, as JSON.

A problem is a frozen dataclass of JSON types; the file is named by everything that the measurements depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import TypeVar

from fuseline.compile.cache.files import CacheError
from fuseline.compile.cache.store import cache_path, read_cached, write_cached
from fuseline.compile.config import CompileConfig, Progress

Problem = TypeVar("Problem")
Choice = TypeVar("Choice")
MIN_GAIN = 0.03
"""Smallest measured gain that counts; less may be noise."""


def measured_once(
    config: CompileConfig, key: str, problems: Sequence[Problem], choose: Callable[[Problem], Choice],
    is_choice: Callable[[Problem, object], bool], progress: Progress,
) -> dict[Problem, Choice]:  # fmt: skip
    """The result of `choose` per problem, cached. Calls `progress` with ("tuning", done, all) while measuring."""
    path = cache_path(config, "tuned", key)
    choices = read_cached(path, lambda body: parse(body, problems, is_choice), "it is measured again")
    if choices is None:
        choices = {}
        for done, problem in enumerate(problems):
            progress("tuning", done, len(problems))
            choices[problem] = choose(problem)
        progress("tuning", len(problems), len(problems))
        write_cached(path, lambda: body_of(choices.items()))
    return choices


def body_of(choices: Iterable[tuple[object, object]]) -> bytes:
    return json.dumps([[*astuple(problem), choice] for problem, choice in choices]).encode()


def parse(
    body: bytes, problems: Sequence[Problem], is_choice: Callable[[Problem, object], bool]
) -> dict[Problem, object]:
    """Parses cached choices. Raises CacheError."""
    try:
        found = {tuple(fields): choice for *fields, choice in json.loads(body)}
    except (ValueError, TypeError) as error:
        raise CacheError("it holds no choices") from error
    wanted = {astuple(problem): problem for problem in problems}
    if set(found) != set(wanted):
        raise CacheError("it holds other problems")
    choices = {wanted[fields]: choice for fields, choice in found.items()}
    if not all(is_choice(problem, choice) for problem, choice in choices.items()):
        raise CacheError("it holds no choices")
    return choices
