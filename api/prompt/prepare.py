"""Bodies of requests to what the engine takes: the one path of every route, in the server or in a worker process."""

from __future__ import annotations

import json
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
from fuseline.api.parsers.registry import declared_formats
from fuseline.api.prompt import from_anthropic, from_responses
from fuseline.api.prompt.chat import ChatRenderer, RenderedChat, named_templates
from fuseline.api.prompt.completion_prompt import CompletionPrompts
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.field_checks import check_budget, check_request
from fuseline.api.prompt.grammar import has_format
from fuseline.api.prompt.limits import Limits
from fuseline.api.prompt.parse import renamed_fields, validate
from fuseline.api.prompt.prepared import AnswerOptions, BeamOptions, Prepared, PreparedPrompt, Refused, Reply, Written
from fuseline.api.prompt.sampling import SamplingBuilder
from fuseline.api.prompt.token_routes import detokenize, tokenize
from fuseline.api.prompt.tool_grammar import Answers, thinking_budget, thinking_of, with_grammar
from fuseline.api.prompt.tools import parse_options, read_tools
from fuseline.api.protocol.anthropic import CountTokensRequest, MessagesRequest
from fuseline.api.protocol.chat import ChatRequest, DetokenizeRequest, TokenizeRequest
from fuseline.api.protocol.common import GenerateRequest
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.protocol.json_body import parse_object
from fuseline.api.protocol.responses import ResponsesRequest
from fuseline.engine.messages import EngineReady

