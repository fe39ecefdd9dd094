"""The stage between a choice's text and its chunks where reasoning and tool calls are found; plain answers pass none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fuseline.api.output.events import CallRevoked, Done, Event, Part, ReasoningDelta, TextDelta
from fuseline.api.parsers.choice import ChoiceParser, ParseSettings, make_parser
from fuseline.engine.messages import PositionLogprobs


@dataclass
class _Choice:
    parser: ChoiceParser
    token_ids: list[int] = field(default_factory=list)
    """Tokens that no event has carried yet."""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    num_reasoning: int = 0


class Parsed:
    """Turns the text events of all choices of a prompt into events of content, reasoning and calls.

    Tokens and their log-probabilities travel with the last event that they made, or, where they made none, with the next.
    """

    def __init__(self, settings: ParseSettings, n: int, sink: Callable[[Event], None]) -> None:
        self._settings, self._sink = settings, sink
        self._choices = [_Choice(make_parser(index, settings)) for index in range(n)]

    def feed(self, event: Event) -> None:
        choice = self._choices[event.index]
        if isinstance(event, Done):
            self._end(choice, event)
            return
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs
        parts = choice.parser.feed(event.text)
        if choice.parser.is_thinking:
            choice.num_reasoning += len(event.token_ids)
        self._send(choice, parts)

    def _end(self, choice: _Choice, done: Done) -> None:
        self._send(choice, choice.parser.finish())
        if choice.token_ids:
            self._send(choice, [TextDelta(done.index, "")])
        reason = done.finish_reason
        if reason == "stop" and choice.parser.num_calls and self._settings.choice in ("auto", "required"):
            reason = "tool_calls"
        self._sink(Done(done.index, reason, done.stop_reason, choice.num_reasoning))

    def _send(self, choice: _Choice, parts: Sequence[Part]) -> None:
        shown = [part for part in parts if self._settings.shows_reasoning or not isinstance(part, ReasoningDelta)]
        carriers = [part for part in shown if not isinstance(part, CallRevoked)]
        if carriers:
            carriers[-1].token_ids, choice.token_ids = choice.token_ids, []
            carriers[-1].logprobs, choice.logprobs = choice.logprobs, []
        for part in shown:
            self._sink(part)
