"""Tables of the command line: what the fields alone do not say. Flags without a field: flag_rows.py."""

from __future__ import annotations

from fuseline.api.flag_rows import QUANTIZATIONS, Row, unimplemented
from fuseline.api.flag_rows import ROWS as SETTLED

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model hf_config_path served_model_name task download_dir revision code_revision tokenizer tokenizer_revision "
        "skip_tokenizer_init trust_remote_code config_format load_format model_loader_extra_config quantization "
        "activation_dtype ignore_patterns hf_overrides rope_scaling rope_theta dtype "
        "max_model_len disable_sliding_window generation_config override_generation_config device seed"
    ).split(),
    "compiler": (
        "compilation_config skip_model_check enforce_eager batch_invariant max_seq_len_to_capture wait_compiled "
        "disabled_passes cpu_threads cache_dir"
    ).split(),
    "memory and scheduling": (
        "kv_cache_dtype calculate_kv_scales block_size enable_prefix_caching gpu_memory_utilization "
        "kv_cache_memory_bytes num_gpu_blocks_override state_snapshot_share swap_space "
        "preemption_mode cpu_offload_gb "
        "max_num_batched_tokens max_num_seqs max_num_queued_reqs scheduler_cls scheduling_policy "
        "scheduler_delay_factor async_scheduling "
        "enable_chunked_prefill chunked_prefill_size max_num_partial_prefills max_long_partial_prefills "
        "long_prefill_token_threshold"
    ).split(),
    "chat and answers": (
        "chat_template chat_template_content_format default_chat_template_kwargs trust_request_chat_template "
        "enable_auto_tool_choice tool_call_parser tool_parser_plugin enable_reasoning reasoning_parser "
        "exclude_tools_when_tool_choice_none guided_decoding_backend structured_outputs_config "
        "response_role logits_processor_pattern strict_requests "
        "return_tokens_as_token_ids max_logprobs logprobs_mode enable_prompt_tokens_details "
        "enable_force_include_usage stream_interval"
    ).split(),
    "server": (
        "host port uds api_key uvicorn_log_level allow_credentials allowed_origins allowed_methods "
        "allowed_headers ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs ssl_ciphers enable_ssl_refresh root_path "
        "middleware disable_frontend_multiprocessing enable_sleep_mode enable_request_id_headers disable_fastapi_docs "
        "enable_tokenizer_info_endpoint enable_server_load_tracking shutdown_timeout "
        "sse_keep_alive_interval metrics_prefix"
    ).split(),
    "bounds of a request": (
        "max_request_bytes max_prompt_bytes max_num_prompts max_n max_messages max_stored_responses "
        "max_stop_strings max_stop_length "
        "max_logit_bias max_bad_words max_stop_token_ids max_token_rules prompt_workers prompt_timeout prompt_memory "
        "h11_max_incomplete_event_size h11_max_header_count max_pipelined_requests request_header_timeout "
        "grammar_timeout grammar_memory grammar_cache_bytes grammar_workers "
        "request_body_timeout request_body_min_rate keep_alive_timeout response_write_timeout"
    ).split(),
    "logging": (
        "enable_log_requests disable_log_requests max_log_len enable_log_outputs log_error_stack disable_log_stats "
        "disable_uvicorn_access_log disable_access_log_for_endpoints otlp_traces_endpoint collect_detailed_traces"
    ).split(),
}
"""Help groups in order; every field that is a flag is in exactly one (a test checks it)."""

NOT_FLAGS = frozenset((
    "engine compile cache scheduler graphs grammars level recorded weight_format gives_hidden takes_embeds dev_mode "
    "logging_level logging_config_path otlp_protocol fits_context"
).split())
"""Fields without a flag: nested configs, what -O decides, what the environment sets, what has one value a target, what
no endpoint uses."""

ENGINE_GROUPS = ("model", "compiler", "memory and scheduling")
"""Groups that also apply where there is no server: `fuseline run`, `fuseline explain`."""

