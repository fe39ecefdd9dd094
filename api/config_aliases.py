"""Other names of settings (flag_rows.ALIASES) and what the settings themselves mean together."""

from __future__ import annotations

from collections.abc import Mapping

from fuseline.api.config import ConfigError

LEVEL_KEYS = ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
"""Flags that are keys of --compilation-config."""


def without_aliases(given: Mapping[str, object]) -> dict[str, object]:
    """The values under the names of their fields. Raises ConfigError for two that contradict each other."""
    values = dict(given)
    if (wants := given.get("enable_log_requests")) is not None:
        _set(values, "disable_log_requests", not wants, "--enable-log-requests")
    if values.get("disable_log_requests") is False:  # --no-disable-log-requests
        values["enable_log_requests"] = True
    if path := given.get("log_config_file"):
        values["logging_config_path"] = path
    if size := given.get("tokenizer_pool_size"):
        _set(values, "prompt_workers", size, "--tokenizer-pool-size")
    if given.get("disable_uvicorn_metrics_access_log"):
        paths = str(given.get("disable_access_log_for_endpoints", ""))
        values["disable_access_log_for_endpoints"] = ",".join(filter(None, (paths, "/health,/metrics")))
    levels = _level_keys(given)
    if levels:
        known = given.get("compilation_config", ())
        values["compilation_config"] = tuple({**levels, **(dict(known) if known else {})}.items())
    return values


def _level_keys(given: Mapping[str, object]) -> dict[str, object]:
    found = {name: given[name] for name in LEVEL_KEYS if given.get(name)}
    if sizes := given.get("cuda_graph_sizes"):
        found.setdefault("cudagraph_capture_sizes", sizes)
    if "cudagraph_capture_sizes" in found:
        found["cudagraph_capture_sizes"] = [_size(text) for text in found["cudagraph_capture_sizes"]]
    if (level := given.get("optimization_level")) is not None:
        found["level"] = level
    return found


def _size(text: object) -> int:
    try:
        return int(str(text))
    except ValueError as error:
        raise ConfigError(f"--cudagraph-capture-sizes: {text!r} is no whole number") from error


def _set(values: dict[str, object], name: str, value: object, alias: str) -> None:
    if values.setdefault(name, value) != value:
        raise ConfigError(f"{alias} contradicts --{name.replace('_', '-')}; give one of them")
