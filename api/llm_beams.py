"""Inputs and outputs of `LLM.beam_search`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fuseline.api.llm_values import Sampling, request_fields

FIELDS = ("max_tokens", "temperature", "ignore_eos", "length_penalty")


@dataclass(frozen=True)
class BeamSequence:
    """One hypothesis."""

    tokens: tuple[int, ...]
    """With those of the prompt."""
    text: str
    """With that of the prompt."""
    cum_logprob: float
    """Of the tokens behind the prompt, an EOS that ended them included."""
    finish_reason: str


@dataclass(frozen=True)
class BeamSearchOutput:
    """Hypotheses of one prompt, best first."""

    sequences: tuple[BeamSequence, ...]


def beam_fields(params: Sampling) -> dict[str, Any]:
    """Request fields of a beam search. Raises ValueError."""
    given = request_fields(params)
    known = {*FIELDS, "beam_width", "include_stop_str_in_output"}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"a beam search has no {unknown[0]!r} (settings: {', '.join(sorted(known))})")
    if "beam_width" not in given or "max_tokens" not in given:
        raise ValueError("a beam search needs beam_width and max_tokens")
    width = given["beam_width"]
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"beam_width must be an integer, 1 or more, not {width!r}")
    chosen = {name: given[name] for name in FIELDS if name in given}
    return {
        "temperature": 0.0, **chosen, "n": width, "use_beam_search": True, "echo": True, "logprobs": 0,
        "include_stop_str_in_output": True,
    }  # fmt: skip


def beam_output(answer: dict[str, Any], keeps_eos: bool) -> BeamSearchOutput:
    """The server's answer to such fields."""
    return BeamSearchOutput(tuple(_sequence(choice, keeps_eos) for choice in answer["choices"]))


def _sequence(choice: dict[str, Any], keeps_eos: bool) -> BeamSequence:
    ids, reason = choice["token_ids"], choice["finish_reason"]
    logprobs = choice["logprobs"]["token_logprobs"]
    shown = ids[:-1] if reason == "stop" and not keeps_eos else ids
    cumulative = sum(logprobs[len(logprobs) - len(ids) :])
    return BeamSequence((*choice["prompt_token_ids"], *shown), choice["text"], cumulative, reason)
