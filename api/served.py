"""What every route works with: the model being served, its tokenizer, template, limits and engine."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fuseline.api.admission import Admission
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import ApiError, bad_request, to_api_error
from fuseline.api.metrics import Metrics
from fuseline.api.output.generation import Generation, TextOptions
from fuseline.api.output.logprobs import LogprobWriter
from fuseline.api.output.watch import RequestWatch
from fuseline.api.prompt.chat_template import ChatTemplate, template_text
from fuseline.api.prompt.sampling import SamplingBuilder
from fuseline.api.prompt.tokens import TextTokenizer, read_json
from fuseline.api.protocol.common import GenerateRequest, GenerationDefaults
from fuseline.engine.client import EngineClient
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
    admission: Admission
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

    def need_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init): send token ids", "prompt")
        return self.tokenizer

    def logprob_writer(self, request: GenerateRequest) -> LogprobWriter:
        asked = request.return_tokens_as_token_ids
        return LogprobWriter(self.tokenizer, self.config.return_tokens_as_token_ids if asked is None else asked)

    def generation(
        self, request: GenerateRequest, prompt: list[int], params: SamplingParams, label: str
    ) -> Generation:
        """One prompt on its way through the engine, with metrics and the request log."""
        engine_request = EngineRequest(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(prompt), params=params,
            priority=request.priority or 0, arrival_time=time.time(), cache_salt=request.cache_salt or "",
        )  # fmt: skip
        options = TextOptions(
            request.stops, bool(request.include_stop_str_in_output), request.skip_special_tokens is not False,
            params.min_tokens, self.config.stream_interval,
        )  # fmt: skip
        watch = RequestWatch(
            engine_request, label, self.metrics, self.config.enable_log_outputs, self.config.max_log_len
        )
        return Generation(engine_request, self.tokenizer, options, watch)

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
    return Served(config, client, ready, tokenizer, template, sampling, metrics, Admission(config))


def generation_defaults(config: ServerConfig) -> dict[str, Any]:
    """Sampling defaults: overrides over the generation config that --generation-config names."""
    folder = {"": None, "none": None, "auto": config.engine.compile.model}.get(
        config.generation_config, config.generation_config
    )
    stored = read_json(Path(folder) / "generation_config.json") if folder else {}
    overrides = dict(config.override_generation_config)
    if unknown := sorted(set(overrides) - set(DEFAULTS)):
        raise ConfigError(
            f"--override-generation-config: {unknown[0]} has no effect here (keys: {', '.join(sorted(DEFAULTS))})"
        )
    merged = {**stored, **overrides}
    found = {name: merged[name] for name in DEFAULTS if merged.get(name) is not None}
    try:
        GenerationDefaults.model_validate(found, strict=True)
    except ValidationError as error:
        raise ConfigError(f"generation config: {to_api_error(error).message}") from error
    return found
