"""POST /v1/responses (SPEC 24.1).

Tools and items of the input are checked one by one (prompt/from_responses.py): their fields depend on their type.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fuseline.api.protocol.common import (
    MAX_NAME,
    CacheOptions,
    CacheRetention,
    Effort,
    Fields,
    Int64,
    ServiceTier,
    Verbosity,
    raise_field,
)

Summary = Literal["auto", "concise", "detailed"]


class Reasoning(Fields):
    effort: Effort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    mode: str | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise_field("schema", 'text.format.schema is needed with the type "json_schema"')
        return self


class TextConfig(Fields):
    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ObfuscationOptions(Fields):
    include_obfuscation: bool | None = None
    """Accepted: chunks are never padded."""


class TextPart(Fields):
    text: str


class Item(Fields):
    """What every item may have beside its own fields: accepted, as it tells of the item's past."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item):
    name: str = Field(min_length=1, max_length=MAX_NAME)
    arguments: str
    call_id: str
    namespace: str | None = None


class CallOutputItem(Item):
    call_id: str
    output: str | list[dict[str, Any]]


class ReasoningItem(Item):
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class FunctionTool(Fields):
    name: str = Field(min_length=1, max_length=MAX_NAME)
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class ResponsesRequest(Fields):
    model: str | None = None
    input: str | list[Any] = Field(max_length=2**26)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: Int64 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: int | None = Field(None, ge=0)
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and refused where they ask for something.
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[dict[str, Any]] | None = None
    moderation: dict[str, Any] | None = None
    # OpenAI's own, which by their definition change no answer: accepted.
    service_tier: ServiceTier | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: CacheRetention | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    """Of tools that this server would run, and it runs none."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise_field("stream_options", "Stream options can only be defined when `stream=True`.")
        return self
