"""Request fields that completions and chat share (SPEC 4.1). Types and ranges only; meaning is in prompt/."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_NAME = 256
"""Characters of what the chunks of an answer repeat."""
MAX_PENALTY = 1e30
"""Largest repetition penalty, and one over the smallest: logits times or over it stay finite in float32."""
MAX_LENGTH_PENALTY = 50
"""Largest power of a length, and of one over it, that beam search may take: it stays finite for any context."""
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Fields(BaseModel):
    """Unknown fields are accepted and ignored; no number is NaN or infinite, also not as text ("nan")."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
CacheRetention = Literal["in_memory", "in-memory", "24h"]


class CacheOptions(Fields):
    """Accepted: prefixes are cached whether a client asks for it or not."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted: chunks are never padded."""


class JsonSchema(Fields):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: str
    json_schema: JsonSchema | None = None


class GenerationDefaults(Fields):
    """Sampling fields that the server may have defaults for (SPEC 6.12)."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1 / MAX_PENALTY, le=MAX_PENALTY)
    max_new_tokens: int | None = Field(None, ge=1)


class GenerateRequest(Fields):
    """null means the default. How many of each a request may have is in api/admission.py."""

    model: str | None = None
    best_of: int | None = Field(None, ge=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = None
    request_id: str | None = Field(None, max_length=MAX_NAME)
    use_beam_search: bool | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1 / MAX_PENALTY, le=MAX_PENALTY)
    length_penalty: float | None = Field(None, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = Field(None, ge=-1)
    logprob_token_ids: list[int] | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Int64 | None = None
    cache_salt: str | None = Field(None, min_length=1)
    logits_processors: list[Any] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerateRequest:
        if self.stream_options is not None and not self.stream:
            raise_field("stream_options", "Stream options can only be defined when `stream=True`.")
        return self

    @property
    def num_choices(self) -> int:
        """Choices of each prompt that are shown."""
        return self.n or 1

    @property
    def num_generated(self) -> int:
        """Choices of each prompt that are generated."""
        return max(self.num_choices, self.best_of or 0)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class FieldError(ValueError):
    """A cross-field check that failed; `param` names the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def raise_field(param: str, message: str) -> None:
    raise FieldError(param, message)
