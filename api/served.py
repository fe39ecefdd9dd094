"""The served model as all routes see it: its tokenizer, template, limits and engine."""

from __future__ import annotations

import logging
import time
import uuid
from array import array
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from fuseline.api.admission import Admission
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import ApiError, to_api_error
from fuseline.api.http_metrics import HttpMetrics
from fuseline.api.metrics import Metrics
from fuseline.api.output.beam import BeamSearch
from fuseline.api.output.events import Prompt
from fuseline.api.output.generation import Generation, TextOptions
from fuseline.api.output.logprobs import LogprobWriter
from fuseline.api.output.openai_completion import Shape
from fuseline.api.output.pace import Turns
from fuseline.api.output.response import Run
from fuseline.api.output.watch import RequestWatch
from fuseline.api.parsers.parsing import Parsing, build_parsing
from fuseline.api.prompt.bodies import Bodies
from fuseline.api.prompt.chat import template_text
from fuseline.api.prompt.encode import TextTokenizer, open_tokenizer, read_json
from fuseline.api.prompt.pool import LARGE, SHORT, PromptPool
from fuseline.api.prompt.prepare import Kind, Preparer, PromptSettings
from fuseline.api.prompt.prepared import Prepared, Refused, Written
from fuseline.api.prompt.template import ChatTemplate
from fuseline.api.prompt.vocabulary import make_vocabulary
from fuseline.api.protocol.common import GenerationDefaults
from fuseline.api.stored_responses import ResponseStore
from fuseline.api.tracing import Tracer, open_tracer
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineReady, EngineRequest
from fuseline.engine.params import SamplingParams

LOG = logging.getLogger("fuseline.requests")
SMALL_BYTES = 8192
"""A completion's body up to this size is prepared in this process: less than 10 ms, whatever it holds."""
SHORT_BYTES = 65536
"""Bodies up to this size have processes of their own, so that they wait for none of the large ones."""
MAX_SHOWN = 32
"""Entries of a list that a log line shows."""
NO_PARAMS = SamplingParams()
MAX_STORED_BYTES = 64 * 2**20
"""Of all answers that later requests may name."""
CONTENT_FORMATS = {"string": "text (string)", "openai": "a list of parts (openai)"}
DEFAULTS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")


