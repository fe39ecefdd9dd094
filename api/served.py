"""What every route works with: the model being served, its tokenizer, template, limits and engine."""

from __future__ import annotations

import logging
import time
import uuid
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError
from fuseline.api.metrics import FinishedRequest, Metrics
from fuseline.api.output.events import Done, Event, TextDelta
from fuseline.api.output.generation import TextOptions, generate_events
from fuseline.api.output.interval import in_intervals
from fuseline.api.output.logprobs import LogprobWriter
from fuseline.api.output.openai_completion import Prompt, Shape
from fuseline.api.prompt.bodies import Bodies
from fuseline.api.prompt.chat import template_text
from fuseline.api.prompt.encode import TextTokenizer, read_json
from fuseline.api.prompt.pool import PromptPool
from fuseline.api.prompt.prepare import Kind, Preparer, PromptSettings
from fuseline.api.prompt.prepared import Prepared, Refused, Written
from fuseline.api.prompt.sampling import queue_is_full
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineReady, EngineRequest, SamplingParams

LOG = logging.getLogger("fuseline.requests")
SMALL_BYTES = 8192
"""A completion's body up to this size is prepared in this process: less than 10 ms, whatever it holds."""
SHORT_BYTES = 65536
"""Bodies up to this size have processes of their own, so that they wait for none of the large ones."""
NICENESS = 5
"""Of the processes for large bodies, which may not take the cores from the engine."""
MAX_SHOWN = 32
"""Entries of a list that a log line shows."""
NO_PARAMS = SamplingParams()
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
    metrics: Metrics | None
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    num_requests: int = 0

    @property
    def name(self) -> str:
        return self.config.served_model_name[0]

    def check_model(self, name: str | None) -> None:
        self.preparer.limits.check_model(name)

    def check_ready(self) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="server_stopping", retry_after=5)
        if full := queue_is_full(self.client.num_in_flight, self.config):
            raise full

    async def prepare(self, kind: Kind, pieces: list[bytes]) -> Prepared | Written:
        """A body made ready for the engine, or the answer where that needs none. Raises ApiError."""
        size = sum(map(len, pieces))
        if self.pools is None or (kind == "completion" and size <= SMALL_BYTES):
            reply = self.preparer.prepare(kind, b"".join(pieces))
        else:
            reply = await self.pools[size > SHORT_BYTES].prepare(kind, pieces)
        if isinstance(reply, Refused):
            raise ApiError(reply.status, reply.message, reply.param, reply.code)
        return reply

    def prompts(self, prepared: Prepared) -> list[Prompt]:
        n = prepared.params.n
        return [Prompt(prompt.ids, k * n, prompt.echo) for k, prompt in enumerate(prepared.prompts)]

    def shape(self, prepared: Prepared, id: str) -> Shape:
        """What all chunks of the answer share."""
        answer, config = prepared.answer, self.config
        shows_ids = config.return_tokens_as_token_ids if answer.shows_ids is None else answer.shows_ids
        return Shape(
            id=id, created=int(time.time()), model=self.name, writer=LogprobWriter(self.tokenizer, shows_ids),
            wants_logprobs=answer.num_logprobs is not None, num_top=answer.num_logprobs or 0,
            wants_ids=answer.wants_ids, include_usage=answer.include_usage or config.enable_force_include_usage,
            continuous_usage=answer.continuous_usage, shows_cached=config.enable_prompt_tokens_details,
            role=answer.role, echo=answer.echo,
        )  # fmt: skip

    async def events(self, prepared: Prepared, index: int, label: str) -> AsyncIterator[Event]:
        """Runs one of the prompts, with metrics and the request log, in deltas of --stream-interval."""
        interval = self.config.stream_interval
        async with aclosing(self._observed(prepared, index, label)) as observed:
            async for event in in_intervals(observed, interval) if interval > 1 else observed:
                yield event

    async def _observed(self, prepared: Prepared, index: int, label: str) -> AsyncIterator[Event]:
        arrival = time.time()
        prompt, answer = prepared.prompts[index], prepared.answer
        params = replace(prepared.params, max_tokens=prompt.max_tokens)
        ids = prompt.ids
        self.log_request(label, ids if prepared.text is None else prepared.text, params)
        engine_request = EngineRequest(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(ids), params=params,
            priority=answer.priority, arrival_time=arrival,
        )  # fmt: skip
        options = TextOptions(answer.stops, answer.includes_stop, answer.skips_special, params.min_tokens)
        kept = FinishedRequest(len(ids), params.n, params.max_tokens, arrival)
        texts: dict[int, str] = {}
        try:
            async with aclosing(generate_events(self.client, engine_request, self.tokenizer, options)) as events:
                async for event in events:
                    self._observe(kept, event)
                    if self.config.enable_log_outputs:
                        self._log_output(label, texts, event)
                    yield event
        except ApiError:
            kept.reasons += ["error"] * (params.n - len(kept.reasons))
            raise
        finally:
            if len(kept.reasons) < params.n:
                LOG.info("%s aborted", label)
                kept.reasons += ["abort"] * (params.n - len(kept.reasons))
            if self.metrics:
                self.metrics.take_finished(kept)

    def _observe(self, kept: FinishedRequest, event: Event) -> None:
        if isinstance(event, Done):
            kept.reasons.append(event.finish_reason)
        elif isinstance(event, TextDelta) and event.token_ids:
            kept.num_generated += len(event.token_ids)
            now = time.time()
            last = kept.last.get(event.index)
            kept.first_token = kept.first_token or now
            if last is not None and self.metrics:
                self.metrics.take_gap((now - last) / len(event.token_ids))
            kept.last[event.index] = now

    def _log_output(self, label: str, texts: dict[int, str], event: Event) -> None:
        """One line per choice, when it ends."""
        if isinstance(event, TextDelta):
            texts[event.index] = texts.get(event.index, "") + event.text
        elif isinstance(event, Done):
            text = texts.pop(event.index, "")[: self.config.max_log_len]
            LOG.info("%s: output %d %r, %s", label, event.index, text, event.finish_reason)

    def log_request(self, label: str, prompt: str | array[int], params: SamplingParams) -> None:
        if self.config.disable_log_requests:
            return
        limit = self.config.max_log_len
        shown = prompt[:limit]
        LOG.info("%s: prompt %r, %s", label, shown if isinstance(shown, str) else shown.tolist(), _brief(params))

    def close(self) -> None:
        """End the processes that prepare requests."""
        for pool in self.pools or ():
            pool.close()


