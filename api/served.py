"""What every route works with: the model being served, its tokenizer, template, limits and engine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError, bad_request
from fuseline.api.metrics import FinishedRequest, Metrics
from fuseline.api.output.events import Done, Event, PromptInfo, TextDelta
from fuseline.api.output.generation import TextOptions, generate_events
from fuseline.api.output.interval import in_intervals
from fuseline.api.output.logprobs import LogprobWriter
from fuseline.api.prompt.chat_template import ChatTemplate, template_text
from fuseline.api.prompt.sampling import SamplingBuilder, queue_is_full
from fuseline.api.prompt.tokens import TextTokenizer, read_json
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.client import EngineClient, EngineDeadError
from fuseline.engine.messages import EngineReady, EngineRequest, SamplingParams

LOG = logging.getLogger("fuseline.requests")
DEFAULTS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")


@dataclass
class Served:
    """One served model. Built once the engine is ready."""

    config: ServerConfig
    client: EngineClient
    ready: EngineReady
    tokenizer: TextTokenizer | None
    template: ChatTemplate | None
    sampling: SamplingBuilder
    metrics: Metrics | None
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    num_requests: int = 0

    @property
    def name(self) -> str:
        return self.config.served_model_name[0]

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.config.served_model_name:
            raise ApiError(404, f"The model `{name}` does not exist.", "model", "model_not_found")

    def check_ready(self) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="server_stopping", retry_after=5)
        if full := queue_is_full(self.client.num_in_flight, self.config):
            raise full

    def need_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init): send token ids", "prompt")
        return self.tokenizer

    def logprob_writer(self, request: GenerateRequest) -> LogprobWriter:
        asked = request.return_tokens_as_token_ids
        return LogprobWriter(self.tokenizer, self.config.return_tokens_as_token_ids if asked is None else asked)

    async def events(
        self, request: GenerateRequest, prompt: list[int], params: SamplingParams, label: str
    ) -> AsyncIterator[Event]:
        """Runs one prompt through the engine, with metrics and the request log, in deltas of --stream-interval."""
        interval = self.config.stream_interval
        async with aclosing(self._observed(request, prompt, params, label)) as observed:
            async for event in in_intervals(observed, interval) if interval > 1 else observed:
                yield event

    async def _observed(
        self, request: GenerateRequest, prompt: list[int], params: SamplingParams, label: str
    ) -> AsyncIterator[Event]:
        arrival = time.time()
        engine_request = EngineRequest(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(prompt), params=params,
            priority=request.priority or 0, arrival_time=arrival,
        )  # fmt: skip
        options = TextOptions(
            request.stops,
            bool(request.include_stop_str_in_output),
            request.skip_special_tokens is not False,
            params.min_tokens,
        )
        kept = FinishedRequest(len(prompt), params.n, params.max_tokens, arrival)
        texts: dict[int, str] = {}
        try:
            async with aclosing(generate_events(self.client, engine_request, self.tokenizer, options)) as events:
                async for event in events:
                    self._observe(kept, event)
                    if self.config.enable_log_outputs:
                        self._log_output(label, texts, event)
                    yield event
        except (ApiError, EngineDeadError):
            kept.reasons += ["error"] * (params.n - len(kept.reasons))
            raise
        finally:
            if len(kept.reasons) < params.n:
                LOG.info("%s aborted", label)
                kept.reasons += ["abort"] * (params.n - len(kept.reasons))
            if self.metrics:
                self.metrics.take_finished(kept)

    def _observe(self, kept: FinishedRequest, event: Event) -> None:
        if isinstance(event, PromptInfo):
            kept.queue_seconds = event.queue_seconds
        elif isinstance(event, Done):
            kept.reasons.append(event.finish_reason)
        elif isinstance(event, TextDelta) and event.token_ids:
            kept.num_generated += len(event.token_ids)
            now = time.time()
            last = kept.last.get(event.index)
            kept.first_token = kept.first_token or now
            if last is not None and self.metrics:
                self.metrics.take_gap(now - last, len(event.token_ids))
            kept.last[event.index] = now

    def _log_output(self, label: str, texts: dict[int, str], event: Event) -> None:
        """One line per choice, when it ends."""
        if isinstance(event, TextDelta):
            texts[event.index] = texts.get(event.index, "") + event.text
        elif isinstance(event, Done):
            text = texts.pop(event.index, "")[: self.config.max_log_len]
            LOG.info("%s: output %d %r, %s", label, event.index, text, event.finish_reason)

    def log_request(self, label: str, prompt: Any, params: SamplingParams) -> None:
        if self.config.disable_log_requests:
            return
        limit = self.config.max_log_len
        LOG.info("%s: prompt %r, %s", label, prompt if limit is None else prompt[:limit], params)


def load_tokenizer(config: ServerConfig) -> TextTokenizer | None:
    """None when the server is to run without. Raises ConfigError."""
    return None if config.skip_tokenizer_init else TextTokenizer(config.tokenizer_dir)


def build_served(
    config: ServerConfig, client: EngineClient, ready: EngineReady, tokenizer: TextTokenizer | None
) -> Served:
    """Raises ConfigError for a template that cannot be used."""
    text = template_text(config.chat_template, tokenizer.chat_template) if tokenizer else None
    template = ChatTemplate(text, config.chat_template_content_format) if text else None
    metrics = None
    if not config.engine.disable_log_stats:
        metrics = Metrics(config.metrics_prefix, config.served_model_name[0], ready)
        client.on_step.append(metrics.on_step)
    sampling = SamplingBuilder(config, ready, tokenizer, generation_defaults(config))
    return Served(config, client, ready, tokenizer, template, sampling, metrics)


def generation_defaults(config: ServerConfig) -> dict[str, Any]:
    """Sampling defaults: overrides over the generation config that --generation-config names."""
    folder = {"": None, "none": None, "auto": config.engine.compile.model}.get(
        config.generation_config, config.generation_config
    )
    stored = read_json(Path(folder) / "generation_config.json") if folder else {}
    merged = {**stored, **dict(config.override_generation_config)}
    return {name: merged[name] for name in DEFAULTS if merged.get(name) is not None}