LOG = logging.getLogger("fuseline.prompts")
Kind = Literal["chat", "completion", "responses", "messages", "count_tokens", "tokenize", "detokenize"]
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
        self._config = config
        self._tokenizer = tokenizer
        self._admission = Admission(config)
        self.limits = Limits(config, settings.ready, tokenizer)
        self._formats = declared_formats(config, settings.template or "")
        self._prompts = CompletionPrompts(tokenizer, self.limits)
        self.renderer = ChatRenderer(config, settings.template, named_templates(tokenizer), tokenizer)
        self._sampling = SamplingBuilder(config, settings.ready, tokenizer, self.limits, dict(settings.defaults))
        self._steps: dict[Kind, tuple[type[BaseModel], Callable[[Any], Reply]]] = {
            "chat": (ChatRequest, self._chat),
            "completion": (CompletionRequest, self._completion),
            "responses": (ResponsesRequest, self._responses),
            "messages": (MessagesRequest, self._messages),
            "count_tokens": (CountTokensRequest, self._count_tokens),
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
        unknown = _unknown_fields(body)
        if unknown and self._config.strict_requests:
            message = f"unknown fields: {', '.join(unknown)} (this server takes known ones only: --strict-requests)"
            raise bad_request(message, unknown[0], "unknown_parameter")
        return replace(step(body), unknown=unknown)

    def _completion(self, body: CompletionRequest) -> Prepared:
        check_request(body, self._config)
        texts = _as_list(body.prompt)
        self._admission.check(body, len(texts))
        prompts = tuple(self._completion_prompt(body, text) for text in texts)
        params = self._sampling.build(body, body.logprobs, prompts[0].max_tokens)
        if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=params.logprobs)
        shown = None if body.logprobs is None else params.logprobs
        answer = _answer(body, params.is_structured)
        return Prepared(prompts, params, replace(answer, num_logprobs=shown, is_one_event=_is_ranked(body)))

    def _completion_prompt(self, body: CompletionRequest, text: str | list[int]) -> PreparedPrompt:
        ids, echo = self._prompts.encode(body, text)
        limit = self._sampling.max_tokens(body, len(ids), body.max_tokens, ("prompt", "max_tokens"))
        return PreparedPrompt(array("i", ids).tobytes(), limit, echo)

    def _chat(self, body: ChatRequest) -> Prepared:
        use = read_tools(body, self._config)
        check_request(body, self._config)
        check_budget(body, self._config)
        self._admission.check(body)
        self._need_tokenizer("messages")
        rendered = self.renderer.render(body)
        encoded = self._encode(body, rendered)
        self.limits.check_prompt(encoded, "messages")
        ids = encoded[self.limits.kept(len(encoded), body)]
        asked_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        limit = self._sampling.max_tokens(body, len(ids), getattr(body, asked_name), ("messages", asked_name))
        top = (body.top_logprobs or 0) if body.logprobs else None
        params = self._sampling.build(body, top, limit, "top_logprobs")
        if top is not None:
            top = len(params.logprob_token_ids) + 1 if params.logprob_token_ids else params.logprobs
        prompt = PreparedPrompt(array("i", ids).tobytes(), limit)
        shown = rendered.text if len(ids) == len(encoded) else None
        parse = parse_options(body, use, rendered, self._config)
        if parse:
            thinking = thinking_of(body, parse.start, self._config)
            answers = Answers(thinking, self._formats, self._need_tokenizer())
            params = with_grammar(params, use, answers, has_format=has_format(body))
            if body.thinking_token_budget not in (None, -1):
                has_calls = use.choice != "none" or params.grammar is not None
                params = replace(params, thinking=thinking_budget(body.thinking_token_budget, answers, has_calls))
        if params.has_masks:
            self._sampling.check_grammar(body)
        answer = replace(_answer(body, params.is_structured), num_logprobs=top, parse=parse)
        return Prepared((prompt,), params, self._chat_answer(body, rendered, answer), shown)

    def _chat_answer(self, body: ChatRequest, rendered: RenderedChat, answer: AnswerOptions) -> AnswerOptions:
        last = body.messages[-1]
        role = self._config.response_role if rendered.opens_answer else last.role
        echo = rendered.last_text if body.echo and last.role == role else ""
        self.limits.check_text(echo, "messages")
        return replace(answer, role=role, echo=echo)

    def _responses(self, body: ResponsesRequest) -> Prepared:
        with renamed_fields(from_responses.RENAMED):
            prepared = self._chat(from_responses.chat_of_responses(body))
        items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
        kept = items if body.store is not False else None
        shown = from_responses.shown_fields(body)
        return replace(prepared, answer=replace(prepared.answer, shown=shown, items=kept))

    def _messages(self, body: MessagesRequest) -> Prepared:
        with renamed_fields(from_anthropic.RENAMED):
            return self._chat(from_anthropic.chat_of_messages(body))

    def _count_tokens(self, body: CountTokensRequest) -> Written:
        with renamed_fields(from_anthropic.RENAMED):
            chat = from_anthropic.chat_of_messages(body)
            ids = self._encode(chat, self.renderer.render(chat))
            return Written([json.dumps({"input_tokens": len(ids)}).encode()])

    def _tokenize(self, body: TokenizeRequest) -> Written:
        tokenizer = self._need_tokenizer()
        return tokenize(body, tokenizer, self.renderer, self.limits.context)

    def _encode(self, body: ChatRequest, rendered: RenderedChat) -> list[int]:
        tokenizer = self._need_tokenizer()
        if body.truncate_prompt_tokens is None:
            self.limits.check_text(rendered.text, "messages")
        return tokenizer.encode_chat(rendered.text, rendered.literals, bool(body.add_special_tokens))

    def _need_tokenizer(self, param: str = "prompt") -> TextTokenizer:
        if self._tokenizer is None:
            raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init): send token ids", param)
        return self._tokenizer


def _answer(body: GenerateRequest, is_structured: bool) -> AnswerOptions:
    """A grammar alone says where a structured answer ends: stop strings within it are text."""
    options = body.stream_options
    length_penalty = 1.0 if body.length_penalty is None else body.length_penalty
    return AnswerOptions(
        n=body.num_choices,
        beams=BeamOptions(length_penalty) if body.use_beam_search else None,
        request_id=body.request_id,
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


def _is_ranked(body: GenerateRequest) -> bool:
    """Whether choices are picked at the end: best_of, beam search."""
    return bool(body.use_beam_search) or body.num_generated != body.num_choices


def _unknown_fields(body: BaseModel) -> tuple[str, ...]:
    options = getattr(body, "stream_options", None)
    names = (*(body.model_extra or ()), *(f"stream_options.{name}" for name in (options and options.model_extra) or ()))
    return tuple(sorted(name[:100] for name in islice(names, MAX_UNKNOWN)))


def _as_list(prompt: str | list) -> list:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise bad_request("Prompt cannot be empty", "prompt")
    return prompt
