"""Validation of a parsed body."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fuseline.api.errors import bad_request, to_api_error
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
