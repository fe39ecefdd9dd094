"""POST /v1/responses (SPEC 24.1)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fuseline.api.protocol.common import Fields, Int64


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
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    top_logprobs: int | None = Field(None, ge=0)
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and refused where they ask for something.
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[dict[str, Any]] | None = None
    # OpenAI's own, which by their definition change no answer: accepted.
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
