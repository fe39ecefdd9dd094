"""Bodies of requests to what the engine takes: the one path of every route, in the server or in a worker process."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

from msgspec.structs import replace
from pydantic import BaseModel

from fuseline.api.admission import Admission
from fuseline.api.config import JsonObject, ServerConfig
from fuseline.api.errors import ApiError, bad_request, to_api_error
from fuseline.api.prompt.chat import ChatRenderer, ChatTemplate, RenderedChat
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.limits import Limits
from fuseline.api.prompt.parse import validate
from fuseline.api.prompt.prepared import AnswerOptions, Prepared, PreparedPrompt, Refused, Reply, Written
from fuseline.api.prompt.sampling import SamplingBuilder, refuse_unsupported
from fuseline.api.prompt.token_routes import detokenize, tokenize
from fuseline.api.protocol.chat import ChatRequest, DetokenizeRequest, TokenizeRequest
from fuseline.api.protocol.common import GenerateRequest
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.protocol.json_body import parse_object
from fuseline.engine.messages import EngineReady

LOG = logging.getLogger("fuseline.prompts")
Kind = Literal["chat", "completion", "tokenize", "detokenize"]
MAX_UNKNOWN = 20
"""Names of unknown fields that a warning lists."""


@dataclass(frozen=True)
class PromptSettings:
    """Facts of the server and its model that preparing a request needs; they can be pickled."""

    config: ServerConfig
    ready: EngineReady
    defaults: JsonObject
    """Sampling defaults."""
    template: str | None
    """Text of the chat template."""


class Preparer:
    """Parses, validates, renders and encodes. Raises ConfigError for a template that cannot be used."""

    def __init__(self, settings: PromptSettings, tokenizer: TextTokenizer | None) -> None:
        config = settings.config
        text = settings.template
        template = ChatTemplate(text, config.chat_template_content_format) if text else None
        self._config = config
        self._tokenizer = tokenizer
        self._admission = Admission(config)
        self.limits = Limits(config, settings.ready, tokenizer)
        self._renderer = ChatRenderer(config, template, tokenizer.special_tokens if tokenizer else {})
        self._sampling = SamplingBuilder(config, settings.ready, tokenizer, self.limits, dict(settings.defaults))
        self._steps: dict[Kind, tuple[type[BaseModel], Callable[[Any], Reply]]] = {
            "chat": (ChatRequest, self._chat),
            "completion": (CompletionRequest, self._completion),
            "tokenize": (TokenizeRequest, self._tokenize),
            "detokenize": (DetokenizeRequest, partial(detokenize, self._need_tokenizer, settings.ready.vocab_size)),
        }

    def prepare(self, kind: Kind, raw: bytes) -> Reply:
        """Never raises but for MemoryError: an error that is not the client's is logged and becomes a bare 500."""
        try:
            return self._prepare(kind, raw)
        except RecursionError:
            error = bad_request("the body is nested too deeply")
        except MemoryError:
            raise
        except Exception as failure:
            error = to_api_error(failure)
            if not isinstance(failure, ApiError):
                LOG.exception("a %s request could not be prepared", kind)
        return Refused(error.status, error.body()["error"]["message"], error.param, error.code)

    def _prepare(self, kind: Kind, raw: bytes) -> Reply:
        body_class, step = self._steps[kind]
        fields = parse_object(raw)
        self.limits.check_sizes(fields)
        body = validate(fields, body_class)
        self.limits.check_model(body.model)
        unknown = tuple(sorted(name[:100] for name in islice(body.model_extra or (), MAX_UNKNOWN)))
        return replace(step(body), unknown=unknown)

    def _completion(self, body: CompletionRequest) -> Prepared:
        refuse_unsupported(body)
        _check_completion(body)
        texts = _as_list(body.prompt)
        self._admission.check(body, len(texts))
        prompts = tuple(self._completion_prompt(body, text) for text in texts)
        params = self._sampling.build(body, body.logprobs, prompts[0].max_tokens)
        if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=body.logprobs)
        answer = _answer(body, is_structured=params.grammar is not None)
        return Prepared(prompts, params, replace(answer, num_logprobs=body.logprobs))

    def _completion_prompt(self, body: CompletionRequest, text: str | list[int]) -> PreparedPrompt:
        is_text = isinstance(text, str)
        encoded = self._encode(body, text, body.add_special_tokens is not False) if is_text else text
        self.limits.check_prompt(encoded)
        ids = self.limits.truncate(encoded, body.truncate_prompt_tokens)
        limit = self._sampling.max_tokens(body, len(ids), body.max_tokens)
        echo = None
        if body.echo:
            is_whole = is_text and len(ids) == len(encoded)
            echo = text if is_whole else self._need_tokenizer().decode(ids, False)
        return PreparedPrompt(array("i", ids).tobytes(), limit, echo)

    def _chat(self, body: ChatRequest) -> Prepared:
        refuse_unsupported(body)
        _check_chat(body)
        self._admission.check(body)
        self._need_tokenizer()
        if body.reasoning_effort is not None:  # a variable of the templates that know it
            body.chat_template_kwargs = {"reasoning_effort": body.reasoning_effort, **(body.chat_template_kwargs or {})}
        rendered = self._renderer.render(body)
        encoded = self._encode(body, rendered.text, bool(body.add_special_tokens))
        self.limits.check_prompt(encoded, "messages")
        ids = self.limits.truncate(encoded, body.truncate_prompt_tokens)
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        limit = self._sampling.max_tokens(body, len(ids), asked)
        top = (body.top_logprobs or 0) if body.logprobs else None
        params = self._sampling.build(body, top, limit)
        prompt = PreparedPrompt(array("i", ids).tobytes(), limit)
        shown = rendered.text if len(ids) == len(encoded) else None
        answer = replace(_answer(body, params.grammar is not None), num_logprobs=top)
        return Prepared((prompt,), params, self._chat_answer(body, rendered, answer), shown)

    def _chat_answer(self, body: ChatRequest, rendered: RenderedChat, answer: AnswerOptions) -> AnswerOptions:
        last = body.messages[-1]
        role = self._config.response_role if rendered.opens_answer else last.role
        echo = last.content if body.echo and last.role == role and isinstance(last.content, str) else ""
        self.limits.check_text(echo)
        return replace(answer, request_id=body.request_id, role=role, echo=echo)

    def _tokenize(self, body: TokenizeRequest) -> Written:
        tokenizer = self._need_tokenizer()
        return tokenize(body, tokenizer, self._renderer, self.limits.context)

    def _encode(self, body: GenerateRequest, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._need_tokenizer()
        if body.truncate_prompt_tokens is None:
            self.limits.check_text(text)
        return tokenizer.encode(text, add_special_tokens)

    def _need_tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init): send token ids", "prompt")
        return self._tokenizer


def _answer(body: GenerateRequest, is_structured: bool) -> AnswerOptions:
    """A grammar alone says where a structured answer ends: stop strings within it are text."""
    options = body.stream_options
    return AnswerOptions(
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        wants_ids=bool(body.return_token_ids),
        shows_ids=body.return_tokens_as_token_ids,
        stops=() if is_structured else tuple(body.stops),
        includes_stop=bool(body.include_stop_str_in_output),
        skips_special=body.skip_special_tokens is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def _as_list(prompt: str | list) -> list:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise bad_request("Prompt cannot be empty", "prompt")
    return prompt


def _check_completion(body: CompletionRequest) -> None:
    if body.suffix:
        raise bad_request("suffix is not currently supported", "suffix", "unsupported_value")
    if body.stream and body.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1 (0 goes with echo only)", "max_tokens")


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if body.stream and body.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.tools is not None and not body.tools:
        raise bad_request("tools must not be an empty list", "tools")
    if body.tool_choice not in (None, "none") and not body.tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if body.tools and body.tool_choice != "none":
        raise bad_request('tools are not supported yet (tool_choice "none" is)', "tools", "unsupported_value")
