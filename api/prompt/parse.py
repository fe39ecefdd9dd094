"""Validation of a parsed body, and errors in the words of the client's own fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fuseline.api.errors import ApiError, bad_request, field_path, to_api_error
from fuseline.api.protocol.common import FieldError

Body = TypeVar("Body", bound=BaseModel)


def validate(fields: Mapping[str, Any], kind: type[Body]) -> Body:
    """Raises ApiError 400 for the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, FieldError):
            raise bad_request(str(inner), field_path((*first["loc"], inner.param))) from error
        raise to_api_error(error) from error


def validate_part(fields: Mapping[str, Any], kind: type[Body], where: str) -> Body:
    """A part of a body, at the path `where`. Raises ApiError 400."""
    try:
        return validate(fields, kind)
    except ApiError as error:
        param = f"{where}.{error.param}" if error.param else where
        raise bad_request(f"{where}.{error.message}" if error.param else f"{where}: {error.message}", param) from error


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields that the client has sent: each of `names`, longest first, stands for another one."""
    try:
        yield
    except ApiError as error:
        error.param = _renamed(error.param or "", names, r"^") or None
        error.message = _renamed(error.message, names, r"(?<![\w.])")
        raise


def _renamed(text: str, names: Mapping[str, str], before: str) -> str:
    """Names of one word are renamed at the beginning alone: they may be words of a sentence."""
    for old in sorted(names, key=len, reverse=True):
        place = before if "_" in old else r"^"
        text, count = re.subn(rf"{place}{re.escape(old)}(?!\w)", names[old], text)
        if count and before == "^":
            break
    return text
