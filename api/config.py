"""Settings of the server: `ServerConfig` (frozen, the engine's inside), and the one reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import fuseline
from fuseline.compile.gguf.folder import find_gguf, unpacked
from fuseline.compile.gguf.header import GgufError
from fuseline.compile.target import default_cache_dir
from fuseline.engine.config import EngineConfig

JsonObject = tuple[tuple[str, object], ...]
"""A JSON object of the command line as sorted-as-given items, so that a config stays frozen."""

LogLevel = Literal["debug", "info", "warning", "error", "critical", "trace"]
HIGHEST_LEVEL = 3
"""The highest compilation level there is; a higher one asked for runs as this one and the start-up table says so."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line with cause and cure."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server.

    Field names are the flag names of `fuseline serve`; the text under a field is its help.
    Made by `resolve` in api/config_resolve.py.
    """

    engine: EngineConfig

    model: str = "demo"
    """Checkpoint directory, GGUF file or hub id of a cached snapshot; the positional MODEL wins. demo is bundled."""
    served_model_name: tuple[str, ...] = ()
    """Names clients may use; the first is used in responses and metrics. Default: the model as given."""
    tokenizer: str = ""
    """Directory of another tokenizer; empty takes the model's."""
    download_dir: str = ""
    """Directory of downloaded hub models, of which this server only reads. Default: the Hugging Face cache."""
    revision: str = ""
    """Branch, tag or commit of a hub id; a directory has none. Default: main."""
    code_revision: str = ""
    """Revision of the model's own Python code, which can only be that of the model."""
    tokenizer_revision: str = ""
    """Branch, tag or commit of the tokenizer's hub id. Default: --revision where the tokenizer is the model's."""
    disable_sliding_window: bool = False
    """End the context at the window of sliding attention."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: only token-id prompts, answers carry ids."""
    task: Literal["auto", "generate", "embedding", "embed", "classify", "score", "reward", "transcription"] = "auto"
    """Kind of work the server does with the model."""
    generation_config: str = ""
    """Sampling defaults: empty, none or vllm takes none, auto reads generation_config.json of the model, else of that
    directory."""
    override_generation_config: JsonObject = ()
    """JSON merged over the generation config, for instance {"temperature": 0.5}."""
    compilation_config: JsonObject = (("level", 2),)
    """Compilation level 0 to 3, or JSON with the keys listed in docs/FLAGS.md; -O3 is short for level 3."""
    enforce_eager: bool = False
    """No compiled regions (level 1 at most) and no device graphs."""
    max_seq_len_to_capture: int = 8192
    """Longest sequence, in tokens, of a step that a GPU replays as a graph."""

    host: str = "127.0.0.1"
    """Address to listen on; give 0.0.0.0 to be reached from outside."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    uds: str = ""
    """Path of a Unix socket to listen on, in place of host and port."""
    uvicorn_log_level: LogLevel = "info"
    """Log level of the HTTP server."""
    allow_credentials: bool = False
    """CORS: allow credentials."""
    allowed_origins: tuple[str, ...] = ("*",)
    """CORS: JSON list of allowed origins."""
    allowed_methods: tuple[str, ...] = ("*",)
    """CORS: JSON list of allowed methods."""
    allowed_headers: tuple[str, ...] = ("*",)
    """CORS: JSON list of allowed headers."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys of which clients must send one (Authorization: Bearer KEY); repeatable. Default: $FUSELINE_API_KEY."""
    ssl_keyfile: str = ""
    """PEM file of the TLS key."""
    ssl_certfile: str = ""
    """PEM file of the TLS certificate."""
    ssl_ca_certs: str = ""
    """PEM file of the authorities that verify clients."""
    ssl_cert_reqs: Literal[0, 1, 2] = 0
    """Client certificate: 0 none, 1 optional, 2 required."""
    ssl_ciphers: str = ""
    """Ciphers of TLS 1.2 in OpenSSL's syntax."""
    enable_ssl_refresh: bool = False
    """Read the TLS files again when they change; open connections stay."""
    root_path: str = ""
    """ASGI root path behind a proxy that strips it."""
    middleware: tuple[str, ...] = ()
    """Import path of a middleware (a coroutine function or an ASGI class); may be repeated."""
    disable_frontend_multiprocessing: bool = False
    """Run the engine in a thread of the server process."""
    enable_sleep_mode: bool = False
    """Allow POST /sleep (a development route) to give memory back: KV and weights, on a CPU as on a GPU."""
    max_num_prompts: int = 1024
    """Prompts of one request."""
    max_n: int = 128
    """Choices (n) that a request may ask for."""
    max_stop_strings: int = 16
    """Stop strings of a request."""
    max_stop_length: int = 1024
    """Characters of a stop string."""
    max_logit_bias: int = 1024
    """Entries of a request's logit_bias."""
    max_bad_words: int = 1024
    """Entries of a request's bad_words."""
    max_stop_token_ids: int = 1024
    """Entries of a request's stop_token_ids."""
    h11_max_incomplete_event_size: int = 65536
    """Bytes of a request's line and headers; more get 431."""
    h11_max_header_count: int = 256
    """Headers of a request; more get 431."""
    max_pipelined_requests: int = 100
    """Requests that may wait on one connection for the answers before theirs; more get 429."""
    request_header_timeout: float = 10.0
    """Seconds that a request's line and headers may take to arrive; then 408."""
    request_body_timeout: float = 30.0
    """Seconds that a request's body may take to arrive, beside those it takes at request-body-min-rate; then 408."""
    request_body_min_rate: int = 4096
    """Bytes a second below which a body is too slow, once request-body-timeout has passed."""
    keep_alive_timeout: float = 5.0
    """Seconds that a connection is kept open between two requests."""
    response_write_timeout: float = 60.0
    """Seconds that a client may leave an answer unread before its connection is dropped."""
    enable_request_id_headers: bool = False
    """Send X-Request-Id with every response."""
    disable_fastapi_docs: bool = False
    """No /docs, /redoc and /openapi.json."""
    enable_tokenizer_info_endpoint: bool = False
    """Mount GET /tokenizer_info: the tokenizer's settings and chat template."""
    enable_server_load_tracking: bool = False
    """Count the requests in flight for GET /load."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests may take to finish after SIGTERM."""
    sse_keep_alive_interval: float = 15.0
    """Seconds of silence in a stream before a comment line is sent; 0 sends none."""
    metrics_prefix: str = "fuseline:"
    """Prefix of metric names; vllm: gives the reference's names."""
    dev_mode: bool = False
    """Mount the development routes; set by FUSELINE_SERVER_DEV_MODE."""

    chat_template: str = ""
    """File of a chat template, or the template itself on one line. Default: the tokenizer's own."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    """How message content reaches the template: as a string, or as a list of parts (openai)."""
    trust_request_chat_template: bool = False
    """Take chat_template from requests; it is compiled and rendered within the bounds of --prompt-timeout and
    --prompt-memory."""
    default_chat_template_kwargs: JsonObject = ()
    """JSON of template variables for requests that do not set them."""
    enable_auto_tool_choice: bool = False
    """Let the model choose tools (tool_choice auto); needs --tool-call-parser."""
    tool_call_parser: str = ""
    """Format in which the model writes tool calls; docs/TOOLS.md lists them."""
    tool_parser_plugin: str = ""
    """Python file that registers more tool parsers, imported at the start."""
    exclude_tools_when_tool_choice_none: bool = True
    """Hide the tools of a request with tool_choice none from the template; --no-... shows them."""
    reasoning_parser: str = ""
    """Format in which the model writes its reasoning, which answers then show apart; docs/TOOLS.md lists them."""
    enable_reasoning: bool = False
    """Show reasoning apart; --reasoning-parser alone does so too."""
    guided_decoding_backend: str = "xgrammar"
    """Backend of structured output, NAME or NAME:no-fallback: xgrammar, outlines, lm-format-enforcer, guidance or auto.
    Requests may name another."""
    structured_outputs_config: JsonObject = ()
    """JSON with the key backend, the newer name of --guided-decoding-backend."""
    response_role: str = "assistant"
    """Role of answers."""
    logits_processor_pattern: str = ""
    """Regular expression for the names of logits processors that requests may use, matched from their beginning; empty
    allows none. They are imported and called in this server: allow only what you trust."""
    strict_requests: bool = False
    """Refuse unknown fields of requests with 400, instead of one warning."""
    return_tokens_as_token_ids: bool = False
    """Show tokens as token_id:N in log-probabilities."""
    enable_prompt_tokens_details: bool = False
    """Report usage.prompt_tokens_details.cached_tokens."""
    enable_force_include_usage: bool = False
    """Send usage at the end of every stream."""
    stream_interval: int = 1
    """Tokens gathered before a chunk of a stream is sent; the first token is sent at once."""

    max_request_bytes: int = 32 * 2**20
    """Largest body of a request, in bytes; a larger one is refused with 413. Bodies that wait to be read may together
    take eight times as much; a request beyond that gets 429."""
    max_prompt_bytes: int = 32 * 2**20
    """Longest prompt that a chat template may render, in bytes of UTF-8; a longer one is refused with 400."""
    max_stored_responses: int = 1000
    """Answers of /v1/responses that later requests may go on from; the oldest are forgotten."""
    max_messages: int = 16384
    """Most messages of one conversation."""
    max_token_rules: int = 131072
    """Most entries that logit_bias, allowed_token_ids, stop_token_ids and bad_words may have together, counted once
    for each choice of each prompt."""
    prompt_workers: int = 2
    """Large requests that are rendered and encoded at the same time, each in a process, and as many short conversations
    again. Those that turn out slow run on in more processes: one for each of these places, four for short ones. 0 does
    it all in the server's process, where a large request delays the others."""
    prompt_timeout: float = 30.0
    """Seconds that reading, rendering and encoding one request may take in such a process; it is ended then and the
    request refused with 400. While others wait it may be refused sooner, with 503. A chat template that takes as long
    for one short message ends the start."""
    prompt_memory: int = 2 * 2**30
    """Bytes of memory that such a process may take for one request; an eighth of it for a short conversation."""

    enable_log_requests: bool = False
    """Show the prompt in the log line of each request; without, the line has its length and the sampling settings."""
    disable_log_requests: bool = False
    """No log line per request."""
    max_log_len: int | None = None
    """Characters (or ids) of a prompt that a log line shows with --enable-log-requests; default all."""
    enable_log_outputs: bool = False
    """Log generated text too."""
    log_error_stack: bool = False
    """Log the stack of every request that is refused or fails."""
    disable_uvicorn_access_log: bool = False
    """No access lines of the HTTP server."""
    disable_access_log_for_endpoints: str = ""
    """Paths without access lines, separated by commas, for instance /health,/metrics."""
    otlp_traces_endpoint: str = ""
    """Where to send a span for each request, OTLP over gRPC (http://localhost:4317), or over HTTP with
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf (http://localhost:4318/v1/traces). Needs fuseline[tracing]."""
    otlp_protocol: str = "grpc"
    """grpc or http/protobuf; set by OTEL_EXPORTER_OTLP_TRACES_PROTOCOL."""
    logging_level: str = "INFO"
    """Level of our own log; set by FUSELINE_LOGGING_LEVEL."""
    logging_config_path: str = ""
    """JSON file for logging.config.dictConfig; set by FUSELINE_LOGGING_CONFIG_PATH."""

    recorded: JsonObject = ()
    """Flags that are checked and shown but have no other effect on this device."""

    @property
    def asked_level(self) -> int:
        """Compilation level asked for; `engine.compile.level` is the one that runs."""
        return int(dict(self.compilation_config)["level"])

    @property
    def tokenizer_dir(self) -> str:
        return self.tokenizer or self.engine.compile.model

    @property
    def level_text(self) -> str:
        """The level as the start-up table shows it."""
        running = self.engine.compile.level
        return str(running) if running == self.asked_level else f"{running} (asked: {self.asked_level})"


