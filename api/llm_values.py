"""Inputs and outputs of `LLM`: prompts, sampling settings in any shape, frozen outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any

import msgspec

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids (a list, an array, a tensor), or a mapping with one of both and what else belongs to the prompt."""
PROMPT_FIELDS = ("prompt", "prompt_token_ids", "cache_salt")
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

    prompt: str | list[int] | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: dict[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text, a mapping or a list of token ids is one prompt; anything else is many."""
    prompts = _listed(prompts)
    is_one = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return [prompts] if is_one else list(prompts)


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """Request fields of a prompt. Raises ValueError for a mapping that names none, or something else."""
    if not isinstance(prompt, Mapping):
        return {"prompt": _plain(prompt)}
    if unknown := sorted(set(prompt) - set(PROMPT_FIELDS)):
        raise ValueError(f"a prompt has no {unknown[0]!r} here (keys: {', '.join(PROMPT_FIELDS)})")
    given = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
    if not given:
        raise ValueError("a prompt needs 'prompt' or 'prompt_token_ids'")
    salt = {"cache_salt": prompt["cache_salt"]} if prompt.get("cache_salt") is not None else {}
    return {"prompt": _plain(prompt[given[0]]), **salt}


def _plain(prompt: str | Sequence[int]) -> str | list[int]:
    return prompt if isinstance(prompt, str) else [index(token) for token in _listed(prompt)]


def _listed(value: Any) -> Any:
    """Arrays of numpy, torch and Python as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


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


def request_output(prompt: str | list[int] | None, answer: dict[str, Any]) -> RequestOutput:
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
