"""Validation of a parsed body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fuseline.api.errors import ApiError, bad_request, to_api_error
from fuseline.api.protocol.common import FieldError

Body = TypeVar("Body", bound=BaseModel)


def validate(fields: dict[str, Any], kind: type[Body]) -> Body:
    """Raises ApiError 400 for the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        inner = error.errors(include_url=False, include_input=False)[0].get("ctx", {}).get("error")
        if isinstance(inner, FieldError):
            raise bad_request(str(inner), inner.param) from error
        raise to_api_error(error) from error


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields that the client has sent: each prefix of `names` stands for another one."""
    try:
        yield
    except ApiError as error:
        head, *rest = re.split(r"(?=[.\[])", error.param or "", maxsplit=1)
        if head in names:
            error.param = names[head] + "".join(rest)
        raise