@dataclass(frozen=True)
class Environment:
    """Variables FUSELINE_<NAME> (alias VLLM_<NAME>), empty when unset; those of OpenTelemetry have its names. A flag
    wins over its variable.
    """

    api_key: str = ""
    """Key clients must send; --api-key wins."""
    server_dev_mode: str = ""
    """1 mounts the development routes."""
    allow_long_max_model_len: str = ""
    """1 allows --max-model-len above the model's own limit."""
    batch_invariant: str = ""
    """1 is --batch-invariant."""
    cpu_kvcache_space: str = ""
    """Size of the KV cache in GiB; --kv-cache-memory-bytes wins."""
    logging_level: str = ""
    """DEBUG, INFO, WARNING, ERROR or CRITICAL."""
    logging_config_path: str = ""
    """JSON file for logging.config.dictConfig."""
    cache_root: str = ""
    """Directory of compile caches; default ~/.cache/fuseline."""
    otel_exporter_otlp_traces_protocol: str = ""
    """grpc or http/protobuf, for --otlp-traces-endpoint; default grpc."""


def variables_of(name: str) -> tuple[str, ...]:
    """Variables that set a field of Environment; the first wins."""
    bare = name.upper()
    return (bare,) if bare.startswith("OTEL_") else (f"FUSELINE_{bare}", f"VLLM_{bare}")


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """The one place where the server reads environment variables."""
    source = os.environ if variables is None else variables
    names = Environment.__dataclass_fields__
    read = {name: next(filter(None, map(source.get, variables_of(name))), "") for name in names}
    return Environment(**read)


