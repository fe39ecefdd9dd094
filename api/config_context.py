"""Context length of a checkpoint, read from its files as Transformers and the reference server read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fuseline.api.config import ConfigError
from fuseline.compile.overrides import CONTEXT_KEYS, merged
from fuseline.compile.stored_config import ConfigFileError, read_stored_config

MODEL_KEY = "model_max_length"
"""In config.json (Command-R) it wins over the others."""
FIXED_ROPES = ("default", "llama3", "longrope", "su", "mrope", "proportional", "axial")
"""Kinds whose factor says nothing about the context that config.json states."""
SCALED_MODELS = ("gemma3", "gemma3_text")
"""Models whose config.json states the context after scaling."""
TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Objects of config.json that may tell about the language model."""
WINDOW_KEYS = ("sliding_window", "window_size")
CHOSEN_KEYS = ("index_topk", "keep_window_size")
"""Numbers of keys that each query chooses: longer sequences, of which some would be left out, are not supported."""
NO_LIMIT = 1e15
"""Tokenizers without a limit store 1e30."""


@dataclass(frozen=True)
class Context:
    """Context length that a checkpoint's files state; 0 if none does. `key`: where config.json states it."""

    limit: int
    key: str = ""
    window: int = 0
    """Sliding window in tokens; 0 for none."""
    part: str = ""
    """The object of config.json that holds the key, or its path (thinker_config.text_config); empty: config.json."""

    def override(self, length: int) -> dict[str, object]:
        """The override of config.json that states another length."""
        own: dict[str, object] = {self.key: length} if self.key else {}
        for name in reversed(self.part.split(".") if self.part and own else []):
            own = {name: own}
        return own


def find_context(
    folder: str, overrides: Mapping[str, object], rope_scaling: Mapping[str, object] | None = None,
    tokenizer: str = "", config_format: str = "auto",
) -> Context:  # fmt: skip
    """`folder` holds config.json, and the tokenizer's files unless `tokenizer` does; `rope_scaling` replaces the
    checkpoint's. Raises ConfigError for files that cannot be read.
    """
    whole = merged(read_config_json(folder, config_format), overrides)
    part, inner = _text_part(whole)
    config = {**whole, **inner}
    window = next((int(n) for key in WINDOW_KEYS if (n := _number(config.get(key)))), 0)
    window = 0 if config.get("use_sliding_window") is False else window
    own = _stated(config)
    if own is None:
        return Context(_unstated(str(config.get("model_type", "")), tokenizer or folder), "", window)
    key, length = own
    scaling = rope_scaling or config.get("rope_parameters") or config.get("rope_scaling")
    if not rope_scaling and config.get("model_type") in SCALED_MODELS:
        scaling = None
    part = part if key in inner else ""
    chosen = [number for name in CHOSEN_KEYS if (number := _number(config.get(name)))]
    return Context(int(min([_scaled(length, scaling, config), *chosen])), key, window, part)


def _text_part(whole: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """Path and content of the object about the language model, which may lie in another one (Qwen-Omni's thinker)."""
    parts = {name: value for name, value in whole.items() if isinstance(value, Mapping)}
    if name := next((name for name in TEXT_PARTS if name in parts), ""):
        return name, parts[name]
    deeper = [(f"{outer}.{name}", value.get(name)) for outer, value in parts.items() for name in TEXT_PARTS]
    return next(((path, value) for path, value in deeper if isinstance(value, Mapping)), ("", {}))


def _stated(config: Mapping[str, object]) -> tuple[str, float] | None:
    if length := _number(config.get(MODEL_KEY)):
        return MODEL_KEY, length
    found = [(key, length) for key in CONTEXT_KEYS if (length := _number(config.get(key)))]
    return min(found, key=lambda item: item[1]) if found else None


def _unstated(model_type: str, tokenizer: str) -> int:
    """Context where config.json is silent: the tokenizer's, but no more than the model type's default."""
    settings = read_json_file(Path(tokenizer) / "tokenizer_config.json")
    stored = _number(settings.get(MODEL_KEY)) if isinstance(settings, dict) else None
    if stored is None or stored >= NO_LIMIT:
        return 0
    from transformers import CONFIG_MAPPING  # takes a second, and most files are not silent

    known = model_type in CONFIG_MAPPING and _stated(CONFIG_MAPPING[model_type]().get_text_config().to_dict())
    return int(min(stored, known[1])) if known else int(stored)


def _scaled(length: float, scaling: object, config: Mapping[str, object]) -> float:
    """The context after rope scaling; of several layer types the largest."""
    if not isinstance(scaling, Mapping):
        return length
    nested = [value for value in scaling.values() if isinstance(value, Mapping)]
    return max((_scaled_by(length, rope, config) for rope in nested or [scaling]), default=length)


def _scaled_by(length: float, rope: Mapping[str, object], config: Mapping[str, object]) -> float:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = _number(rope.get("factor"))
    if kind in FIXED_ROPES or not factor:
        return length
    if kind == "yarn":
        original = _number(rope.get("original_max_position_embeddings"))
        return (original or _number(config.get("original_max_position_embeddings")) or length) * factor
    return length * factor


def _number(value: object) -> float | None:
    """A finite number above 0; null, true and text are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None


def read_config_json(checkpoint: str, config_format: str = "auto") -> dict:
    """Raises ConfigError."""
    try:
        return read_stored_config(checkpoint, config_format)
    except ConfigFileError as error:
        raise ConfigError(str(error)) from error


def read_json_file(path: Path) -> dict:
    """The content of a file, {} where there is none. Raises ConfigError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
