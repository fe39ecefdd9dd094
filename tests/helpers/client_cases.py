"""What the tests of each vendor's client ask of the bundled model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
FORECAST = [{"role": "user", "content": "What is the weather in Paris?"}]
SUM = [{"role": "user", "content": "What is 12 plus 7?"}]
CITY_SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER = {
    "type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY_SCHEMA},
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "get_weather"}}
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 80}


class Size(BaseModel):
    """A size in one of two units."""

    unit: Literal["cm", "inch"]
    large: bool