SHORT_NAMES = {
    "compilation_config": ("-O", "-cc"),
    "quantization": ("-q",),
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "data_parallel_size_local": ("-dpl",),
    "data_parallel_rank": ("-dpn",),
    "data_parallel_start_rank": ("-dpr",),
    "data_parallel_address": ("-dpa",),
    "data_parallel_rpc_port": ("-dpp",),
    "data_parallel_backend": ("-dpb",),
    "data_parallel_hybrid_lb": ("-dph",),
    "data_parallel_external_lb": ("-dpe",),
    "decode_context_parallel_size": ("-dcp",),
    "prefill_context_parallel_size": ("-pcp",),
    "api_server_count": ("-asc",),
    "enable_expert_parallel": ("-ep",),
    "nnodes": ("-n",),
    "node_rank": ("-r",),
    "attention_config": ("-ac",),
    "speculative_config": ("-sc",),
    "speculative_draft_tensor_parallel_size": ("-spec-draft-tp",),
}

CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("auto", "half", "float16", "bfloat16", "float", "float32"),
    "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e5m2", "fp8_e4m3", "int8"),
    "block_size": (8, 16, 32, 64, 128, 256),
    "scheduling_policy": ("fcfs", "priority"),
    "config_format": ("auto", "hf", "mistral"),
    "quantization": (*QUANTIZATIONS, "mxfp4", "modelopt_fp4", "auto-round", "inc", "int8", "int4"),
    "activation_dtype": ("auto", "int8", "fp8"),
    "load_format": tuple(
        "auto pt safetensors npcache dummy tensorizer sharded_state gguf bitsandbytes mistral runai_streamer".split()
    ),
}
"""Choices of fields whose annotation is a plain str or int."""

JSON_LISTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
BOOL_VALUES = frozenset({"enable_chunked_prefill"})
"""Booleans that also take an explicit true or false."""
HUMAN_INTS = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
"""Integers that take a suffix: 8k is 8000, 8K is 8192; m, M, g, G likewise. For max_model_len auto is -1."""
REPEATABLE = frozenset({"api_key", "middleware", "ignore_patterns"})
"""Many-valued flags that take one value each time they are given, so that none swallows the positional MODEL."""
SECRETS = frozenset({"api_key", "hf_token"})

LATER_CHOICES: dict[str, dict[str, str]] = {
    "task": dict.fromkeys("embedding embed classify score reward transcription".split(), "use generate or auto"),
    "runner": dict.fromkeys(("pooling", "draft"), "use generate or auto"),
    "convert": dict.fromkeys(("embed", "classify", "reward"), "use none or auto"),
    "tokenizer_mode": {
        "mistral": "mistral_common is not installed; use auto",
        "custom": "no tokenizer class is registered; use auto",
    },
}
"""field -> choice -> cure, for choices that exist by specification but not yet here."""

CPU_CHOICES: dict[str, dict[str, str]] = {"kv_cache_dtype": {"int8": "use fp8"}}
"""field -> choice -> cure, for choices that a GPU does not have."""

GPU_ONLY: dict[str, str] = {
    "max_seq_len_to_capture": "no device graphs are captured on a CPU",
    "swap_space": "on a CPU there is nothing to swap to",
    "preemption_mode": "on a CPU there is nothing to swap to",
    "cpu_offload_gb": "on a CPU the weights are in host memory already",
    "calculate_kv_scales": "on a CPU a cache of fp8 takes the checkpoint's scales, and one of int8 scales each token",
}
"""field -> why it does nothing on a CPU."""

MISSING_DEVICES = {
    "neuron": "no Neuron runtime found (neuronx-distributed is not installed)",
    "openvino": "no OpenVINO runtime found",
    "tpu": "no TPU runtime found (torch_xla is not installed)",
    "xpu": "no XPU runtime found",
    "hpu": "no Gaudi runtime found",
}


def _laters(part: str, names: str, is_switch: bool = False) -> dict[str, Row]:
    return unimplemented(part, "bool" if is_switch else "str", names)


LATER: dict[str, Row] = {
    **_laters("tool calling and reasoning", "tool_server reasoning_parser_plugin"),
    **_laters("logits processors", "logits_processors"),
    **_laters(
        "structured output",
        "guided_decoding_disable_fallback guided_decoding_disable_any_whitespace "
        "guided_decoding_disable_additional_properties",
        is_switch=True,
    ),
}
"""Flags of parts that are being built."""

ROWS: dict[str, Row] = {**LATER, **SETTLED}
"""All flags without a field: parsed, checked and shown; any value that would change something warns or is refused."""
