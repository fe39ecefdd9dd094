"""Names of grammar backends: NAME[:no-fallback] (SPEC 8.4).

xgrammar compiles every grammar; guidance, outlines and lm-format-enforcer name the same compiler here, as long as a
fallback is allowed.
"""

from __future__ import annotations

import logging

from fuseline.api.errors import bad_request

LOG = logging.getLogger("fuseline.prompts")
BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer", "auto", "guidance")
OPTIONS = ("no-fallback",)
NATIVE = ("xgrammar", "auto")


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


def choose_backend(text: str, kind: str, param: str) -> str:
    """The backend that compiles a grammar of this kind. Raises ApiError 400."""
    try:
        name, has_fallback = parse_backend(text)
    except ValueError as error:
        raise bad_request(f"{param}: {error}", param) from error
    if name not in NATIVE:
        if not has_fallback:
            message = f"{param}: {name} is not part of this server, and no-fallback excludes xgrammar"
            raise bad_request(message, param, "unsupported_value")
        LOG.warning("%s of %s: xgrammar compiles it", kind, name)
    return "xgrammar"
