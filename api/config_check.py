"""Rules that one field alone cannot state. Each broken one is a ConfigError of one line with cause and cure."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fuseline.api import cli_tables as tables
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.config_refusals import refuse_combination
from fuseline.api.flag_rows import Row
from fuseline.api.prompt.backends import check_installed
from fuseline.api.tracing import why_not
from fuseline.compile.target import DeviceError, likely_kind

MINIMA: dict[str, float] = {
    "max_model_len": 0, "cpu_threads": 0, "max_num_batched_tokens": 1, "max_num_seqs": 1, "max_num_queued_reqs": 0,
    "scheduler_delay_factor": 0, "max_num_partial_prefills": 1, "max_long_partial_prefills": 1,
    "long_prefill_token_threshold": 0, "swap_space": 0,
    "chunked_prefill_size": 0, "cpu_offload_gb": 0, "kv_cache_memory_bytes": 1, "num_gpu_blocks_override": 1,
    "max_logprobs": -1, "stream_interval": 1, "port": 0, "max_seq_len_to_capture": 1, "shutdown_timeout": 0,
    "sse_keep_alive_interval": 0, "max_log_len": 0, "h11_max_incomplete_event_size": 1024, "h11_max_header_count": 8,
    "max_pipelined_requests": 1, "request_header_timeout": 0.1, "request_body_timeout": 0.1,
    "request_body_min_rate": 1, "keep_alive_timeout": 0, "response_write_timeout": 0.1,
    "max_num_prompts": 1, "max_n": 1, "max_stop_strings": 0, "max_stop_length": 1,
    "max_logit_bias": 0, "max_bad_words": 0, "max_stop_token_ids": 0, "max_request_bytes": 1, "max_prompt_bytes": 1,
    "max_messages": 1, "max_stored_responses": 0, "max_token_rules": 0,
    "prompt_workers": 0, "prompt_timeout": 0.1, "prompt_memory": 64 * 2**20,
    "grammar_timeout": 0.1, "grammar_memory": 64 * 2**20, "grammar_cache_bytes": 0, "grammar_workers": 1,
}  # fmt: skip


def refuse_unavailable(given: Mapping[str, object]) -> None:
    """Refuse what exists by specification only, or not on this machine, before anything is looked up on disk."""
    kind = _find_kind(str(given.get("device", "auto")))
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if cure := tables.LATER_CHOICES.get(name, {}).get(str(value)):
            raise ConfigError(f"{flag} {value}: not yet supported; {cure}")
        if kind != "cpu" and (cure := tables.CPU_CHOICES.get(name, {}).get(str(value))):
            raise ConfigError(f"{flag} {value} needs a CPU (--device cpu); on a GPU {cure}")
        if name in tables.ROWS and not tables.ROWS[name].changes_nothing(value):
            _check_row(flag, tables.ROWS[name], value)
            refuse_combination(name, value, given)
            _refuse_row(flag, tables.ROWS[name], value)
        elif name not in tables.ROWS:
            refuse_combination(name, value, given)


def _find_kind(device: str) -> str:
    """cpu or cuda."""
    if device in tables.MISSING_DEVICES:
        present = ", ".join(dict.fromkeys((likely_kind("auto"), "cpu")))
        raise ConfigError(f"--device {device}: {tables.MISSING_DEVICES[device]}. Available devices: {present}.")
    try:
        return likely_kind(device)
    except DeviceError as error:
        raise ConfigError(str(error)) from error


def _check_row(flag: str, row: Row, value: object) -> None:
    if row.choices and value not in row.choices:
        raise ConfigError(f"{flag} {value}: choose from {', '.join(map(str, row.choices))}")
    if row.minimum is not None and not float(value) >= row.minimum:
        raise ConfigError(f"{flag} {value}: must be at least {row.minimum}")


def _refuse_row(flag: str, row: Row, value: object) -> None:
    if row.fate == "unimplemented":
        raise ConfigError(f"{flag}: not yet supported ({row.note}); leave it out")
    if row.fate == "refused":
        raise ConfigError(f"{flag}: {row.note}")


def check(config: ServerConfig) -> None:
    """Apply every rule that needs no weights."""
    for rule in RULES:
        rule(config)


def _minima(config: ServerConfig) -> None:
    engine = config.engine
    for part in (config, engine, engine.cache, engine.scheduler, engine.grammars, engine.compile):
        for name, minimum in MINIMA.items():
            value = getattr(part, name, None)
            if value is not None and (math.isnan(value) or value < minimum):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")


def _grammar_backend(config: ServerConfig) -> None:
    unknown = sorted(set(dict(config.structured_outputs_config)) - {"backend"})
    if unknown:
        raise ConfigError(f"--structured-outputs-config: unknown key {unknown[0]!r} (backend)")
    try:
        check_installed(config.guided_decoding_backend)
    except ValueError as error:
        raise ConfigError(f"--guided-decoding-backend: {error}") from error


def _ranges(config: ServerConfig) -> None:
    if config.port > 65535:
        raise ConfigError(f"--port {config.port}: must be at most 65535")
    theta = config.engine.compile.rope_theta
    if theta is not None and not 0 < theta < math.inf:
        raise ConfigError(f"--rope-theta {theta}: must be a number above 0")
    if not 0 < config.engine.cache.gpu_memory_utilization <= 1:
        fraction = config.engine.cache.gpu_memory_utilization
        raise ConfigError(f"--gpu-memory-utilization {fraction}: must be above 0 and at most 1")
    if not 0 <= config.engine.cache.state_snapshot_share < 1:
        share = config.engine.cache.state_snapshot_share
        raise ConfigError(f"--state-snapshot-share {share}: must be at least 0 and below 1")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if config.engine.cache.swap_space > 0.7 * memory and config.engine.cache.swap_space != 4.0:
        space = config.engine.cache.swap_space
        raise ConfigError(f"--swap-space {space} GiB is more than 70 % of this machine's {memory:.1f} GiB of memory")
    if config.engine.cache.preemption_mode not in ("recompute", "swap"):
        raise ConfigError(f"--preemption-mode {config.engine.cache.preemption_mode}: choose from recompute, swap")
    try:
        re.compile(config.logits_processor_pattern)
    except re.error as error:
        raise ConfigError(f"--logits-processor-pattern is no regular expression: {error}") from error
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*[:_]", config.metrics_prefix):
        raise ConfigError(f"--metrics-prefix {config.metrics_prefix!r}: letters, digits and _, ending in : or _")


def _token_budget(config: ServerConfig) -> None:
    scheduler, length = config.engine.scheduler, config.engine.compile.max_model_len
    budget = scheduler.max_num_batched_tokens
    if budget < scheduler.max_num_seqs:
        message = f"--max-num-batched-tokens {budget} is below --max-num-seqs {scheduler.max_num_seqs}"
        raise ConfigError(message + "; a step needs a token for each sequence")
    if not scheduler.enable_chunked_prefill and budget < length:
        message = f"--max-num-batched-tokens {budget} is below --max-model-len {length}"
        raise ConfigError(message + "; without chunked prefill a prompt must fit one step")
    if scheduler.chunked_prefill_size and not scheduler.enable_chunked_prefill:
        raise ConfigError(f"--chunked-prefill-size {scheduler.chunked_prefill_size} needs chunked prefill")


def _partial_prefills(config: ServerConfig) -> None:
    scheduler = config.engine.scheduler
    partial, long = scheduler.max_num_partial_prefills, scheduler.max_long_partial_prefills
    if partial > 1 and not scheduler.enable_chunked_prefill:
        raise ConfigError(f"--max-num-partial-prefills {partial} needs chunked prefill")
    if long > partial:
        raise ConfigError(f"--max-long-partial-prefills {long} is above --max-num-partial-prefills {partial}")
    threshold, length = scheduler.long_prefill_token_threshold, config.engine.compile.max_model_len
    if length and threshold > length:
        raise ConfigError(f"--long-prefill-token-threshold {threshold} is above --max-model-len {length}")


def _files(config: ServerConfig) -> None:
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "logging_config_path"):
        path = getattr(config, name)
        if path and not os.path.isfile(path):
            raise ConfigError(f"--{name.replace('_', '-')}: there is no file {path}")
    if bool(config.ssl_keyfile) != bool(config.ssl_certfile):
        raise ConfigError("HTTPS needs both --ssl-keyfile and --ssl-certfile")
    for name in ("enable_ssl_refresh", "ssl_ca_certs", "ssl_ciphers"):
        if getattr(config, name) and not config.ssl_certfile:
            raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-keyfile and --ssl-certfile")
    if config.ssl_cert_reqs and not config.ssl_ca_certs:
        raise ConfigError("--ssl-cert-reqs above 0 needs --ssl-ca-certs to verify clients with")
    generation = config.generation_config
    if generation not in ("", "none", "vllm", "auto") and not os.path.isdir(generation):
        choices = "auto: the model's; none, vllm: no defaults"
        raise ConfigError(f"--generation-config: there is no directory {generation} ({choices})")
    if os.path.isdir(generation) and not os.path.isfile(os.path.join(generation, "generation_config.json")):
        raise ConfigError(f"--generation-config: {generation} holds no generation_config.json")


def _template(config: ServerConfig) -> None:
    template = config.chat_template
    is_text = any(mark in template for mark in "{}\n")
    if config.trust_request_chat_template and not config.prompt_workers:
        raise ConfigError("--trust-request-chat-template needs --prompt-workers above 0, which bound what it may take")
    if template and not is_text and not os.path.isfile(template) and template not in _template_names(config):
        raise ConfigError(f"--chat-template: {template} is neither a file nor a template")


def _template_names(config: ServerConfig) -> list[str]:
    """Names of the tokenizer's templates, where it has several."""
    folder = Path(config.tokenizer_dir)
    names = [path.stem for path in folder.glob("additional_chat_templates/*.jinja")]
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return names  # what is wrong with the file is said when it is loaded
    return names + [str(item["name"]) for item in stored] if isinstance(stored, list) else names


