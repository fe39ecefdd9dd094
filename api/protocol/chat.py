"""POST /v1/chat/completions, and the chat form of /tokenize."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from fuseline.api.protocol.common import (
    MAX_NAME,
    CacheOptions,
    CacheRetention,
    Fields,
    GenerateRequest,
    ServiceTier,
    Verbosity,
)


class Message(Fields):
    role: str = Field(max_length=MAX_NAME)
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    # Known, and refused where they hold something.
    function_call: Any = None
    audio: Any = None


class ChatFields(BaseModel):
    """Fields that decide how a conversation becomes a prompt."""

    messages: list[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class PredictedText(Fields):
    type: Literal["text"]
    text: str


class Prediction(Fields):
    """Accepted: it says what the answer may be like, and changes none."""

    type: Literal["content"]
    content: str | list[PredictedText]


class ChatRequest(ChatFields, GenerateRequest):
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Any text: templates have levels of their own."""
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(None, ge=-1)
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    verbosity: Verbosity | None = None
    moderation: dict[str, Any] | None = None
    # OpenAI's own, which by their definition change no answer: accepted.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: CacheRetention | None = None
    prediction: Prediction | None = None


class TokenizeRequest(Fields):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: list[int]
