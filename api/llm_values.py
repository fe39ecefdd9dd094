"""Inputs and outputs of `LLM`: prompts, sampling settings in any shape, frozen outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
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
    """A text, a mapping or a list of token ids is one prompt; anything else is many. Raises ValueError for what is
    neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    found = _listed(prompts, "prompts")
    return [found] if found and isinstance(found[0], Integral) else found


def conversations(messages: Any) -> list[list[Any]]:
    """One conversation, or several, as a list of them. Raises ValueError for what is neither."""
    found = _listed(messages, "messages")
    return [found] if found and isinstance(found[0], Mapping) else [_listed(turns, "messages") for turns in found]


def _listed(values: Any, name: str) -> list[Any]:
    if isinstance(values, str | bytes | bytearray | Mapping) or not isinstance(values, Iterable):
        kinds = {"prompts": "texts, token ids or mappings", "messages": "messages", "a prompt": "token ids"}[name]
        raise ValueError(f"{name}: must be a list of {kinds}, not {type(values).__name__}")
    return values.tolist() if hasattr(values, "tolist") else list(values)


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
    ids = _listed(prompt, "a prompt")
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
    """Request fields of a mapping, dataclass, msgspec struct or object with attributes; None is unset.

    Raises ValueError for anything else.
    """
    if sampling is None:
        return {}
    if isinstance(sampling, Mapping):
        found = dict(sampling)
    elif isinstance(sampling, msgspec.Struct):
        found = msgspec.structs.asdict(sampling)
    elif not hasattr(sampling, "__dict__") and not dataclasses.is_dataclass(sampling):
        kind = type(sampling).__name__
        raise ValueError(f"sampling settings must be a mapping or an object with attributes, not {kind}")
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
