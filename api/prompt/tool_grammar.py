"""The JSON schema that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.protocol.chat import ChatRequest

ANY_OBJECT: dict[str, Any] = {"type": "object"}
CHOICES = ("anyOf", "oneOf", "allOf")
DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties", "dependentSchemas")
VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values are data and no schemas."""


def constrain(body: ChatRequest, use: ToolUse) -> None:
    """Let the request's tools decide its answer, where the client has not left that to the model."""
    schema = answer_schema(use)
    if schema is not None:
        body.guided_json = schema


def answer_schema(use: ToolUse) -> dict[str, Any] | None:
    """JSON schema of the whole answer: the arguments of the named function, or a list of calls; None asks for none."""
    if use.choice == "named":
        return _arguments(use.tools[0])
    if use.choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = [_call(tool, _Moved(f"tool{k}", definitions)) for k, tool in enumerate(use.tools)]
    most = {} if use.is_parallel else {"maxItems": 1}
    schema = {"type": "array", "minItems": 1, **most, "items": calls[0] if len(calls) == 1 else {"anyOf": calls}}
    return {**schema, "$defs": definitions} if definitions else schema


def _call(tool: Tool, moved: _Moved) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [tool.name]}, "parameters": moved.root(_arguments(tool))},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    schema = tool.parameters or ANY_OBJECT
    return schema if any(key in schema for key in ("type", "$ref", *CHOICES)) else {**ANY_OBJECT, **schema}


class _Moved:
    """A schema as part of another one, whose definitions it moves to the top under names of its own."""

    def __init__(self, name: str, definitions: dict[str, Any]) -> None:
        self._name, self._definitions = name, definitions
        self._refers_to_root = False

    def root(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        for key in DEFINITIONS:
            for name, inner in (schema.get(key) or {}).items():
                self._definitions[f"{self._name}.{name}"] = self._value(inner)
        moved = self._value({key: value for key, value in schema.items() if key not in (*DEFINITIONS, "$schema")})
        if self._refers_to_root:
            self._definitions[self._name] = moved
        return moved

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        return {key: inner if key in VALUES else self._entry(key, inner) for key, inner in value.items()}

    def _entry(self, key: str, value: Any) -> Any:
        if key in NAMED and isinstance(value, dict):  # whose keys are names and no keywords
            return {name: self._value(inner) for name, inner in value.items()}
        if key != "$ref" or not isinstance(value, str) or not value.startswith("#"):
            return self._value(value)
        _, _, path = value.partition("#/")
        first, _, rest = path.partition("/")
        if first in DEFINITIONS:
            return f"#/$defs/{self._name}.{rest}"
        self._refers_to_root = True
        return f"#/$defs/{self._name}/{path}".rstrip("/")
