"""POST /v1/completions."""

from __future__ import annotations

from pydantic import Field

from fuseline.api.protocol.common import GenerateRequest


class CompletionRequest(GenerateRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(16, ge=0)
    suffix: str | None = None