@dataclass
class Served:
    """One served model. Built once the engine is ready."""

    config: ServerConfig
    client: EngineClient
    ready: EngineReady
    tokenizer: TextTokenizer | None
    preparer: Preparer
    pools: tuple[PromptPool, PromptPool] | None
    """For short and for large bodies; None prepares in this process."""
    bodies: Bodies
    registry: CollectorRegistry
    """Of all metrics."""
    http_metrics: HttpMetrics
    metrics: Metrics | None
    """Of the engine and its requests; None with --disable-log-stats."""
    admission: Admission
    parsing: Parsing
    stored: ResponseStore
    tracer: Tracer | None = None
    """None without --otlp-traces-endpoint."""
    turns: Turns = field(default_factory=Turns)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    num_requests: int = 0
    has_told_of_tracing: bool = False

    @property
    def name(self) -> str:
        return self.config.served_model_name[0]

    def check_model(self, name: str | None) -> None:
        self.preparer.limits.check_model(name)

    def check_ready(self) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="server_stopping", retry_after=5)

    async def prepare(self, kind: Kind, pieces: list[bytes]) -> Prepared | Written:
        """A body made ready for the engine, or the answer where that needs none. Raises ApiError."""
        size = sum(map(len, pieces))
        if self.pools is None or (kind == "completion" and size <= SMALL_BYTES):
            await self.turns.rest(size)
            reply = self.preparer.prepare(kind, b"".join(pieces))
        else:
            reply = await self.pools[size > SHORT_BYTES].prepare(kind, pieces)
        if isinstance(reply, Refused):
            raise ApiError(reply.status, reply.message, reply.param, reply.code)
        return reply

    def prompts(self, prepared: Prepared) -> list[Prompt]:
        n = prepared.answer.n
        return [Prompt(prompt.ids, k * n, prompt.echo) for k, prompt in enumerate(prepared.prompts)]

    def shape(self, prepared: Prepared, id: str) -> Shape:
        """The fields that all chunks of the answer share."""
        answer, config = prepared.answer, self.config
        shows_ids = config.return_tokens_as_token_ids if answer.shows_ids is None else answer.shows_ids
        return Shape(
            id=id, created=int(time.time()), model=self.name, writer=LogprobWriter(self.tokenizer, shows_ids),
            wants_logprobs=answer.num_logprobs is not None, num_top=answer.num_logprobs or 0,
            wants_ids=answer.wants_ids, include_usage=answer.include_usage or config.enable_force_include_usage,
            continuous_usage=answer.continuous_usage, shows_cached=config.enable_prompt_tokens_details,
            role=answer.role, echo=answer.echo, turns=self.turns,
            keeps_empty=answer.parse is None or answer.parse.choice == "named",
            counts_reasoning=answer.parse is not None and bool(config.reasoning_parser),
        )  # fmt: skip

    def runs(self, prepared: Prepared, prompts: list[Prompt], label: str) -> list[Run]:
        """The prompts with what runs them, which is made when its turn comes."""
        return [(prompt, partial(self.generation, prepared, k, label)) for k, prompt in enumerate(prompts)]

    def keep_alive(self, prepared: Prepared) -> float | None:
        """Seconds of silence in a stream before a comment; None for an answer that comes whole."""
        return self.config.sse_keep_alive_interval if prepared.answer.stream else None

    def generation(self, prepared: Prepared, index: int, label: str) -> Generation | BeamSearch:
        """One of the prompts on its way through the engine, with metrics and the request log."""
        config, prompt, answer = self.config, prepared.prompts[index], prepared.answer
        params = replace(prepared.params, max_tokens=prompt.max_tokens)
        ids = prompt.ids
        self.log_request(label, ids if prepared.text is None else prepared.text, len(ids), params)
        engine_request = EngineRequest(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(ids), params=params,
            priority=answer.priority, arrival_time=time.time(), turn=index, cache_salt=answer.cache_salt,
        )  # fmt: skip
        parse, skips_special = self.parsing.settings(answer)
        options = TextOptions(
            stops=() if answer.beams else answer.stops, include_stop=answer.includes_stop,
            skip_special_tokens=skips_special, min_tokens=params.min_tokens, interval=config.stream_interval,
            turns=self.turns, num_shown=answer.n if answer.n < params.n else 0,
            parse=parse, kept_ids=self.parsing.kept_ids if parse else frozenset(),
        )  # fmt: skip
        on_end = None
        if self.tracer is not None:
            name = label if len(prepared.prompts) == 1 else f"{label}-{index}"
            on_end = partial(self.tracer.write, engine_request, name, prepared.trace_headers)
        watch = RequestWatch(
            engine_request, label, self.metrics, config.enable_log_outputs, config.max_log_len, on_end
        )  # fmt: skip
        if answer.beams:
            return BeamSearch(engine_request, self.tokenizer, options, answer.beams, watch)
        return Generation(engine_request, self.tokenizer, options, watch)

    def log_request(self, label: str, prompt: str | array[int], num_tokens: int, params: SamplingParams) -> None:
        """What a client has written is shown only where the server's flags ask for it."""
        config = self.config
        if config.enable_log_requests:
            shown = prompt[: config.max_log_len]
            LOG.info("%s: prompt %r, %s", label, shown if isinstance(shown, str) else shown.tolist(), _brief(params))
        elif not config.disable_log_requests:
            LOG.info("%s: prompt of %d tokens, %s", label, num_tokens, _brief(_without_texts(params)))

    def trace_headers(self, headers: dict[str, str]) -> dict[str, str]:
        """The headers, where spans are written; else none, and one line of the log says so."""
        if self.tracer is not None:
            return headers
        if not self.has_told_of_tracing:
            self.has_told_of_tracing = True
            LOG.warning("a request came with trace headers, but no spans are written: see --otlp-traces-endpoint")
        return {}

    def start_processes(self) -> None:
        """Start a process that prepares requests, before the first one."""
        if self.pools is not None:
            self.pools[0].start()

    def close(self) -> None:
        """End the processes that prepare requests."""
        for pool in self.pools or ():
            pool.close()
        if self.tracer is not None:
            self.tracer.close()


