"""Bytes of a body to its validated fields."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fuseline.api.errors import bad_request, to_api_error
from fuseline.api.protocol.common import FieldError

Body = TypeVar("Body", bound=BaseModel)


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError 400, RecursionError for one that is nested too deeply."""
    try:
        fields = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise bad_request("the body holds half of a surrogate pair, which is no text") from error
    except ValueError as error:
        raise bad_request(f"the body is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    return fields


def validate(fields: dict[str, Any], kind: type[Body]) -> Body:
    """Raises ApiError 400 for the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        inner = error.errors(include_url=False, include_input=False)[0].get("ctx", {}).get("error")
        if isinstance(inner, FieldError):
            raise bad_request(str(inner), inner.param) from error
        raise to_api_error(error) from error
