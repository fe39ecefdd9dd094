"""Tables of the command line: what the fields alone do not say, flags that only validate, flags of later parts."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model served_model_name task download_dir tokenizer skip_tokenizer_init trust_remote_code load_format "
        "hf_overrides dtype max_model_len generation_config override_generation_config device seed"
    ).split(),
    "compiler": (
        "compilation_config skip_model_check enforce_eager batch_invariant max_seq_len_to_capture wait_compiled "
        "disabled_passes cpu_threads cache_dir"
    ).split(),
    "memory and scheduling": (
        "kv_cache_dtype calculate_kv_scales block_size enable_prefix_caching gpu_memory_utilization "
        "kv_cache_memory_bytes num_gpu_blocks_override swap_space preemption_mode cpu_offload_gb "
        "max_num_batched_tokens max_num_seqs max_num_queued_reqs scheduling_policy async_scheduling "
        "enable_chunked_prefill chunked_prefill_size max_num_partial_prefills max_long_partial_prefills "
        "long_prefill_token_threshold"
    ).split(),
    "chat and answers": (
        "chat_template chat_template_content_format default_chat_template_kwargs "
        "response_role return_tokens_as_token_ids max_logprobs logprobs_mode enable_prompt_tokens_details "
        "enable_force_include_usage stream_interval"
    ).split(),
    "server": (
        "host port api_key uvicorn_log_level allow_credentials allowed_origins allowed_methods "
        "allowed_headers ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs root_path middleware "
        "disable_frontend_multiprocessing enable_sleep_mode enable_request_id_headers disable_fastapi_docs "
        "enable_server_load_tracking shutdown_timeout sse_keep_alive_interval metrics_prefix"
    ).split(),
    "bounds of a request": (
        "max_request_bytes max_prompt_bytes max_num_prompts max_n max_messages max_stop_strings max_stop_length "
        "max_logit_bias max_bad_words max_stop_token_ids max_token_rules prompt_workers prompt_timeout prompt_memory "
        "h11_max_incomplete_event_size h11_max_header_count max_pipelined_requests request_header_timeout "
        "request_body_timeout request_body_min_rate keep_alive_timeout response_write_timeout"
    ).split(),
    "logging": "disable_log_requests max_log_len enable_log_outputs disable_log_stats".split(),
}
"""Help groups in order; every field that is a flag is in exactly one (a test checks it)."""

NOT_FLAGS = frozenset((
    "engine compile cache scheduler graphs level recorded weight_format gives_hidden takes_embeds dev_mode "
    "logging_level logging_config_path"
).split())
"""Fields without a flag: nested configs, what -O decides, what the environment sets, what has one value a target, what
no endpoint uses."""

ENGINE_GROUPS = ("model", "compiler", "memory and scheduling")
"""Groups that also apply where there is no server: `fuseline run`, `fuseline explain`."""

SHORT_NAMES = {
    "compilation_config": ("-O",),
    "quantization": ("-q",),
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "speculative_draft_tensor_parallel_size": ("-spec-draft-tp",),
}

CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("auto", "half", "float16", "bfloat16", "float", "float32"),
    "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e5m2", "fp8_e4m3"),
    "block_size": (8, 16, 32, 64, 128, 256),
    "scheduling_policy": ("fcfs", "priority"),
    "load_format": tuple(
        "auto pt safetensors npcache dummy tensorizer sharded_state gguf bitsandbytes mistral runai_streamer".split()
    ),
}
"""Choices of fields whose annotation is a plain str or int."""

JSON_LISTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
BOOL_VALUES = frozenset({"enable_chunked_prefill", "use_v2_block_manager", "multi_step_stream_outputs"})
"""Booleans that also take an explicit true or false."""
HUMAN_INTS = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
"""Integers that take a suffix: 8k is 8000, 8K is 8192; m, M, g, G likewise."""
REPEATABLE = frozenset({"api_key", "middleware"})
"""Many-valued flags that take one value each time they are given, so that none swallows the positional MODEL."""
SECRETS = frozenset({"api_key"})

LATER_CHOICES: dict[str, dict[str, str]] = {
    "load_format": dict.fromkeys(
        "npcache tensorizer sharded_state gguf bitsandbytes mistral runai_streamer".split(),
        "use auto, safetensors, pt or dummy",
    ),
    "task": dict.fromkeys("embedding embed classify score reward transcription".split(), "use generate or auto"),
}
"""field -> choice -> cure, for choices that exist by specification but not yet here."""

GPU_CHOICES: dict[str, dict[str, str]] = {
    "kv_cache_dtype": dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), "use float32, bfloat16, float16 or auto"),
}
"""field -> choice -> cure, for choices that a CPU does not have."""

GPU_ONLY: dict[str, str] = {
    "max_seq_len_to_capture": "no device graphs are captured on a CPU",
    "swap_space": "on a CPU there is nothing to swap to",
    "preemption_mode": "on a CPU there is nothing to swap to",
    "cpu_offload_gb": "on a CPU the weights are in host memory already",
    "calculate_kv_scales": "a cache of fp8 needs a GPU",
}
"""field -> why it does nothing on a CPU."""

MISSING_DEVICES = {
    "neuron": "no Neuron runtime found (neuronx-distributed is not installed)",
    "openvino": "no OpenVINO runtime found",
    "tpu": "no TPU runtime found (torch_xla is not installed)",
    "xpu": "no XPU runtime found",
    "hpu": "no Gaudi runtime found",
}


@dataclass(frozen=True)
class Recorded:
    """A flag that is checked and shown in the configuration and has no other effect on this device."""

    default: object
    note: str
    choices: tuple[object, ...] = ()
    minimum: float | None = None


RECORDED: dict[str, Recorded] = {
    "model_impl": Recorded(
        "auto", "every model is the captured Transformers model", ("auto", "fuseline", "vllm", "transformers")
    ),
    "use_v2_block_manager": Recorded(True, "deprecated: there is one block manager"),
    "num_lookahead_slots": Recorded(0, "blocks are taken as tokens come", minimum=0),
    "num_scheduler_steps": Recorded(1, "every step is scheduled", minimum=1),
    "multi_step_stream_outputs": Recorded(True, "every step is streamed"),
    "disable_async_output_proc": Recorded(False, "output is processed in another process"),
    "disable_custom_all_reduce": Recorded(False, "there is one worker"),
    "override_neuron_config": Recorded((), "only for Neuron"),
    "additional_config": Recorded((), "this platform has no extras"),
    "tokenizer_pool_type": Recorded("ray", "the pool size is 0"),
    "tokenizer_pool_extra_config": Recorded((), "the pool size is 0"),
}


@dataclass(frozen=True)
class Later:
    """A flag of a later part: any value but the neutral ones is refused in words."""

    part: str
    neutral: tuple[str, ...] = ("", "none")
    is_switch: bool = False
    takes_many: bool = False


def _laters(part: str, names: str, **settings: object) -> dict[str, Later]:
    return {name: Later(part, **settings) for name in names.split()}


LATER: dict[str, Later] = {
    **_laters("LoRA and prompt adapters", "lora_modules prompt_adapters", takes_many=True),
    **_laters(
        "LoRA and prompt adapters",
        "enable_lora enable_lora_bias fully_sharded_loras enable_prompt_adapter",
        is_switch=True,
    ),
    **_laters(
        "LoRA and prompt adapters",
        "max_loras max_lora_rank lora_extra_vocab_size lora_dtype long_lora_scaling_factors max_cpu_loras "
        "max_prompt_adapters max_prompt_adapter_token qlora_adapter_name_or_path",
    ),
    **_laters("tool calling and reasoning", "enable_auto_tool_choice enable_reasoning", is_switch=True),
    **_laters("tool calling and reasoning", "reasoning_parser tool_call_parser tool_parser_plugin"),
    **_laters("templates of requests", "trust_request_chat_template", is_switch=True),
    **_laters("reloading certificates", "enable_ssl_refresh", is_switch=True),
    **_laters("downloading models", "revision code_revision tokenizer_revision ignore_patterns"),
    **_laters("other tokenizers and formats", "tokenizer_mode config_format", neutral=("auto", "hf")),
    **_laters("other tokenizers and formats", "model_loader_extra_config rope_scaling rope_theta"),
    **_laters("tokenizer workers", "tokenizer_pool_size", neutral=("0",)),
    **_laters(
        "structured output",
        "guided_decoding_backend logits_processor_pattern structured_outputs_config logits_processors",
    ),
    **_laters(
        "multimodal input",
        "limit_mm_per_prompt mm_processor_kwargs allowed_local_media_path allowed_media_domains",
    ),
    **_laters("multimodal input", "disable_mm_preprocessor_cache", is_switch=True),
    **_laters("embeddings and pooling", "override_pooler_config"),
    **_laters("scheduling", "scheduler_delay_factor", neutral=("0", "0.0")),
    **_laters("scheduling", "scheduler_cls kv_transfer_config"),
    **_laters("memory", "disable_sliding_window", is_switch=True),
    **_laters(
        "parallelism",
        "tensor_parallel_size pipeline_parallel_size data_parallel_size api_server_count",
        neutral=("1",),
    ),
    **_laters("parallelism", "distributed_executor_backend", neutral=("mp", "uni", "", "none")),
    **_laters("parallelism", "worker_cls", neutral=("auto", "")),
    **_laters("parallelism", "max_parallel_loading_workers"),
    **_laters("parallelism", "ray_workers_use_nsight enable_expert_parallel", is_switch=True),
    **_laters("quantization", "quantization"),
    **_laters(
        "speculative decoding",
        "speculative_model speculative_model_quantization num_speculative_tokens "
        "speculative_draft_tensor_parallel_size speculative_max_model_len speculative_disable_by_batch_size "
        "ngram_prompt_lookup_max ngram_prompt_lookup_min spec_decoding_acceptance_method "
        "typical_acceptance_sampler_posterior_threshold typical_acceptance_sampler_posterior_alpha "
        "disable_logprobs_during_spec_decoding speculative_config",
    ),
    **_laters("speculative decoding", "speculative_disable_mqa_scorer", is_switch=True),
    **_laters("tracing", "otlp_traces_endpoint collect_detailed_traces show_hidden_metrics_for_version"),
    **_laters("unix sockets", "uds"),
}