def _parsers(config: ServerConfig) -> None:
    switches = config.enable_auto_tool_choice or config.enable_reasoning
    if not (switches or config.tool_call_parser or config.tool_parser_plugin or config.reasoning_parser):
        return
    # Imported only here: most servers have no parsers, and all check their configuration.
    from fuseline.api.parsers.registry import reasoning_parser_names, tool_parser_names

    names = tool_parser_names(config.tool_parser_plugin)
    if config.enable_auto_tool_choice and not config.tool_call_parser:
        raise ConfigError(f"--enable-auto-tool-choice needs --tool-call-parser, one of {', '.join(names)}")
    if config.tool_call_parser and config.tool_call_parser not in names:
        raise ConfigError(f"--tool-call-parser {config.tool_call_parser}: choose from {', '.join(names)}")
    names = reasoning_parser_names()
    if config.enable_reasoning and not config.reasoning_parser:
        raise ConfigError(f"--enable-reasoning needs --reasoning-parser, one of {', '.join(names)}")
    if config.reasoning_parser and config.reasoning_parser not in names:
        raise ConfigError(f"--reasoning-parser {config.reasoning_parser}: choose from {', '.join(names)}")


def _tracing(config: ServerConfig) -> None:
    endpoint = config.otlp_traces_endpoint
    if endpoint and (reason := why_not(endpoint, config.otlp_protocol)):
        raise ConfigError(f"--otlp-traces-endpoint {endpoint}: {reason}")


def _logging(config: ServerConfig) -> None:
    if config.logging_level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigError(f"FUSELINE_LOGGING_LEVEL={config.logging_level}: DEBUG, INFO, WARNING, ERROR or CRITICAL")


RULES: tuple[Callable[[ServerConfig], None], ...] = (
    _minima, _ranges, _grammar_backend, _token_budget, _partial_prefills, _files, _template, _parsers, _tracing,
    _logging,
)  # fmt: skip