def _brief(params: SamplingParams) -> str:
    """The settings that are not the default; of a long list its length."""
    shown = []
    for name, value in msgspec.structs.asdict(params).items():
        if value == getattr(NO_PARAMS, name):
            continue
        is_long = isinstance(value, tuple) and len(value) > MAX_SHOWN
        shown.append(f"{name}=<{len(value)} entries>" if is_long else f"{name}={value!r}")
    return ", ".join(shown)


def _without_texts(params: SamplingParams) -> SamplingParams:
    """Without what spells words of the client's: a grammar, forbidden words."""
    grammar = params.grammar and replace(params.grammar, text=f"<{len(params.grammar.text)} characters>")
    return replace(params, grammar=grammar, bad_words=((),) * len(params.bad_words))


def load_tokenizer(config: ServerConfig) -> TextTokenizer | None:
    """None when the server is to run without. Raises ConfigError."""
    return open_tokenizer(config)


def build_served(
    config: ServerConfig, client: EngineClient, ready: EngineReady, tokenizer: TextTokenizer | None
) -> Served:
    """Raises ConfigError for a template that cannot be used."""
    template = template_text(config.chat_template, tokenizer.chat_template) if tokenizer else None
    settings = PromptSettings(config, ready, tuple(generation_defaults(config).items()), template)
    preparer = Preparer(settings, tokenizer)
    parsing = build_parsing(config, tokenizer, template)
    stored = ResponseStore(config.max_stored_responses, MAX_STORED_BYTES)
    log_content_format(config, preparer.renderer.template)
    metrics, registry = None, CollectorRegistry()
    if not config.engine.disable_log_stats:
        names, engine = (config.metrics_prefix, config.served_model_name[0]), config.engine
        metrics = Metrics(*names, ready, engine.cache, registry, engine.traced)
        client.on_step.append(metrics.on_step)
    pools = None
    if config.prompt_workers:
        pools = (PromptPool(settings, config.prompt_workers, SHORT), PromptPool(settings, config.prompt_workers, LARGE))
    if tokenizer is not None:
        client.vocabulary = partial(make_vocabulary, tokenizer, ready.eos_token_ids)
    bodies = Bodies(config.max_request_bytes)
    admission = Admission(config)
    return Served(
        config, client, ready, tokenizer, preparer, pools, bodies, registry, HttpMetrics(registry), metrics, admission,
        parsing, stored, open_tracer(config),
    )  # fmt: skip


def log_content_format(config: ServerConfig, template: ChatTemplate | None) -> None:
    """Log in which form content reaches the template, and a setting that contradicts what the template looks for."""
    if template is None:
        return
    used, detected = template.content_format, template.detected_format
    if used == detected:
        LOG.info("message content reaches the chat template as %s", CONTENT_FORMATS[used])
    else:
        words = "--chat-template-content-format %s: message content reaches the chat template as %s, which looks for %s"
        LOG.warning(words, config.chat_template_content_format, CONTENT_FORMATS[used], CONTENT_FORMATS[detected])


def generation_defaults(config: ServerConfig) -> dict[str, Any]:
    """Sampling defaults: overrides over the generation config that --generation-config names."""
    folder = {"": None, "none": None, "vllm": None, "auto": config.engine.compile.config_dir}.get(
        config.generation_config, config.generation_config
    )
    stored = read_json(Path(folder) / "generation_config.json") if folder else {}
    overrides = dict(config.override_generation_config)
    if unknown := sorted(set(overrides) - set(DEFAULTS)):
        raise ConfigError(
            f"--override-generation-config: {unknown[0]} has no effect here (keys: {', '.join(sorted(DEFAULTS))})"
        )
    found = {name: value for name, value in {**stored, **overrides}.items() if name in DEFAULTS and value is not None}
    try:
        GenerationDefaults.model_validate(found, strict=True)
    except ValidationError as error:
        problem = to_api_error(error)
        flag = "override-generation-config" if problem.param in overrides else "generation-config"
        raise ConfigError(f"--{flag}: {problem.message}") from error
    return found
