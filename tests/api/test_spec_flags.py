"""Every flag of the specification's tables: a value that is taken and shown, and what a wrong one is told."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from fuseline.api.cli import main

NOT_YET = "not yet supported"


@dataclass(frozen=True)
class Good:
    """Arguments that are taken; `shown`: the value that --print-config shows."""

    arguments: str
    shown: object


@dataclass(frozen=True)
class Bad:
    """Arguments that end the start; `words` are in its last line."""

    arguments: str
    status: int
    words: str


def switch(flag: str) -> list[Good]:
    return [Good(flag, True), Good("", False), Good(f"--no-{flag[2:]}", False)]


def choice(flag: str, *choices: str, wrong: str = "wrong") -> list[Good | Bad]:
    return [*(Good(f"{flag} {one}", one) for one in choices), Bad(f"{flag} {wrong}", 2, flag)]


def count(flag: str, least: int, default: object, good: int = 5) -> list[Good | Bad]:
    """A whole number of at least `least`."""
    below = Bad(f"{flag} {least - 1}", 1, f"must be at least {least}")
    return [Good("", default), Good(f"{flag}={good}", good), below, Bad(f"{flag} x", 2, flag)]


def later(arguments: str, default: object = None, *bad: Bad) -> list[Good | Bad]:
    return [Good("", default), Bad(arguments, 1, NOT_YET), *bad]


def only_json(flag: str) -> list[Bad]:
    return [Bad(f"{flag} nope", 2, "no valid JSON"), Bad(f"{flag} [1]", 2, "no JSON object")]


ROWS: dict[str, list[Good | Bad]] = {
    # 20.2
    "host": [Good("", "127.0.0.1"), Good("--host 0.0.0.0", "0.0.0.0"), Good("--host None", "127.0.0.1")],
    "port": [Good("", 8000), Good("--port=0", 0), Bad("--port x", 2, "--port"), Bad("--port 70000", 1, "65535")],
    "uvicorn_log_level": choice("--uvicorn-log-level", "debug", "info", "warning", "error", "critical", "trace"),
    "allow_credentials": switch("--allow-credentials"),
    **{
        f"allowed_{name}": [Good("", ["*"]), Good(f'--allowed-{name} ["a"]', ["a"]),
                            Bad(f"--allowed-{name} nope", 2, "JSON"), Bad(f'--allowed-{name} {{"a":1}}', 2, "list")]
        for name in ("origins", "methods", "headers")
    },
    "api_key": [Good("", None), Good("--api-key a --api-key b", "***")],
    "lora_modules": later("--lora-modules a=b", []),
    "prompt_adapters": later("--prompt-adapters a=b c=d", []),
    "chat_template": [Good("--chat-template {{messages}}", "{{messages}}"),
                      Bad("--chat-template /no/such.jinja", 1, "neither a file nor a template")],
    "chat_template_content_format": choice("--chat-template-content-format", "auto", "string", "openai"),
    "response_role": [Good("", "assistant"), Good("--response-role bot", "bot")],
    **{name: [Good("", ""), Bad(f"--{name.replace('_', '-')} /no/such", 1, "no file /no/such")]
       for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")},
    "enable_ssl_refresh": [Good("", False), Bad("--enable-ssl-refresh", 1, "needs --ssl-keyfile and --ssl-certfile")],
    "ssl_cert_reqs": [Good("", 0), Bad("--ssl-cert-reqs 3", 2, "choose from"), Bad("--ssl-cert-reqs 2", 1, "ca-certs")],
    "root_path": [Good("--root-path /api", "/api")],
    "middleware": [Good("", []), Good("--middleware email.message.Message --middleware wsgiref.util.FileWrapper",
                                  ["email.message.Message", "wsgiref.util.FileWrapper"]),
                   Bad("--middleware a.b", 1, "cannot be imported")],
    **{name: switch("--" + name.replace("_", "-")) for name in (
        "return_tokens_as_token_ids", "disable_frontend_multiprocessing", "enable_request_id_headers",
        "disable_log_requests", "disable_fastapi_docs", "enable_prompt_tokens_details")},
    "max_log_len": [Good("", None), Good("--max-log-len 7", 7), Bad("--max-log-len -1", 1, "at least 0")],
    # 20.3
    "model": [Good("--model demo", "MODEL")],
    "task": [Good("", "auto"), Good("--task generate", "generate"), Bad("--task sing", 2, "choose from"),
             *(Bad(f"--task {one}", 1, "use generate or auto")
               for one in ("embedding", "embed", "classify", "score", "reward", "transcription"))],
    "tokenizer": [Good("--tokenizer MODEL", "MODEL"), Bad("--tokenizer no/such", 1, "hub id")],
    "skip_tokenizer_init": switch("--skip-tokenizer-init"),
    "revision": [Good("--revision main", "main")],
    "code_revision": [Good("--code-revision main", "main"),
                      Bad("--code-revision a --revision b --trust-remote-code", 1, "give the same")],
    "tokenizer_revision": [Good("--tokenizer-revision main", "main"),
                           Bad("--tokenizer no/such --tokenizer-revision v2", 1, "of revision v2")],
    "tokenizer_mode": [Good("--tokenizer-mode auto", "auto"), Good("--tokenizer-mode slow", "slow"),
                       Bad("--tokenizer-mode mistral", 1, "mistral_common is not installed"),
                       Bad("--tokenizer-mode custom", 1, "no tokenizer class"), Bad("--tokenizer-mode x", 2, "choose")],
    "trust_remote_code": switch("--trust-remote-code"),
    "allowed_local_media_path": later("--allowed-local-media-path MODEL", None,
                                      Bad("--allowed-local-media-path /no/such", 1, "no such directory")),
    "download_dir": [Good("--download-dir /hub", "/hub")],
    "load_format": [*(Good(f"--load-format {one}", one) for one in (
                        "auto pt safetensors dummy npcache tensorizer sharded_state mistral runai_streamer "
                        "gguf").split()),
                    Good("--load-format bitsandbytes -q bitsandbytes", "bitsandbytes"),
                    Bad("--load-format bitsandbytes", 1, "needs --quantization bitsandbytes"),
                    Bad("--load-format zip", 2, "choose")],
    "config_format": [Good("--config-format hf", "hf"), Bad("--config-format mistral", 1, "no params.json"),
                      Bad("--config-format x", 2, "choose")],
    "dtype": [Good("", "auto"), Good("--dtype half", "float16"), Good("--dtype float", "float32"),
              *choice("--dtype", "float16", "bfloat16", "float32")],
    "kv_cache_dtype": [Good("", "auto"), *choice("--kv-cache-dtype", "fp8", "fp8_e5m2", "fp8_e4m3", "int8")],
    "max_model_len": [Good("", 4096), Good("--max-model-len auto", 4096), Good("--max-model-len -1", 4096),
                      Good("--max-model-len 2k", 2000), Good("--max-model-len 2K", 2048),
                      Bad("--max-model-len 8k", 1, "above the model's limit of 4096"),
                      Bad("--max-model-len x", 2, "x")],
    "guided_decoding_backend": [],  # other tests
    "logits_processor_pattern": [Good("", ""), Good("--logits-processor-pattern my.+$", "my.+$"),
                                 Bad("--logits-processor-pattern (", 1, "no regular expression")],
    "model_impl": choice("--model-impl", "auto", "fuseline", "vllm", "transformers"),
    "hf_overrides": [Good('--hf-overrides {"max_position_embeddings":512}', {"max_position_embeddings": 512}),
                     *only_json("--hf-overrides")],
    "rope_scaling": [Good("", {}), *only_json("--rope-scaling"),
                     Bad('--rope-scaling {"rope_type":"no"}', 1, "rope_type 'no'")],
    "rope_theta": [Good("", None), Good("--rope-theta 1e6", 1e6), Bad("--rope-theta x", 2, "number"),
                   Bad("--rope-theta 0", 1, "above 0")],
    "limit_mm_per_prompt": later("--limit-mm-per-prompt image=2,video=1", {},
                                 Bad("--limit-mm-per-prompt image", 2, "NAME=N"),
                                 Bad("--limit-mm-per-prompt image=1,image=2", 2, "twice")),
    "mm_processor_kwargs": later('--mm-processor-kwargs {"a":1}', {}, *only_json("--mm-processor-kwargs")),
    "disable_mm_preprocessor_cache": switch("--disable-mm-preprocessor-cache"),
    "served_model_name": [Good("--served-model-name a b", ["a", "b"])],
    "model_loader_extra_config": [Good('--model-loader-extra-config {"num_threads":4}', {"num_threads": 4}),
                                  Bad('--model-loader-extra-config {"x":1}', 1, "no key 'x'"),
                                  *only_json("--model-loader-extra-config")],
    "ignore_patterns": [Good("", ["original/**/*"]), Good("--ignore-patterns a --ignore-patterns b", ["a", "b"])],
    "qlora_adapter_name_or_path": [Bad("--qlora-adapter-name-or-path a", 1, "needs --load-format bitsandbytes")],
    "generation_config": [*(Good(f"--generation-config {one}", one) for one in ("none", "vllm", "auto")),
                          Bad("--generation-config /no/such", 1, "no directory")],
    "override_generation_config": [Good('--override-generation-config {"top_k":3}', {"top_k": 3}),
                                   *only_json("--override-generation-config")],
    "override_pooler_config": later('--override-pooler-config {"a":1}', {}, *only_json("--override-pooler-config")),
    "override_neuron_config": [Good('--override-neuron-config {"a":1}', {"a": 1}),
                               *only_json("--override-neuron-config")],
    "additional_config": [Good('--additional-config {"a":1}', {"a": 1}), *only_json("--additional-config")],
    # 20.4
    "block_size": [*(Good(f"--block-size {size}", size) for size in (8, 16, 32, 64, 128)),
                   Bad("--block-size 7", 2, "7")],
    "enable_prefix_caching": [Good("", True), Good("--no-enable-prefix-caching", False)],
    "disable_sliding_window": switch("--disable-sliding-window"),
    "use_v2_block_manager": [Good("", True), Good("--use-v2-block-manager false", False)],
    "num_lookahead_slots": count("--num-lookahead-slots", 0, 0),
    "seed": [Good("--seed 3", 3), Bad("--seed x", 2, "x")],
    "swap_space": [Good("", 4.0), Good("--swap-space 0.5", 0.5), Bad("--swap-space -1", 1, "at least 0"),
                   Bad("--swap-space 1e9", 1, "70 %")],
    "cpu_offload_gb": [Good("", 0.0), Good("--cpu-offload-gb 2", 2.0), Bad("--cpu-offload-gb -1", 1, "at least 0")],
    "gpu_memory_utilization": [Good("", 0.9), Good("--gpu-memory-utilization 1", 1.0),
                               Bad("--gpu-memory-utilization 0", 1, "above 0"),
                               Bad("--gpu-memory-utilization 1.1", 1, "at most 1")],
    "num_gpu_blocks_override": [Good("", None), Good("--num-gpu-blocks-override 9", 9),
                                Bad("--num-gpu-blocks-override 0", 1, "at least 1")],
    "max_num_batched_tokens": [Good("", 2048), Good("--max-num-batched-tokens 4k", 4000),
                               Bad("--max-num-batched-tokens 8", 1, "below --max-num-seqs"),
                               Bad("--max-num-batched-tokens 512 --no-enable-chunked-prefill", 1, "fit one step")],
    "max_num_partial_prefills": [Good("--max-num-partial-prefills 2", 2), *count("--max-num-partial-prefills", 1, 1),
                                 Bad("--max-num-partial-prefills 2 --enable-chunked-prefill=false", 1, "needs")],
    "max_long_partial_prefills": [Good("", 1), Bad("--max-long-partial-prefills 2", 1, "above --max-num-partial"),
                                  Bad("--max-long-partial-prefills 0", 1, "at least 1")],
    "long_prefill_token_threshold": [Good("", 0), Good("--long-prefill-token-threshold 99", 99),
                                     Bad("--long-prefill-token-threshold 5000", 1, "above --max-model-len")],
    "max_num_seqs": count("--max-num-seqs", 1, 256),
    "max_logprobs": [Good("", 20), Good("--max-logprobs -1", -1), Bad("--max-logprobs -2", 1, "at least -1")],
    "disable_log_stats": switch("--disable-log-stats"),
    "preemption_mode": choice("--preemption-mode", "recompute", "swap"),
    "num_scheduler_steps": count("--num-scheduler-steps", 1, 1),
    "multi_step_stream_outputs": [Good("", True), Good("--multi-step-stream-outputs=FALSE", False),
                                  Good("--multi-step-stream-outputs", True),
                                  Bad("--multi-step-stream-outputs x", 2, "neither")],
    "scheduler_delay_factor": [Good("", 0.0), Good("--scheduler-delay-factor 0.5", 0.5),
                               Bad("--scheduler-delay-factor -1", 1, "at least 0")],
    "enable_chunked_prefill": [Good("", True), Good("--enable-chunked-prefill=false", False),
                               Bad("--enable-chunked-prefill maybe", 2, "neither true nor false")],
    "scheduling_policy": choice("--scheduling-policy", "fcfs", "priority"),
    "scheduler_cls": [Good("", ""), Good("--scheduler-cls fuseline.engine.schedule.scheduler.Scheduler",
                                         "fuseline.engine.schedule.scheduler.Scheduler"),
                      Bad("--scheduler-cls no.such.Class", 1, "cannot be imported")],
    "disable_async_output_proc": switch("--disable-async-output-proc"),
    "calculate_kv_scales": switch("--calculate-kv-scales"),
    "kv_transfer_config": later('--kv-transfer-config {"kv_connector":"NixlConnector","kv_role":"kv_both"}', {},
                                Bad('--kv-transfer-config {"kv_connector":"NixlConnector"}', 1, "needs kv_role"),
                                Bad('--kv-transfer-config {"kv_connector":"x","kv_role":"kv_both"}', 1, "no connector"),
                                *only_json("--kv-transfer-config")),
    "enable_sleep_mode": switch("--enable-sleep-mode"),
    "enforce_eager": switch("--enforce-eager"),
    "max_seq_len_to_capture": count("--max-seq-len-to-capture", 1, 8192),
    "compilation_config": [*(Good(f"-O{level}", {"level": level}) for level in range(4)),
                           Good('-O {"level":1,"backend":"eager"}', {"level": 1, "backend": "eager"}),
                           Good("-cc.mode=1", {"level": 1}),
                           Good("-O3 -O.backend=eager", {"level": 3, "backend": "eager"}),
                           Bad("-O4", 2, "levels: 0, 1, 2, 3"), Bad('-O {"colour":1}', 2, "unknown key 'colour'")],
    # 20.5
    "tensor_parallel_size": [Good("-tp 1", 1), *later("-tp 2", 1, Bad("--tensor-parallel-size 0", 1, "at least 1"))],
    "pipeline_parallel_size": [Good("-pp 1", 1), *later("-pp 2", 1, Bad("-pp x", 2, "-pp"))],
    "distributed_executor_backend": [
        Good("--distributed-executor-backend mp", "mp"), Good("--distributed-executor-backend uni", "uni"),
        Bad("--distributed-executor-backend ray", 1, "pip install ray"),
        Bad("--distributed-executor-backend external_launcher", 1, NOT_YET),
        Bad("--distributed-executor-backend x", 2, "choose")],
    "max_parallel_loading_workers": [Good("--max-parallel-loading-workers 2", 2),
                                     Bad("--max-parallel-loading-workers 0", 1, "at least 1")],
    "ray_workers_use_nsight": [Good("", False), Bad("--ray-workers-use-nsight", 1, "needs --distributed-executor")],
    "disable_custom_all_reduce": switch("--disable-custom-all-reduce"),
    "worker_cls": [Good("--worker-cls auto", "auto"), Bad("--worker-cls no.such.Class", 1, "cannot be imported")],
    "device": [Good("--device cpu", "cpu"), Good("", "auto"), Bad("--device moon", 2, "choose"),
               *(Bad(f"--device {one}", 1, "Available devices: cpu") for one in
                 ("neuron", "openvino", "tpu", "xpu", "hpu"))],
    "tokenizer_pool_size": [Good("--tokenizer-pool-size 3", 3), Bad("--tokenizer-pool-size -1", 1, "at least 0")],
    "tokenizer_pool_type": [Good("--tokenizer-pool-type ray", "ray"),
                            Bad("--tokenizer-pool-type ray --tokenizer-pool-size 2", 1, "ray is not installed")],
    "tokenizer_pool_extra_config": [Good('--tokenizer-pool-extra-config {"a":1}', {"a": 1}),
                                    *only_json("--tokenizer-pool-extra-config")],
    # 20.6
    "quantization": [
        Good("-q None", None), Bad("-q x", 2, "aqlm"),
        Bad("-q neuron_quant", 1, "needs a Neuron device"),
        *(Good(f"--quantization {one}", one) for one in (
            "awq awq_marlin fp8 fbgemm_fp8 gptq_marlin gptq compressed-tensors bitsandbytes ipex moe_wna16 mxfp4 int8 "
            "int4 aqlm deepspeedfp ptpc_fp8 modelopt modelopt_fp4 marlin gptq_marlin_24 qqq hqq experts_int8 quark "
            "tpu_int8 auto-round inc gguf").split())],
    # 20.7
    **{name: [Good("", False), Good(f"--no-{name.replace('_', '-')}", False),
              Bad(f"--{name.replace('_', '-')}", 1, NOT_YET)]
       for name in ("enable_lora", "enable_lora_bias", "fully_sharded_loras")},
    "max_loras": [Good("--max-loras 1", 1), *later("--max-loras 2", 1, Bad("--max-loras 0", 1, "at least 1"))],
    "max_lora_rank": later("--max-lora-rank 64", 16, Bad("--max-lora-rank 7", 2, "choose from")),
    "lora_extra_vocab_size": later("--lora-extra-vocab-size 512", 256, Bad("--lora-extra-vocab-size 7", 2, "choose")),
    "lora_dtype": later("--lora-dtype bfloat16", "auto", Bad("--lora-dtype x", 2, "choose")),
    "long_lora_scaling_factors": later("--long-lora-scaling-factors 1.5,2", [],
                                       Bad("--long-lora-scaling-factors a", 2, "number")),
    "max_cpu_loras": later("--max-cpu-loras 3", None,
                           Bad("--max-cpu-loras 1 --max-loras 2", 1, "is below --max-loras")),
    "enable_prompt_adapter": [Bad("--enable-prompt-adapter", 1, "needs --max-prompt-adapter-token")],
    "max_prompt_adapters": later("--max-prompt-adapters 2", 1, Bad("--max-prompt-adapters 0", 1, "at least 1")),
    "max_prompt_adapter_token": later("--max-prompt-adapter-token 8", 0),
    # 20.8
    "speculative_model": later("--speculative-model [ngram]"),
    "speculative_model_quantization": later("--speculative-model-quantization gptq", None,
                                            Bad("--speculative-model-quantization x", 2, "aqlm")),
    "num_speculative_tokens": [Bad("--num-speculative-tokens 3", 1, "needs --speculative-model"),
                               Bad("--num-speculative-tokens 0", 1, "at least 1")],
    "speculative_disable_mqa_scorer": later("--speculative-disable-mqa-scorer", False),
    "speculative_draft_tensor_parallel_size": later("-spec-draft-tp 2"),
    "speculative_max_model_len": later("--speculative-max-model-len 9"),
    "speculative_disable_by_batch_size": later("--speculative-disable-by-batch-size 4", None,
                                               Bad("--speculative-disable-by-batch-size 1", 1, "at least 2")),
    "ngram_prompt_lookup_max": later("--ngram-prompt-lookup-max 4"),
    "ngram_prompt_lookup_min": [Bad("--ngram-prompt-lookup-min 5 --ngram-prompt-lookup-max 4", 1, "is above --ngram")],
    "spec_decoding_acceptance_method": later("--spec-decoding-acceptance-method typical_acceptance_sampler",
                                             "rejection_sampler",
                                             Bad("--spec-decoding-acceptance-method x", 2, "choose")),
    "typical_acceptance_sampler_posterior_threshold": later(
        "--typical-acceptance-sampler-posterior-threshold 0.5", 0.09),
    "typical_acceptance_sampler_posterior_alpha": later(
        "--typical-acceptance-sampler-posterior-alpha 0.5", 0.3,
        Bad("--typical-acceptance-sampler-posterior-alpha -1", 1, "at least 0")),
    "disable_logprobs_during_spec_decoding": later("--disable-logprobs-during-spec-decoding false", True),
    # 20.9
    "show_hidden_metrics_for_version": [Good("--show-hidden-metrics-for-version 0.7", "0.7"),
                                        Bad("--show-hidden-metrics-for-version x", 1, "is no version")],
    "otlp_traces_endpoint": [Good("", ""), Good("--otlp-traces-endpoint http://127.0.0.1:1", "http://127.0.0.1:1")],
    "collect_detailed_traces": [Good("--collect-detailed-traces model,worker --otlp-traces-endpoint http://a:1",
                                     "model,worker"),
                                Bad("--collect-detailed-traces all", 1, "needs --otlp-traces-endpoint"),
                                Bad("--collect-detailed-traces heart", 1, "no module 'heart'")],
}  # fmt: skip
"""By the name of the flag. Flags of tools, reasoning and structured output are tested with those."""
ELSEWHERE = {
    "enable_auto_tool_choice", "enable_reasoning", "reasoning_parser", "tool_call_parser", "tool_parser_plugin",
    "guided_decoding_backend", "config",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    return str(folder)


@pytest.mark.parametrize("name", sorted(name for name, cases in ROWS.items() if cases))
def test_a_flag_is_taken_and_shown_or_refused_in_words(name: str, model: str, capsys) -> None:
    for case in ROWS[name]:
        arguments = [part.replace("MODEL", model) for part in case.arguments.split()]
        try:
            status = main(["serve", model, *arguments, "--print-config"])
        except SystemExit as exit_:
            status = exit_.code
        out, err = capsys.readouterr()
        if isinstance(case, Good):
            shown = json.loads(out)[name]
            assert (status, shown) == (0, model if case.shown == "MODEL" else case.shown), case
        else:
            lines = err.splitlines()
            assert (status, out) == (case.status, "") and case.words in lines[-1], (case, lines[-1])
            assert status == 2 or len(lines) == 1, case


def test_the_table_is_that_of_the_specification() -> None:
    from fuseline.api.cli_flags import all_flags

    assert len(set(ROWS) | ELSEWHERE) == 138
    assert set(ROWS) <= set(all_flags())
