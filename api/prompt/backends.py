"""Names of grammar backends, NAME[:no-fallback] (SPEC 8.4), and what each takes.

xgrammar compiles what another backend cannot, unless the name excludes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.structured.foreign import FORMAT_ENFORCER, OUTLINES, refused_by_guidance, unsupported

LOG = logging.getLogger("fuseline.prompts")
OPTIONS = ("no-fallback",)
NATIVE = ("xgrammar", "auto")


@dataclass(frozen=True)
class Package:
    """A backend that is a package of its own."""

    module: str
    extra: str
    """Of this package's extras, which installs it."""
    kinds: frozenset[str]
    """Forms of grammars that it compiles."""
    refused: Callable[[Any], str]
    """Why it cannot hold a JSON schema; empty if it can."""
    takes_whitespace: bool = True

    @property
    def is_missing(self) -> bool:
        return find_spec(self.module) is None

    @property
    def cure(self) -> str:
        return f"pip install 'fuseline[{self.extra}]'"


REGULAR = frozenset({"json", "regex", "choice"})
PACKAGES: Mapping[str, Package] = MappingProxyType({
    "outlines": Package("outlines_core", "outlines", REGULAR, partial(unsupported, support=OUTLINES)),
    "lm-format-enforcer": Package(
        "lmformatenforcer", "lm-format-enforcer", REGULAR, partial(unsupported, support=FORMAT_ENFORCER),
        takes_whitespace=False,
    ),
    "guidance": Package("llguidance", "guidance", REGULAR | {"json_object", "grammar"}, refused_by_guidance),
})  # fmt: skip
BACKENDS = (*NATIVE, *PACKAGES)


def parse_backend(text: str) -> tuple[str, bool]:
    """(name, whether another backend may take its place). Raises ValueError."""
    name, _, options = text.partition(":")
    given = [option for option in options.split(",") if option]
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r} ({', '.join(BACKENDS)})")
    for option in given:
        if option not in OPTIONS:
            raise ValueError(f"unknown option {option!r} of {name} ({', '.join(OPTIONS)})")
    return name, not given


def check_installed(text: str) -> None:
    """Raises ValueError for a backend without fallback whose package is missing."""
    name, has_fallback = parse_backend(text)
    package = PACKAGES.get(name)
    if package is None or not package.is_missing:
        return
    if not has_fallback:
        raise ValueError(f"{name} is not installed: {package.cure}")
    LOG.warning("%s is not installed, xgrammar takes its place: %s", name, package.cure)


def choose_backend(text: str, kind: str, value: Any, has_whitespace: bool, param: str) -> str:
    """The backend that compiles a grammar of this kind. `has_whitespace`: the request says what stands between tokens
    of JSON. Raises ApiError 400.
    """
    try:
        name, has_fallback = parse_backend(text)
    except ValueError as error:
        raise bad_request(f"{param}: {error}", param) from error
    package = PACKAGES.get(name)
    if package is None:
        return "xgrammar"
    reason = _refusal(package, kind, value, has_whitespace)
    if not reason:
        return name
    if not has_fallback:
        words = f"{param}: {name} cannot be used here, and no-fallback excludes xgrammar: {reason}"
        raise bad_request(words, param, "unsupported_value")
    LOG.warning("%s cannot be used for %s, xgrammar takes its place: %s", name, kind, reason)
    return "xgrammar"


def _refusal(package: Package, kind: str, value: Any, has_whitespace: bool) -> str:
    """Why a package cannot compile a grammar; empty if it can."""
    if package.is_missing:
        return f"it is not installed: {package.cure}"
    if kind not in package.kinds:
        return f"it does not take {kind}"
    if kind == "json" and has_whitespace and not package.takes_whitespace:
        return "it does not take a whitespace pattern"
    reason = package.refused(value) if kind == "json" else ""
    return f"it does not enforce this schema: {reason}" if reason else ""
