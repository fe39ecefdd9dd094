"""POST /v1/messages and /v1/messages/count_tokens (SPEC 24.2).

Tools and blocks are checked one by one (prompt/from_anthropic.py): which fields they have depends on their type.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fuseline.api.protocol.common import MAX_NAME, Fields, raise_field


class CacheControl(Fields):
    """Accepted: prefixes are cached whether a client asks for it or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class AnthropicMessage(Fields):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: list[dict[str, Any]] | None = None
    """Accepted: they say where an earlier text came from."""


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1, max_length=MAX_NAME)
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: str | None = None


class ClientTool(Fields):
    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=MAX_NAME)
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Accepted: arguments are streamed as they come."""
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None


class AnthropicToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> AnthropicToolChoice:
        if self.type == "tool" and not self.name:
            raise_field("name", 'tool_choice.name is needed with the type "tool"')
        return self


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Thinking:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            words = "is needed with" if self.type == "enabled" else "goes with"
            raise_field("budget_tokens", f'thinking.budget_tokens {words} the type "enabled"')
        return self


class OutputFormat(Fields):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Fields):
    user_id: str | None = None


class CountTokensRequest(Fields):
    model: str | None = None
    messages: list[AnthropicMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    speed: Literal["standard", "fast"] | None = None
    # Known, and refused where they ask for something.
    container: str | dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None
    context_management: dict[str, Any] | None = None
    # Anthropic's own, which by their definition change no answer: accepted.
    cache_control: CacheControl | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    stream: bool | None = None
    # Anthropic's own, which by their definition change no answer: accepted.
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