IDLE_VARIABLES: dict[str, str] = {
    "ALLOW_RUNTIME_LORA_UPDATING": "adapters are not yet supported",
    "KEEP_ALIVE_ON_ENGINE_DEATH": "an engine that dies is started anew",
    "CPU_OMP_THREADS_BIND": "threads use the cores of the process (taskset); their number is --cpu-threads",
    **dict.fromkeys(
        ("IMAGE_FETCH_TIMEOUT", "AUDIO_FETCH_TIMEOUT", "VIDEO_FETCH_TIMEOUT"), "media are not yet supported"
    ),
}
"""Variables of the specification that do nothing here, and why."""


def variables_without_effect(variables: Mapping[str, str] | None = None) -> list[str]:
    """One line for each variable that is set and does nothing, for the start-up log."""
    source = os.environ if variables is None else variables
    names = [(f"{prefix}_{name}", why) for name, why in IDLE_VARIABLES.items() for prefix in ("FUSELINE", "VLLM")]
    return [f"{name} has no effect: {why}" for name, why in names if source.get(name)]


def demo_dir() -> Path:
    """Directory of the model that ships inside the package."""
    return Path(fuseline.__file__).parent / "demo"


def find_checkpoint(model: str, download_dir: str = "", revision: str = "", cache_dir: str = "") -> str:
    """Directory of a checkpoint: a path, `demo`, or the snapshot of a hub id in `download_dir` (empty: the hub's own).

    `revision` is that of a hub id. A model in GGUF files gets a directory in `cache_dir`. Raises ConfigError.
    """
    path = demo_dir() if model == "demo" and not Path("demo").is_dir() else Path(model).expanduser()
    if model == "demo" and not path.is_dir():
        raise ConfigError("the bundled demo model is not in this installation; give a checkpoint directory")
    if not os.path.exists(path):
        path = _cached_snapshot(model, download_dir, revision)
    if gguf := _unpacked_gguf(path, cache_dir):
        return str(gguf)
    if os.path.isfile(path):
        raise ConfigError(f"{model} is a file; give the directory of a checkpoint, or a file that ends in .gguf")
    return str(path.resolve())


def _unpacked_gguf(path: Path, cache_dir: str) -> Path | None:
    """None for a path that is no GGUF file and no directory of them. Raises ConfigError."""
    if path.suffix != ".gguf" and ((path / "config.json").is_file() or not path.is_dir()):
        return None
    try:
        found = find_gguf(path)
        return unpacked(found, Path(cache_dir or default_cache_dir())) if found else None
    except GgufError as error:
        raise ConfigError(str(error)) from error


def _cached_snapshot(model: str, download_dir: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        cached = {"local_files_only": True, "cache_dir": download_dir or None, "revision": revision or None}
        return Path(snapshot_download(model, **cached))
    except Exception as error:  # any reason (bad id, not cached, no package) means the same to the user
        where = download_dir or "the local Hugging Face cache"
        which = f"hub id whose files of revision {revision}" if revision else "hub id whose files"
        message = f"model {model!r} is neither a directory nor a {which} are in {where}"
        raise ConfigError(message + "; give a checkpoint directory") from error
