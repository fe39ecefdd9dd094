"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, FailFast, Field, Tag
from typing_extensions import TypeAliasType

from fuseline.api.protocol.common import GenerateRequest


def _prompt_kind(prompt: Any) -> str:
    """The form that the first element has, so that a wrong later one is one error and not one for each form."""
    if not isinstance(prompt, list):
        return "str"
    first = prompt[0] if prompt else ""
    return "list[str]" if isinstance(first, str) else "list[list[int]]" if isinstance(first, list) else "list[int]"


# Aliases, since a union takes only what can be hashed.
Texts = TypeAliasType("Texts", Annotated[list[str], FailFast()])
Ids = TypeAliasType("Ids", Annotated[list[int], FailFast()])
ManyIds = TypeAliasType("ManyIds", Annotated[list[Ids], FailFast()])
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[Texts, Tag("list[str]")]
    | Annotated[Ids, Tag("list[int]")]
    | Annotated[ManyIds, Tag("list[list[int]]")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerateRequest):
    prompt: Prompt
    logprobs: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(16, ge=0)
    suffix: str | None = None
    prompt_embeds: Any = None
