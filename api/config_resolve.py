"""Values as given -> `ServerConfig`: one pure function that fills in defaults and resolves `auto`, then freezes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from fuseline.api import cli_tables as tables
from fuseline.api.config import ConfigError, Environment, JsonObject, ServerConfig, find_checkpoint
from fuseline.api.config_check import check, refuse_unavailable
from fuseline.api.config_levels import graph_config, level_values
from fuseline.api.config_levels import without_effect as idle_keys
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import likely_kind
from fuseline.engine.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig

CONFIGS = (ServerConfig, EngineConfig, CacheConfig, SchedulerConfig, GrammarConfig, CompileConfig)
JSON_OBJECTS = (
    "hf_overrides", "override_generation_config", "compilation_config", "default_chat_template_kwargs",
    "additional_config", "override_neuron_config", "tokenizer_pool_extra_config",
    "structured_outputs_config",
)  # fmt: skip
CPU_PREFILL_SIZE = 128
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx",
)  # fmt: skip


def resolve(values: Mapping[str, object], environment: Environment | None = None) -> ServerConfig:
    """Make the configuration from values by field name (those given only; "" is unset).

    Reads no more than the checkpoint's config.json. Raises ConfigError with one line.
    """
    given = _with_environment(_given(values), environment or Environment())
    refuse_unavailable(given)
    levels = dict(_items(given.get("compilation_config", 2), "level"))
    model = str(given.get("model") or "demo")
    folder = str(given.get("download_dir", ""))
    checkpoint = find_checkpoint(model, folder)
    given |= level_values(levels, given) | {"graphs": graph_config(levels, given)}
    given |= _prefill_values(given) | _context_values(checkpoint, given, environment or Environment())
    if backend := dict(given.get("structured_outputs_config", ())).get("backend"):
        given["guided_decoding_backend"] = str(backend)
    engine = _engine(given, checkpoint)
    own = _fields_of(ServerConfig, given) | {
        "engine": engine,
        "model": model,
        "compilation_config": tuple(levels.items()),
        "served_model_name": given.get("served_model_name") or (model,),
        "recorded": tuple((name, given.get(name, row.default)) for name, row in tables.RECORDED.items()),
    }
    if tokenizer := own.get("tokenizer"):
        own["tokenizer"] = find_checkpoint(str(tokenizer), folder)
    config = ServerConfig(**own)
    check(config)
    return config


def without_effect(config: ServerConfig) -> list[str]:
    """One line for each given flag that has no effect here, for the start-up log."""
    lines = [
        f"--{name.replace('_', '-')} has no effect: {tables.RECORDED[name].note}"
        for name, value in config.recorded
        if value != tables.RECORDED[name].default
    ]
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
    for name in JSON_OBJECTS:
        flat[name] = dict(flat[name])
    flat |= {name: _neutral_value(later) for name, later in tables.LATER.items()}
    return dict(sorted(flat.items()))


def _neutral_value(later: tables.Later) -> object:
    if later.is_switch:
        return False
    text = later.neutral[0]
    return int(text) if text.isdigit() else text or None


def _given(values: Mapping[str, object]) -> dict[str, object]:
    """Drop unset values; freeze lists and JSON objects. Unknown names are an error."""
    known = {item.name for config in CONFIGS for item in fields(config)} | set(tables.RECORDED) | set(tables.LATER)
    known -= tables.NOT_FLAGS
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown setting {unknown[0]!r}; the names are those of the flags of fuseline serve")
    kept = {name: value for name, value in values.items() if value is not None and value != ""}
    return {name: _frozen(value) for name, value in kept.items()}


def _frozen(value: object) -> object:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _items(value: object, key: str) -> JsonObject:
    """A plain value stands for {key: value}; the key comes first."""
    items = dict(value) if isinstance(value, tuple) else {key: value}
    return tuple({key: items.get(key, 2), **items}.items())


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
    if environment.cpu_kvcache_space and "num_gpu_blocks_override" not in given:
        found["kv_cache_memory_bytes"] = _gib(environment.cpu_kvcache_space)
    if isinstance(given.get("api_key"), str):
        given = {**given, "api_key": (given["api_key"],)}
    if isinstance(given.get("served_model_name"), str):
        given = {**given, "served_model_name": (given["served_model_name"],)}
    return {**found, **given}


def _gib(text: str) -> int:
    try:
        return int(float(text) * 2**30)
    except ValueError as error:
        raise ConfigError(f"FUSELINE_CPU_KVCACHE_SPACE={text} is no number of GiB") from error


def _context_values(checkpoint: str, given: dict[str, object], environment: Environment) -> dict[str, object]:
    """Check the context length asked for against the model's, and the token budget that depends on it."""
    overrides = dict(given.get("hf_overrides", ()))
    limit, key = context_limit(checkpoint, overrides)
    asked = int(given.get("max_model_len", 0))
    values: dict[str, object] = {}
    if limit and asked > limit:
        if environment.allow_long_max_model_len != "1":
            message = f"--max-model-len {asked} is above the model's limit of {limit}"
            raise ConfigError(message + " (FUSELINE_ALLOW_LONG_MAX_MODEL_LEN=1 allows it, at the cost of sense)")
        values["hf_overrides"] = tuple({**overrides, key: asked}.items())
    if given.get("enable_chunked_prefill", True) is False and "max_num_batched_tokens" not in given:
        values["max_num_batched_tokens"] = max(asked or limit, 2048)
    return values


def _prefill_values(given: Mapping[str, object]) -> dict[str, object]:
    """A CPU computes prompts in short steps: they take no longer in all, and streams and later prompts wait less."""
    decided = {"chunked_prefill_size", "max_num_batched_tokens"} & set(given)
    is_whole = decided or given.get("enable_chunked_prefill", True) is False
    is_cpu = likely_kind(str(given.get("device", "auto"))) == "cpu"
    return {"chunked_prefill_size": CPU_PREFILL_SIZE} if is_cpu and not is_whole else {}


def context_limit(checkpoint: str, overrides: Mapping[str, object]) -> tuple[int, str]:
    """(Context length that config.json states, its key); (0, "") when it states none."""
    config = read_config_json(checkpoint) | overrides
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for source in (config, inner):
        for key in CONTEXT_KEYS:
            if isinstance(source.get(key), int):
                return max(source[key], _scaled_context(source)), key
    return 0, ""


def _scaled_context(config: Mapping) -> int:
    """Context of yarn and its kin: the original one times the factor."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    original = scaling.get("original_max_position_embeddings") if factor else None
    return int(original * factor) if original else 0


def read_config_json(checkpoint: str) -> dict:
    path = Path(checkpoint) / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{checkpoint} has no config.json; give a Transformers checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object; give a Transformers checkpoint")
    return content


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
