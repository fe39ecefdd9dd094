"""Values as given -> `ServerConfig`: one pure function that fills in defaults and resolves `auto`, then freezes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from fuseline.api import cli_tables as tables
from fuseline.api.cli_flags import CONFIGS, all_flags, converter
from fuseline.api.config import ConfigError, Environment, JsonObject, ServerConfig, find_checkpoint
from fuseline.api.config_aliases import without_aliases
from fuseline.api.config_check import check, refuse_unavailable
from fuseline.api.config_context import find_context
from fuseline.api.config_levels import explicit_levels, graph_config, level_values
from fuseline.api.config_levels import without_effect as idle_keys
from fuseline.api.flag_rows import ALIASES
from fuseline.compile.config import CompileConfig
from fuseline.compile.overrides import merged
from fuseline.compile.target import likely_kind
from fuseline.engine.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig

CPU_PREFILL_SIZE = 128
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def resolve(values: Mapping[str, object], environment: Environment | None = None) -> ServerConfig:
    """Make the configuration from values by field name (those given only; "" is unset).

    Reads no more than the checkpoint's JSON files. Raises ConfigError with one line.
    """
    environment = environment or Environment()
    asked = _given(values)
    refuse_unavailable(asked)
    given = _with_environment(without_aliases(asked), environment)
    levels = explicit_levels(_items(given.get("compilation_config", ()), "level"))
    model, folder = str(given.get("model") or "demo"), str(given.get("download_dir", ""))
    revision = str(given.get("revision", ""))
    cache = str(given.get("cache_dir", ""))
    checkpoint = find_checkpoint(model, folder, revision, cache)
    given["hf_config_path"] = _config_folder(given, folder)
    given |= level_values(levels, given) | {"graphs": graph_config(levels, given)}
    tokenizer = str(given.get("tokenizer") or "")
    if tokenizer or given.get("tokenizer_revision"):
        default = revision if tokenizer in ("", model) else ""
        wanted = str(given.get("tokenizer_revision", default))
        given["tokenizer"] = find_checkpoint(tokenizer or model, folder, wanted, cache)
    given |= _prefill_values(given) | _context_values(checkpoint, given, environment)
    if backend := dict(given.get("structured_outputs_config", ())).get("backend"):
        given["guided_decoding_backend"] = str(backend)
    own = _fields_of(ServerConfig, given) | {
        "engine": _engine(given, checkpoint),
        "model": model,
        "compilation_config": tuple(levels.items()),
        "served_model_name": given.get("served_model_name") or (model,),
        "recorded": tuple((name, _recorded(name, asked, row.default)) for name, row in tables.ROWS.items()),
    }
    config = ServerConfig(**own)
    check(config)
    return config


def _config_folder(given: Mapping[str, object], download_dir: str) -> str:
    """Directory of --hf-config-path; empty without the flag. Raises ConfigError."""
    path = str(given.get("hf_config_path", ""))
    try:
        return find_checkpoint(path, download_dir) if path else ""
    except ConfigError as error:
        raise ConfigError(f"--hf-config-path: {error}") from error


def _recorded(name: str, asked: Mapping[str, object], default: object) -> object:
    """The value of a flag without a field; nobody needs a secret one."""
    return "***" if name in tables.SECRETS and name in asked else asked.get(name, default)


def without_effect(config: ServerConfig) -> list[str]:
    """One line for each given flag that has no effect here, for the start-up log."""
    lines = [
        f"--{name.replace('_', '-')} has no effect: {tables.ROWS[name].note}"
        for name, value in config.recorded
        if name not in ALIASES and not tables.ROWS[name].changes_nothing(value)
    ]
    if config.revision and Path(config.model).is_dir():
        lines.append("--revision has no effect: the model is a directory")
    kind, shown = likely_kind(config.engine.device), config_dict(config)
    if kind == "cpu":
        defaults = {item.name: item.default for part in CONFIGS for item in fields(part)}
        lines += [
            f"--{name.replace('_', '-')} has no effect: {why}"
            for name, why in tables.GPU_ONLY.items()
            if shown[name] != defaults[name]
        ]
    if idle := idle_keys(dict(config.compilation_config), kind):
        lines.append(f"--compilation-config: no effect on this device: {', '.join(idle)}")
    return lines


def config_dict(config: ServerConfig) -> dict[str, object]:
    """The flat, resolved configuration as --print-config and /server_info show it; secrets are hidden."""
    compile_config, engine = config.engine.compile, config.engine
    flat: dict[str, object] = {}
    for part in (compile_config, engine.scheduler, engine.cache, engine.grammars, engine, config):
        flat |= {item.name: getattr(part, item.name) for item in fields(part)}
    flat |= dict(config.recorded)
    for name in ("engine", "compile", "cache", "scheduler", "graphs", "grammars", "recorded"):
        del flat[name]
    flat["model"], flat["model_path"] = config.model, compile_config.model
    for name in tables.SECRETS:
        flat[name] = "***" if flat[name] else None
    for name, flag in all_flags().items():
        if flag.kind in ("json", "levels", "pairs"):
            flat[name] = dict(flat[name] or ())
    return dict(sorted(flat.items()))


def _given(values: Mapping[str, object]) -> dict[str, object]:
    """Drop unset values; freeze lists and JSON objects. Unknown names are an error."""
    if unknown := sorted(set(values) - set(all_flags())):
        raise ConfigError(f"unknown setting {unknown[0]!r}; the names are those of the flags of fuseline serve")
    kept = {name: _parsed(name, value) for name, value in values.items() if value is not None and value != ""}
    return {name: _frozen(value) for name, value in kept.items() if value != ""}


def _parsed(name: str, value: object) -> object:
    """Text given from Python is what it is on the command line."""
    flag = all_flags()[name]
    if not isinstance(value, str) or (flag.kind == "str" and not flag.choices):
        return value
    if flag.kind in ("many", "json-list") and not value.startswith("["):
        return (value,)
    try:
        return converter(flag)(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag.option}: {error}") from error


def _frozen(value: object) -> object:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _items(value: object, key: str) -> JsonObject:
    """A plain value stands for {key: value}."""
    return value if isinstance(value, tuple) else ((key, value),)


def _with_environment(given: dict[str, object], environment: Environment) -> dict[str, object]:
    """Flag > environment > default."""
    found: dict[str, object] = {"dev_mode": environment.server_dev_mode == "1"}
    if environment.batch_invariant == "1":
        found["batch_invariant"] = True
    if environment.api_key:
        found["api_key"] = (environment.api_key,)
    if environment.cache_root:
        found["cache_dir"] = environment.cache_root
    if environment.logging_level:
        found["logging_level"] = environment.logging_level.upper()
    if environment.logging_config_path:
        found["logging_config_path"] = environment.logging_config_path
    if environment.otel_exporter_otlp_traces_protocol:
        found["otlp_protocol"] = environment.otel_exporter_otlp_traces_protocol
    if environment.cpu_kvcache_space and "num_gpu_blocks_override" not in given:
        found["kv_cache_memory_bytes"] = _gib(environment.cpu_kvcache_space)
    return {**found, **given}


def _gib(text: str) -> int:
    try:
        return int(float(text) * 2**30)
    except ValueError as error:
        raise ConfigError(f"FUSELINE_CPU_KVCACHE_SPACE={text} is no number of GiB") from error


def _context_values(checkpoint: str, given: dict[str, object], environment: Environment) -> dict[str, object]:
    """The context length, checked against the model's, and the token budget that depends on it."""
    overrides, scaling = dict(given.get("hf_overrides", ())), dict(given.get("rope_scaling", ()))
    config_dir = str(given["hf_config_path"] or checkpoint)
    context = find_context(config_dir, overrides, scaling, str(given.get("tokenizer", "") or checkpoint),
                           str(given.get("config_format", "auto")))  # fmt: skip
    limit = context.limit
    if given.get("disable_sliding_window") and context.window:
        limit = min(limit or context.window, context.window)
    asked = int(given.get("max_model_len", 0))
    values: dict[str, object] = {"max_model_len": limit if asked in (-1, 0) else asked, "fits_context": asked == -1}
    if limit and asked > limit:
        if environment.allow_long_max_model_len != "1" or limit < context.limit:
            message = f"--max-model-len {asked} is above the model's limit of {limit}"
            raise ConfigError(message + " (FUSELINE_ALLOW_LONG_MAX_MODEL_LEN=1 allows it, at the cost of sense)")
        values["hf_overrides"] = tuple(merged(overrides, context.override(asked)).items())
    if given.get("enable_chunked_prefill", True) is False and "max_num_batched_tokens" not in given:
        values["max_num_batched_tokens"] = max(values["max_model_len"], 2048)
    return values


