"""Checks of fields against each other and against the server, before anything is rendered or encoded (SPEC 4 to 6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fuseline.api.config import ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.protocol.common import GenerateRequest
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.engine.params import LogitsProcessor
from fuseline.engine.run.logits_processors import find_callable

REFUSED: dict[str, str] = {
    "vllm_xargs": "no extension of this server takes extra arguments",
    "kv_transfer_params": "this server hands no KV cache to another one",
    "mm_processor_kwargs": "this model takes text only",
    "prompt_embeds": "this server takes texts and token ids",
    "functions": "they have become `tools`; send those",
    "function_call": "it has become `tool_choice`; send that",
    "audio": "this model gives text only",
    "moderation": "this server moderates no texts",
    "web_search_options": "this server does not search",
}
"""Known fields with nothing here that could heed them -> why. Empty ones ask for nothing and pass."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"), "modalities": (["text"],), "verbosity": ("medium",),
}  # fmt: skip
"""Values that ask for what the server does anyway."""
ONLY = ("modalities", "verbosity")
"""Fields of which the server knows one value."""


def refuse_fields(request: BaseModel, refused: Mapping[str, str], where: str = "") -> None:
    """Raises ApiError 400 for a field of `refused` (name -> why), of the object at `where`, that asks for something."""
    for name, why in refused.items():
        value = getattr(request, name, None)
        if value and value not in NEUTRAL.get(name, ()):
            path = f"{where}.{name}" if where else name
            raise bad_request(f"{path} is not supported: {why}", path, "unsupported_value")


def check_callers(tool: BaseModel, where: str) -> None:
    """Raises ApiError 400 for a tool, at `where`, that the model itself may not call."""
    if tool.allowed_callers is not None and "direct" not in tool.allowed_callers:
        words = f'{where}.allowed_callers: "direct" must be among them, as nobody else calls here'
        raise bad_request(words, f"{where}.allowed_callers", "unsupported_value")


def check_request(request: GenerateRequest, config: ServerConfig) -> None:
    """Raises ApiError 400 for fields that do not go together, or that this server cannot heed."""
    refuse_fields(request, {**REFUSED, **{name: f"this server knows only {NEUTRAL[name][0]!r}" for name in ONLY}})
    if request.stream and request.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise bad_request("truncation_side goes with truncate_prompt_tokens", "truncation_side")
    _check_choices(request, config)
    if isinstance(request, CompletionRequest):
        _check_completion(request)
    elif isinstance(request, ChatRequest):
        _check_chat(request)


def _check_choices(request: GenerateRequest, config: ServerConfig) -> None:
    """Choices that are ranked: best_of and beam search."""
    n, best_of = request.num_choices, request.best_of
    if best_of is not None and best_of < n:
        raise bad_request(f"best_of ({best_of}) must not be smaller than n ({n})", "best_of")
    if request.use_beam_search and best_of not in (None, n):
        raise bad_request("best_of does not go with use_beam_search, whose width is n", "best_of")
    if request.length_penalty not in (None, 1.0) and not request.use_beam_search:
        raise bad_request("length_penalty goes with use_beam_search only", "length_penalty")
    ranked = "use_beam_search" if request.use_beam_search else "best_of" if best_of not in (None, n) else ""
    if ranked and config.engine.logprobs_mode.endswith("logits"):
        message = f"{ranked} needs log-probabilities, and this server runs with --logprobs-mode"
        raise bad_request(f"{message} {config.engine.logprobs_mode}", ranked, "unsupported_value")


def _check_completion(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1 (0 goes with echo only)", "max_tokens")
    if body.max_tokens == 0 and body.use_beam_search:
        raise bad_request("max_tokens must be at least 1 with use_beam_search", "max_tokens")
    if body.logprob_token_ids and body.logprobs is None:
        raise bad_request("when using `logprob_token_ids`, `logprobs` must be set.", "logprob_token_ids")


def check_budget(body: ChatRequest, config: ServerConfig) -> None:
    """Raises ApiError 400 where reasoning is to be bounded and the server does not know which text it is."""
    if body.thinking_token_budget not in (None, -1) and not config.reasoning_parser:
        message = "thinking_token_budget needs a server that is started with --reasoning-parser"
        raise bad_request(message, "thinking_token_budget", "unsupported_value")


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if body.logprob_token_ids and not body.logprobs:
        raise bad_request("when using `logprob_token_ids`, `logprobs` must be set to true.", "logprob_token_ids")
    if body.stream and body.num_generated != body.num_choices:
        raise bad_request("best_of other than n cannot be streamed", "best_of")


def read_processors(values: list[Any] | None, pattern: str) -> tuple[LogitsProcessor, ...]:
    """logits_processors of a request, gated by --logits-processor-pattern. Raises ApiError 400."""
    if not values:
        return ()
    if not pattern:
        raise bad_request(
            "The `logits_processors` argument is not supported by this server. See --logits-processor-pattern of "
            "fuseline serve.", "logits_processors", "unsupported_value",
        )  # fmt: skip
    return tuple(_read_processor(value, f"logits_processors[{k}]", pattern) for k, value in enumerate(values))


def _read_processor(value: Any, where: str, pattern: str) -> LogitsProcessor:
    found = {"qualname": value} if isinstance(value, str) else value
    if not isinstance(found, Mapping) or not isinstance(found.get("qualname"), str):
        raise bad_request(f"{where} must be a dotted name or an object with a `qualname`", where)
    qualname, args, kwargs = found["qualname"], found.get("args") or [], found.get("kwargs") or {}
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise bad_request(f"{where}: args must be a list and kwargs an object", where)
    if re.match(pattern, qualname) is None:
        words = f"Logits processor '{qualname}' is not allowed by this server. See --logits-processor-pattern"
        raise bad_request(f"{words} of fuseline serve.", where, "unsupported_value")
    try:
        find_callable(qualname)
    except ValueError as error:
        raise bad_request(f"Logits processor '{qualname}' could not be resolved: {error}", where) from error
    return LogitsProcessor(qualname=qualname, is_factory=found is value, args=tuple(args), kwargs=kwargs)
