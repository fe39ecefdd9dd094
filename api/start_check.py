"""What a start refuses before any weight is read: tried by the server as it starts, and by --print-config alone."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from fuseline.api.certificates import check_tls
from fuseline.api.cli_log import load_logging_config
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.middleware import load_middleware
from fuseline.api.parsers.parsing import build_parsing
from fuseline.api.prompt.chat import template_text
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.template_check import check_template
from fuseline.api.served import generation_defaults, load_tokenizer
from fuseline.compile.gguf.table import TABLE

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "sentencepiece*", "tekken*", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors*", "*.bin", "*.bin.index.json", "*.pt", "*.tensors", TABLE)
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path, on Linux."""


def try_start(config: ServerConfig) -> None:
    """All that a start would refuse, but for what the model itself shows. Raises ConfigError that names the flag.

    Files of weights and of the tokenizer are looked at where there are any: a checkpoint may still be on its way.
    """
    _try_address(config)
    if config.logging_config_path:
        load_logging_config(config.logging_config_path)
    _try_model(config)
    folder = Path(config.tokenizer_dir)
    is_missing = config.tokenizer_dir == config.engine.compile.model and not _holds(folder, TOKENIZER_FILES)
    try_parts(replace(config, skip_tokenizer_init=True) if is_missing else config)


def try_parts(config: ServerConfig) -> TextTokenizer | None:
    """The tokenizer, after a trial of every part but the engine. Raises ConfigError that names the flag."""
    for path in config.middleware:
        load_middleware(path)
    generation_defaults(config)
    check_tls(config)
    tokenizer = _load_tokenizer(config)
    text = template_text(config.chat_template, tokenizer.chat_template if tokenizer else None)
    if text:
        _try_template(config, text, tokenizer)
    build_parsing(config, tokenizer, text)
    return tokenizer


def _load_tokenizer(config: ServerConfig) -> TextTokenizer | None:
    try:
        return load_tokenizer(config)
    except ConfigError as error:
        raise ConfigError(f"{'--tokenizer: ' if config.tokenizer else ''}{error}") from error


def _try_template(config: ServerConfig, text: str, tokenizer: TextTokenizer | None) -> None:
    try:
        check_template(config, text, tokenizer.special_tokens if tokenizer else {})
    except ConfigError as error:
        cure = "" if config.chat_template else " (--chat-template gives another one)"
        raise ConfigError(f"{'--chat-template: ' if config.chat_template else ''}{error}{cure}") from error


def _try_address(config: ServerConfig) -> None:
    """The port may be another server's for now; the address must be one of this machine."""
    from fuseline.api.server import bind, cannot_listen

    if config.uds:
        return _try_socket_path(Path(config.uds))
    try:
        bind(replace(config, port=0)).close()
    except OSError as error:
        raise ConfigError(cannot_listen(config, error)) from error


def _try_socket_path(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(f"--uds: the path of a socket may have {MAX_SOCKET_PATH} bytes")
    if not path.parent.is_dir():
        raise ConfigError(f"--uds: there is no directory {path.parent}")
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"--uds: {path} is there and is no socket")


def _try_model(config: ServerConfig) -> None:
    """config.json as Transformers reads it, and the headers of the weights."""
    from fuseline.compile.capture.errors import CaptureError, LoadError
    from fuseline.compile.capture.hf_classes import auto_class
    from fuseline.compile.capture.hf_model import load_config
    from fuseline.compile.capture.load_formats import try_weights

    settings = config.engine.compile
    folder = Path(settings.model)
    try:
        has_weights = _holds(folder, WEIGHT_FILES)
        # How the weights are stored is told by files that may still be on their way.
        found = load_config(settings if has_weights else replace(settings, quantization=None))
        auto_class(found, settings.trust_remote_code)
        if settings.load_format != "dummy" and has_weights:
            try_weights(settings)
    except LoadError as error:
        flag = "" if settings.load_format == "auto" else f"--load-format {settings.load_format}: "
        raise ConfigError(f"{flag}{error}") from error
    except CaptureError as error:
        raise ConfigError(str(error)) from error


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return any(any(folder.glob(name)) for name in names)
