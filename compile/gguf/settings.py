"""Settings of a GGUF file by the names that they have without the architecture's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.compile.gguf.header import GgufError


class Settings:
    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._prefix = settings, f"{settings.get('general.architecture')}."

    def number(self, name: str, default: float | None = None) -> Any:
        """A number, or that of all layers. Raises GgufError if there is none and no default, or layers differ."""
        value = self._settings.get(self._prefix + name, default)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise GgufError(f"its {self._prefix + name} differs from layer to layer, which is not supported")
            value = value[0]
        if not isinstance(value, int | float):
            raise GgufError(f"its {self._prefix + name} is {'missing' if value is None else repr(value)}: it must be "
                            "a number; get the file again")  # fmt: skip
        return value

    def text(self, name: str) -> str:
        return str(self._settings.get(self._prefix + name, ""))

    def token(self, name: str) -> int | None:
        """The id of a special token."""
        value = self._settings.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else None
