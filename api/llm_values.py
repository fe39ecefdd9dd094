"""Inputs and outputs of `LLM`: prompts, sampling settings in any shape, frozen outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import msgspec

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids (a list or an array), or {"prompt": text} or {"prompt_token_ids": ids}."""
Sampling = Mapping[str, Any] | object


@dataclass(frozen=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    """In the form of the API's answer."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """In the form of the API's answer, where tools were given."""
    reasoning: str | None = None
    """Text in front of the answer, where the server has a reasoning parser."""


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one prompt."""

    prompt: Prompt | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: dict[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text, a mapping or a list of token ids is one prompt; anything else is many."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    is_one = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return [prompts] if is_one else list(prompts)


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """The request fields of a prompt. Raises ValueError for what is none."""
    if not isinstance(prompt, Mapping):
        return {"prompt": plain(prompt)}
    given = {name: value for name, value in prompt.items() if value is not None}
    if unknown := sorted(set(given) - {"prompt", "prompt_token_ids", "cache_salt"}):
        raise ValueError(f"a prompt cannot hold {unknown[0]!r} (keys: prompt, prompt_token_ids, cache_salt)")
    found = given.get("prompt_token_ids", given.get("prompt"))
    if found is None:
        raise ValueError("a prompt needs prompt or prompt_token_ids")
    return {"prompt": plain(found)} | {name: given[name] for name in ("cache_salt",) if name in given}


def plain(prompt: str | Sequence[int]) -> str | list[int]:
    """A text, or token ids as a list. Raises ValueError."""
    if isinstance(prompt, str):
        return prompt
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not all(isinstance(token, Integral) for token in ids):
        raise ValueError("token ids must be whole numbers in one dimension")
    return [int(token) for token in ids]


def per_prompt(sampling: Sampling | Sequence[Sampling] | None, num: int) -> list[dict[str, Any]]:
    if not isinstance(sampling, list | tuple):
        return [request_fields(sampling)] * num
    if len(sampling) != num:
        raise ValueError(f"{len(sampling)} sampling settings for {num} prompts; give one for all or one for each")
    return [request_fields(item) for item in sampling]


def request_fields(sampling: Sampling | None) -> dict[str, Any]:
    """Request fields of a mapping, dataclass, msgspec struct or object with attributes; None is unset."""
    if sampling is None:
        return {}
    if isinstance(sampling, Mapping):
        found = dict(sampling)
    elif isinstance(sampling, msgspec.Struct):
        found = msgspec.structs.asdict(sampling)
    else:
        found = dataclasses.asdict(sampling) if dataclasses.is_dataclass(sampling) else dict(vars(sampling))
    return {name: value for name, value in found.items() if value is not None and not name.startswith("_")}


def request_output(prompt: Prompt | None, answer: dict[str, Any]) -> RequestOutput:
    choices = answer["choices"]
    prompt_ids = answer.get("prompt_token_ids") or choices[0].get("prompt_token_ids") or ()
    return RequestOutput(prompt, tuple(prompt_ids), tuple(map(_completion_output, choices)), answer["usage"])


def _completion_output(choice: dict[str, Any]) -> CompletionOutput:
    message = choice.get("message") or {}
    text = message.get("content") if message else choice["text"]
    return CompletionOutput(
        choice["index"], text or "", tuple(choice.get("token_ids") or ()), choice["finish_reason"],
        choice.get("stop_reason"), choice.get("logprobs"),
        tuple(message.get("tool_calls") or ()), message.get("reasoning_content"),
    )  # fmt: skip