def _prefill_values(given: Mapping[str, object]) -> dict[str, object]:
    """A CPU computes prompts in short steps: they take no longer in all, and streams and later prompts wait less."""
    decided = {"chunked_prefill_size", "max_num_batched_tokens"} & set(given)
    is_whole = decided or given.get("enable_chunked_prefill", True) is False
    is_cpu = likely_kind(str(given.get("device", "auto"))) == "cpu"
    return {"chunked_prefill_size": CPU_PREFILL_SIZE} if is_cpu and not is_whole else {}


def _engine(given: dict[str, object], checkpoint: str) -> EngineConfig:
    values = dict(given)
    for name in ("dtype", "kv_cache_dtype"):
        if name in values:
            values[name] = DTYPE_ALIASES.get(str(values[name]), values[name])
    if not values.get("max_num_queued_reqs"):
        values["max_num_queued_reqs"] = 4 * int(values.get("max_num_seqs", SchedulerConfig.max_num_seqs))
    compile_config = CompileConfig(**{**_fields_of(CompileConfig, values), "model": checkpoint})
    return EngineConfig(
        **_fields_of(EngineConfig, values),
        compile=compile_config,
        cache=CacheConfig(**_fields_of(CacheConfig, values)),
        scheduler=SchedulerConfig(**_fields_of(SchedulerConfig, values)),
        grammars=GrammarConfig(**_fields_of(GrammarConfig, values)),
    )


def _fields_of(config: type, values: Mapping[str, object]) -> dict[str, object]:
    return {item.name: values[item.name] for item in fields(config) if item.name in values}
