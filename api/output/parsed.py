"""The stage that finds reasoning and tool calls in a choice's text before it is written; plain answers pass none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
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

    Tokens and their log-probabilities travel with the last event that they made, or else with the next one.
    """

    def __init__(
        self, settings: ParseSettings, n: int, sink: Callable[[Sequence[Event]], Awaitable[None] | None]
    ) -> None:
        self._settings, self._sink = settings, sink
        self._choices = [_Choice(make_parser(index, settings)) for index in range(n)]

    def feed(self, events: Sequence[Event]) -> Awaitable[None] | None:
        """Take the events of one output."""
        parts: list[Part] = []
        choice = self._choices[events[0].index]
        done = events[-1] if isinstance(events[-1], Done) else None
        for event in events:
            if isinstance(event, TextDelta):
                parts += self._parse(choice, event)
        if done is not None:
            parts += choice.parser.finish()
        shown: list[Event] = [part for part in parts if self._is_shown(part)]
        if done is not None and choice.token_ids and not any(map(_carries, shown)):
            shown.append(TextDelta(done.index, ""))
        _give_tokens(choice, shown)
        if done is not None:
            shown.append(Done(done.index, self._reason(choice, done), done.stop_reason, choice.num_reasoning))
        return self._sink(shown) if shown else None

    def _parse(self, choice: _Choice, event: TextDelta) -> Sequence[Part]:
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs
        parts = choice.parser.feed(event.text)
        if choice.parser.is_thinking:
            choice.num_reasoning += len(event.token_ids)
        return parts

    def _is_shown(self, part: Part) -> bool:
        return self._settings.shows_reasoning or not isinstance(part, ReasoningDelta)

    def _reason(self, choice: _Choice, done: Done) -> str:
        has_calls = choice.parser.num_calls and self._settings.choice in ("auto", "required")
        return "tool_calls" if has_calls and done.finish_reason == "stop" else done.finish_reason


def _carries(part: Event) -> bool:
    return not isinstance(part, CallRevoked)


def _give_tokens(choice: _Choice, parts: Sequence[Event]) -> None:
    """Let the last event carry the tokens that have come."""
    for part in reversed(parts):
        if _carries(part):
            part.token_ids, choice.token_ids = choice.token_ids, []
            part.logprobs, choice.logprobs = choice.logprobs, []
            return
