"""The one table of flags that only validate, warn or refuse: parsed and shown like all others, with no code path.

A flag moves out of here when a field of a configuration dataclass takes it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Fate = Literal["ignored", "unimplemented", "refused"]
Names = str | Mapping[str, object]
"""Names of flags, or their defaults by name."""


@dataclass(frozen=True)
class Row:
    """One flag. `kind` is one of those of cli_flags.Flag, or pairs (k=v,k=v) or floats (a,b)."""

    fate: Fate
    """What a value other than the default meets: ignored warns, the others refuse."""
    note: str
    """ignored: why it does nothing. unimplemented: the part it waits for. refused: cause and cure."""
    kind: str = "str"
    default: object = None
    choices: tuple[object, ...] = ()
    minimum: float | None = None
    neutral: tuple[str, ...] = ()
    """Further values, in lower case, that change nothing."""

    def changes_nothing(self, value: object) -> bool:
        if self.kind == "pairs" and not any(count for _, count in value):
            return True
        return value == self.default or str(value).lower() in (*self.neutral, "", "none")


def rows(fate: Fate, note: str, kind: str, names: Names, **more: object) -> dict[str, Row]:
    defaults = names if isinstance(names, Mapping) else dict.fromkeys(names.split(), _default(kind))
    return {name: Row(fate, note, kind, default, **more) for name, default in defaults.items()}


def ignored(note: str, kind: str, names: Names, **more: object) -> dict[str, Row]:
    return rows("ignored", note, kind, names, **more)


def unimplemented(note: str, kind: str, names: Names, **more: object) -> dict[str, Row]:
    return rows("unimplemented", note, kind, names, **more)


def refused(note: str, kind: str, names: Names, **more: object) -> dict[str, Row]:
    return rows("refused", note, kind, names, **more)


def _default(kind: str) -> object:
    return {"bool": False, "json": (), "many": (), "pairs": (), "floats": ()}.get(kind)


QUANTIZATIONS = tuple(
    "aqlm awq awq_marlin deepspeedfp tpu_int8 fp8 ptpc_fp8 fbgemm_fp8 modelopt marlin gguf gptq_marlin_24 gptq_marlin "
    "gptq compressed-tensors bitsandbytes qqq hqq experts_int8 neuron_quant ipex quark moe_wna16".split()
)

LORA, SPECULATION, MEDIA = "LoRA and prompt adapters", "speculative decoding", "multimodal input"
DEVICES, POOLING = "several devices", "embeddings and pooling"

IGNORED: dict[str, Row] = {
    **ignored("every model is the captured Transformers model", "str", {"model_impl": "auto"},
        choices=("auto", "fuseline", "vllm", "transformers")),
    **ignored("tokenizers of Transformers are fast ones, with the same ids", "str", {"tokenizer_mode": "auto"},
        choices=("auto", "hf", "slow", "mistral", "custom")),
    **ignored("the model generates text", "str", {"runner": "auto"}, choices=("auto", "generate", "pooling", "draft"),
        neutral=("generate",)),
    **ignored("the model is served as it is", "str", {"convert": "auto"},
        choices=("auto", "none", "embed", "classify", "reward")),
    **ignored("deprecated: there is one block manager", "bool-value", {"use_v2_block_manager": True}),
    **ignored("blocks are taken as tokens come", "int", {"num_lookahead_slots": 0}, minimum=0),
    **ignored("every step is scheduled", "int", {"num_scheduler_steps": 1}, minimum=1),
    **ignored("every step is streamed", "bool-value", {"multi_step_stream_outputs": True}),
    **ignored("output is processed in another process", "bool", "disable_async_output_proc"),
    **ignored("there is one device", "bool", "disable_custom_all_reduce enable_expert_parallel enable_eplb "
        "data_parallel_hybrid_lb data_parallel_external_lb disable_nccl_for_dp_synchronization enable_dbo "
        "eplb_log_balancedness enable_multimodal_encoder_data_parallel data_parallel_multi_port_external_lb "
        "enable_elastic_ep enable_ep_weight_filter"),
    **ignored("there is one device", "int", "master_port data_parallel_rpc_port data_parallel_rank "
        "data_parallel_start_rank num_redundant_experts eplb_window_size eplb_step_interval "
        "dbo_decode_token_threshold dbo_prefill_token_threshold ubatch_size distributed_timeout_seconds "
        "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size data_parallel_supervisor_port", minimum=0),
    **ignored("there is one device", "float", "data_parallel_probe_interval_s data_parallel_probe_timeout_s",
        minimum=0),
    **ignored("there is one device", "str", {"master_addr": None, "data_parallel_address": None,
        "data_parallel_backend": "mp", "all2all_backend": None,
        "expert_placement_strategy": "linear", "worker_extension_cls": None}),
    **ignored("there is one device", "json", "eplb_config"),
    **ignored("one process reads the weights, in as many threads as there are cores", "int",
        "max_parallel_loading_workers", minimum=1),
    **ignored("weights are read by need, straight into their packed form", "str",
        {"safetensors_load_strategy": "lazy", "pt_load_map_location": "cpu"}),
    **ignored("weights are read by need, straight into their packed form", "str", "safetensors_prefetch_block_size"),
    **ignored("it is --max-num-batched-tokens without speculation", "int", "max_num_scheduled_tokens", minimum=1),
    **ignored("the start always shows its progress on a terminal", "bool", {"use_tqdm_on_load": True}),
    **ignored("only for Neuron", "json", "override_neuron_config"),
    **ignored("this platform has no extras", "json", "additional_config"),
    **ignored("--tokenizer-pool-size is 0", "json", "tokenizer_pool_extra_config"),
    **ignored("kernels are chosen by device, dtype and shape", "str", "attention_backend moe_backend linear_backend"),
    **ignored("kernels are chosen by device, dtype and shape", "json", "attention_config kernel_config"),
    **ignored("one setting serves both", "str", {"performance_mode": "balanced"},
        choices=("balanced", "interactivity", "throughput")),
    **ignored("there is no such kernel", "bool", "disable_cascade_attn kv_sharing_fast_prefill"),
    **ignored("keys of the prefix cache are SHA-256", "str", {"prefix_caching_hash_algo": "sha256"},
        choices=("builtin", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor", "sha256_cbor_64bit")),
    **ignored("no served model has such a state", "str",
        {"mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto", "mamba_cache_mode": "none"}),
    **ignored("no served model has such a state", "int", "mamba_block_size", minimum=1),
    **ignored("groups of layers with windows always have blocks of their own", "bool",
        "disable_hybrid_kv_cache_manager"),
    **ignored("nothing is downloaded", "str", "hf_token"),
    **ignored("no quantization is deprecated here", "bool", "allow_deprecated_quantization"),
    **ignored("lines of the log come from one engine", "bool", "aggregate_engine_logging"),
    **ignored("the text of an answer is logged once, at its end", "bool", {"enable_log_deltas": True}),
    **ignored("no metric is hidden", "str", "show_hidden_metrics_for_version"),
    **ignored("these figures are not measured", "bool", "kv_cache_metrics cudagraph_metrics enable_mfu_metrics "
        "enable_layerwise_nvtx_tracing enable_logging_iteration_details"),
    **ignored("these figures are not measured", "float", {"kv_cache_metrics_sample": 0.01}, minimum=0),
    **ignored("the model takes text only", "bool", "disable_mm_preprocessor_cache disable_chunked_mm_input "
        "interleave_mm_strings skip_mm_profiling enable_mm_embeds mm_encoder_only language_model_only"),
    **ignored("the model takes text only", "float", "mm_processor_cache_gb video_pruning_rate", minimum=0),
    **ignored("the model takes text only", "int", "mm_shm_cache_max_object_size_mb", minimum=1),
    **ignored("the model takes text only", "str", {"mm_processor_cache_type": "lru", "mm_encoder_tp_mode": "weights",
        "mm_encoder_attn_backend": None}),
    **ignored("nothing is compiled for a size of its own", "str", "override_attention_dtype"),
}  # fmt: skip

UNIMPLEMENTED: dict[str, Row] = {
    **unimplemented(LORA, "many", "lora_modules prompt_adapters default_mm_loras lora_target_modules"),
    **unimplemented(LORA, "bool", "enable_lora enable_lora_bias fully_sharded_loras enable_prompt_adapter "
        "enable_tower_connector_lora specialize_active_lora"),
    **unimplemented(LORA, "int", {"max_loras": 1, "max_prompt_adapters": 1, "max_cpu_loras": None}, minimum=1),
    **unimplemented(LORA, "int", {"max_prompt_adapter_token": 0}, minimum=0),
    **unimplemented(LORA, "int", {"max_lora_rank": 16}, choices=(1, 8, 16, 32, 64, 128, 256, 320, 512)),
    **unimplemented(LORA, "int", {"lora_extra_vocab_size": 256}, choices=(0, 256, 512)),
    **unimplemented(LORA, "str", {"lora_dtype": "auto"}, choices=("auto", "float16", "bfloat16")),
    **unimplemented(LORA, "floats", "long_lora_scaling_factors"),
    **unimplemented(LORA, "str", "qlora_adapter_name_or_path"),
    **unimplemented(MEDIA, "pairs", "limit_mm_per_prompt"),
    **unimplemented(MEDIA, "json", "mm_processor_kwargs media_io_kwargs"),
    **unimplemented(MEDIA, "str", "allowed_local_media_path"),
    **unimplemented(MEDIA, "many", "allowed_media_domains"),
    **unimplemented(POOLING, "json", "override_pooler_config pooler_config"),
    **unimplemented(POOLING, "str", "io_processor_plugin"),
    **unimplemented("prompt embeddings", "bool", "enable_prompt_embeds"),
    **unimplemented("routed experts in answers", "bool", "enable_return_routed_experts"),
    **unimplemented("passing the KV cache on", "json", "kv_transfer_config kv_events_config ec_transfer_config "
        "weight_transfer_config"),
    **unimplemented("passing the KV cache on", "float", "kv_offloading_size", minimum=0),
    **unimplemented("passing the KV cache on", "str", "kv_offloading_backend"),
    **unimplemented(DEVICES, "int", dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local",
        "decode_context_parallel_size", "prefill_context_parallel_size", "api_server_count", "nnodes"), 1),
        minimum=1),
    **unimplemented(DEVICES, "int", {"node_rank": 0}, minimum=0),
    **unimplemented(DEVICES, "bool", "headless"),
    **unimplemented(DEVICES, "str", {"distributed_executor_backend": None},
        choices=("ray", "mp", "uni", "external_launcher"), neutral=("mp", "uni")),
    **unimplemented(DEVICES, "str", {"worker_cls": "auto"}),
    **unimplemented(SPECULATION, "str", "speculative_model"),
    **unimplemented(SPECULATION, "str", "speculative_model_quantization", choices=QUANTIZATIONS),
    **unimplemented(SPECULATION, "int", "num_speculative_tokens speculative_max_model_len ngram_prompt_lookup_max "
        "ngram_prompt_lookup_min speculative_draft_tensor_parallel_size", minimum=1),
    **unimplemented(SPECULATION, "int", "speculative_disable_by_batch_size", minimum=2),
    **unimplemented(SPECULATION, "str", {"spec_decoding_acceptance_method": "rejection_sampler"},
        choices=("rejection_sampler", "typical_acceptance_sampler")),
    **unimplemented(SPECULATION, "float", {"typical_acceptance_sampler_posterior_threshold": 0.09,
        "typical_acceptance_sampler_posterior_alpha": 0.3}, minimum=0),
    **unimplemented(SPECULATION, "bool-value", {"disable_logprobs_during_spec_decoding": True}),
    **unimplemented(SPECULATION, "bool", "speculative_disable_mqa_scorer"),
    **unimplemented(SPECULATION, "json", "speculative_config"),
    **unimplemented("profiling", "json", "profiler_config"),
    **unimplemented("gRPC", "bool", "grpc"),
    **unimplemented(POOLING, "bool", "enable_flash_late_interaction"),
    **unimplemented("a page of documentation without network", "bool", "enable_offline_docs"),
}  # fmt: skip

REFUSED: dict[str, Row] = {
    **refused("ray is not used here; leave it out", "bool", "ray_workers_use_nsight"),
}

ALIASES: dict[str, Row] = {
    **ignored("a JSON file for logging.config.dictConfig, as $FUSELINE_LOGGING_CONFIG_PATH", "str", "log_config_file"),
    **ignored("a number above 0 is --prompt-workers", "int", {"tokenizer_pool_size": 0}, minimum=0),
    **ignored("the kind is a process", "str", "tokenizer_pool_type"),
    **ignored("as --disable-access-log-for-endpoints /health,/metrics", "bool", "disable_uvicorn_metrics_access_log"),
    **ignored("as -O", "int", "optimization_level", choices=(0, 1, 2, 3)),
    **ignored("as the key of -O", "many", "cudagraph_capture_sizes cuda_graph_sizes"),
    **ignored("as the key of -O", "int", "max_cudagraph_capture_size", minimum=1),
}
"""Other names of settings; api/config_aliases.py turns them into those."""

ROWS: dict[str, Row] = {**IGNORED, **UNIMPLEMENTED, **REFUSED, **ALIASES}
