"""Logging of the server process."""

from __future__ import annotations

import json
import logging
import logging.config
from pathlib import Path

from fuseline.api.config import ConfigError, ServerConfig, variables_without_effect
from fuseline.api.config_resolve import without_effect

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def configure_logging(config: ServerConfig) -> None:
    """Apply FUSELINE_LOGGING_LEVEL or FUSELINE_LOGGING_CONFIG_PATH, then name what flags do not say by themselves."""
    if config.logging_config_path:
        load_logging_config(config.logging_config_path)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
        logger = logging.getLogger("fuseline")
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(config.logging_level)
    log = logging.getLogger("fuseline.config")
    if config.enable_sleep_mode:
        log.info("sleep mode: level 1 gives back the KV memory (a GPU's weights move to the host), 2 the weights too")
    for line in [*without_effect(config), *variables_without_effect()]:
        log.warning(line)


class PathFilter(logging.Filter):
    """Drops the HTTP server's access lines of some paths (comma separated)."""

    def __init__(self, paths: str) -> None:
        super().__init__()
        self._paths = {path.strip() for path in paths.split(",") if path.strip()}

    def filter(self, record: logging.LogRecord) -> bool:
        """uvicorn's arguments: client address, method, path with its query, HTTP version, status."""
        is_access = isinstance(record.args, tuple) and len(record.args) == 5
        return not (is_access and str(record.args[2]).partition("?")[0] in self._paths)


def load_logging_config(path: str) -> None:
    """Raises ConfigError for a file that logging.config.dictConfig does not take."""
    try:
        logging.config.dictConfig(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"FUSELINE_LOGGING_CONFIG_PATH={path} is no logging configuration: {error}") from error
