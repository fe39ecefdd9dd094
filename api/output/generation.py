"""One prompt in the engine: its outputs become events (text, stop strings, endings), counted and logged on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.output.best_of import BestOf
from fuseline.api.output.detokenizer import Detokenizer
from fuseline.api.output.events import Done, Event, PromptInfo, TextDelta
from fuseline.api.output.interval import Interval
from fuseline.api.output.pace import Turns
from fuseline.api.output.parsed import Parsed
from fuseline.api.output.stop import StopStrings
from fuseline.api.output.watch import RequestWatch
from fuseline.api.parsers.choice import ParseSettings
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineRequest, TokenOutput

OUTPUTS_AT_ONCE = 16
"""Outputs that are taken without asking whether others wait: 0.3 ms."""
Sink = Callable[[Sequence[Event]], Awaitable[None] | None]
"""Takes the events of one output, all of one choice, its Done behind its last text: at once, or it returns what is to
be awaited, which is work in slices."""


@dataclass(frozen=True)
class TextOptions:
    """Options that decide how a choice's tokens become text."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    interval: int = 1
    """Tokens of a choice that a delta waits for."""
    turns: Turns = field(default_factory=Turns)
    """Shared by all answers of a server."""
    kept_ids: frozenset[int] = frozenset()
    """Special tokens that stay in the text although others are skipped: what parsers look for."""
    parse: ParseSettings | None = None
    """Reasoning and tool calls are looked for."""
    num_shown: int = 0
    """Choices to show of those generated, the likeliest ones (best_of); 0: all as they come."""


class Generation:
    """Runs one prompt through the engine, once."""

    def __init__(
        self, request: EngineRequest, tokenizer: TextTokenizer | None, options: TextOptions, watch: RequestWatch
    ) -> None:
        self._request, self._watch = request, watch
        self._choices = make_choices(request, tokenizer, options)
        self._num_open = len(self._choices)
        self._interval, self._num_shown = options.interval, options.num_shown
        self._turns, self._parse = options.turns, options.parse

    async def run(
        self, client: EngineClient, sink: Sink, open_prompt: Callable[[PromptInfo], Awaitable[None]]
    ) -> None:
        """Hand the prompt's facts to `open_prompt`, then the events of each output to `sink`, in their tokens' order.

        Cancelling it aborts the request in the engine. Raises ApiError and EngineDeadError.
        """
        deliver = self._deliver(sink)
        num_outputs = 0
        with self._watch as watch:
            async with aclosing(client.generate(self._request)) as outputs:
                async for output in outputs:
                    watch.see_output(output)
                    if output.num_cached_tokens or output.prompt_logprobs is not None:
                        await open_prompt(PromptInfo(output.num_cached_tokens, output.prompt_logprobs))
                    if events := self._take(client, output):
                        for event in events:
                            watch.see(event)
                        if (work := deliver(events)) is not None:
                            await work
                    if not self._num_open:
                        return
                    num_outputs += 1
                    if num_outputs % OUTPUTS_AT_ONCE == 0 and self._turns.is_over:
                        await asyncio.sleep(0)

    def _deliver(self, sink: Sink) -> Sink:
        """What the events go through on their way to the sink."""
        if self._parse:
            sink = Parsed(self._parse, self._num_shown or len(self._choices), sink).feed
        if self._num_shown:
            return BestOf(self._num_shown, len(self._choices), sink).feed
        return sink if self._interval == 1 else Interval(self._interval, sink).feed

    def _take(self, client: EngineClient, output: TokenOutput) -> Sequence[Event]:
        if output.finish_reason == "error":
            raise engine_error(output)
        events = self._choices[output.index].take(output)
        is_done = (output.finish_reason is not None or len(events) > 1) and any(isinstance(e, Done) for e in events)
        if is_done:
            self._num_open -= 1
            if self._num_open and output.finish_reason is None:
                # Ended by a stop string, of which the engine knows nothing.
                client.abort_choice(self._request.request_id, output.index)
        return events


def engine_error(output: TokenOutput) -> ApiError:
    """Why the engine has ended a request."""
    if output.is_bad_request:
        return bad_request(output.error)
    return ApiError(500, output.error or "the request failed in the engine", code="internal_error")


def make_choices(request: EngineRequest, tokenizer: TextTokenizer | None, options: TextOptions) -> list[Choice]:
    """The n choices of a prompt, whose texts go on from its end."""
    start = None
    if tokenizer is not None:
        start = Detokenizer(tokenizer, options.skip_special_tokens, request.prompt_token_ids, options.kept_ids)
    return [Choice(k, start, options, request) for k in range(request.params.n)]


class Choice:
    """Outputs of one choice to its events."""

    def __init__(self, index: int, start: Detokenizer | None, options: TextOptions, request: EngineRequest) -> None:
        """`start`: detokenizer of the prompt; None without a tokenizer."""
        self._index = index
        self._detokenizer = start.fork() if start else None
        self._stops = StopStrings(options.stops, options.include_stop)
        self._options = options
        self._ends = set(request.params.ending_token_ids)
        # What ends a grammar's text is no part of it: with its spelling the text would not be valid.
        self._shows_end = options.include_stop and not request.params.is_structured
        self._num_tokens = 0
        self._num_characters = 0  # of the text so far, held back or not
        self._is_done = False

    def take(self, output: TokenOutput) -> Sequence[Event]:
        if self._is_done:
            return ()
        delta = TextDelta(self._index, "")
        for k, token in enumerate(output.token_ids):
            delta.token_ids.append(token)
            if output.logprobs:
                delta.logprobs.append(output.logprobs[k])
                delta.offsets.append(self._num_characters)
            is_last = output.finish_reason == "stop" and k == len(output.token_ids) - 1
            text, stop = self._feed(token, is_end=is_last and token in self._ends)
            delta.text += text
            if stop is not None:
                return self._end(delta, "stop", stop)
        if output.finish_reason is None:
            return (delta,) if delta.token_ids else ()
        if self._detokenizer:
            text, stop = self._stops.feed(self._detokenizer.finish(), self._is_checked)
            delta.text += text
            if stop is not None and output.finish_reason != "abort":
                return self._end(delta, "stop", stop)
        delta.text += self._stops.finish()
        return self._end(delta, output.finish_reason, output.stop_token_id)

    @property
    def _is_checked(self) -> bool:
        return self._num_tokens >= self._options.min_tokens

    def _feed(self, token: int, is_end: bool) -> tuple[str, str | None]:
        self._num_tokens += 1
        if self._detokenizer is None or (is_end and not self._shows_end):
            return "", None
        text = self._detokenizer.feed(token)
        self._num_characters += len(text)
        return self._stops.feed(text, self._is_checked)

    def _end(self, delta: TextDelta, reason: str, stop_reason: str | int | None) -> Sequence[Event]:
        self._is_done = True
        return delta, Done(self._index, reason, stop_reason)