def _brief(params: SamplingParams) -> str:
    """The settings that are not the default; of a long list its length."""
    shown = []
    for name, value in msgspec.structs.asdict(params).items():
        if value == getattr(NO_PARAMS, name):
            continue
        is_long = isinstance(value, tuple) and len(value) > MAX_SHOWN
        shown.append(f"{name}=<{len(value)} entries>" if is_long else f"{name}={value!r}")
    return ", ".join(shown)


def load_tokenizer(config: ServerConfig) -> TextTokenizer | None:
    """None when the server is to run without. Raises ConfigError."""
    return None if config.skip_tokenizer_init else TextTokenizer(config.tokenizer_dir)


def build_served(
    config: ServerConfig, client: EngineClient, ready: EngineReady, tokenizer: TextTokenizer | None
) -> Served:
    """Raises ConfigError for a template that cannot be used."""
    template = template_text(config.chat_template, tokenizer.chat_template) if tokenizer else None
    settings = PromptSettings(config, ready, tuple(generation_defaults(config).items()), template)
    preparer = Preparer(settings, tokenizer)
    metrics = None
    if not config.engine.disable_log_stats:
        metrics = Metrics(config.metrics_prefix, config.served_model_name[0], ready)
        client.on_step.append(metrics.on_step)
    pools = None
    if config.prompt_workers:
        pools = (PromptPool(settings, config.prompt_workers), PromptPool(settings, config.prompt_workers, NICENESS))
        pools[0].start()
    return Served(config, client, ready, tokenizer, preparer, pools, Bodies(config.max_request_bytes), metrics)


def generation_defaults(config: ServerConfig) -> dict[str, Any]:
    """Sampling defaults: overrides over the generation config that --generation-config names."""
    folder = {"": None, "none": None, "auto": config.engine.compile.model}.get(
        config.generation_config, config.generation_config
    )
    stored = read_json(Path(folder) / "generation_config.json") if folder else {}
    merged = {**stored, **dict(config.override_generation_config)}
    return {name: merged[name] for name in DEFAULTS if merged.get(name) is not None}
