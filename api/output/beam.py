"""Beam search over the engine (SPEC 6.11): each step asks for the likeliest next tokens of all live beams in one batch,
which finds the tokens they share in the prefix cache.
"""

from __future__ import annotations

import asyncio
import heapq
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice

from msgspec.structs import replace

from fuseline.api.output.events import PromptInfo
from fuseline.api.output.generation import Sink, TextOptions, engine_error, make_choices
from fuseline.api.output.parsed import Parsed
from fuseline.api.output.watch import RequestWatch
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.prepared import BeamOptions
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineRequest, PositionLogprobs, SamplingParams, TokenOutput


@dataclass(frozen=True)
class Beam:
    """A hypothesis: generated tokens with their log-probabilities."""

    tokens: tuple[int, ...] = ()
    scores: tuple[PositionLogprobs, ...] = ()
    logprob: float = 0.0
    """Cumulative, of an EOS that ended it too."""
    is_done: bool = False
    length: int = 0
    """Tokens generated, a final EOS apart."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A beam and the token of rank `index` behind it."""

    beam: Beam
    step: PositionLogprobs
    index: int
    logprob: float


class BeamSearch:
    """Runs one prompt, like a Generation. The request's own sampling settings are those of a step's result: of them
    count n (the width), temperature, max_tokens, logprobs and the EOS ids.
    """

    def __init__(
        self, request: EngineRequest, tokenizer: TextTokenizer | None, options: TextOptions, beams: BeamOptions,
        watch: RequestWatch,
    ) -> None:  # fmt: skip
        self._request, self._watch, self._penalty = request, watch, beams.length_penalty
        params = request.params
        self._width, self._num_steps, self._eos = params.n, params.max_tokens, set(params.eos_token_ids)
        self._num_shown, self._keeps_eos = params.logprobs, options.include_stop
        self._step_params = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=max(2 * params.n, params.logprobs or 0),
            prompt_logprobs=params.prompt_logprobs, scores_temperature=params.temperature or 1.0,
        )  # fmt: skip
        self._choices = make_choices(request, tokenizer, options)
        self._parse = options.parse

    async def run(
        self, client: EngineClient, sink: Sink, open_prompt: Callable[[PromptInfo], Awaitable[None]]
    ) -> None:
        """Hand the prompt's facts to `open_prompt`, then the choices to `sink`, best first.

        Cancelling it aborts the request in the engine. Raises ApiError and EngineDeadError.
        """
        if self._parse:
            sink = Parsed(self._parse, len(self._choices), sink).feed
        with self._watch as watch:
            best = await self._search(client, open_prompt)
            for choice, beam in zip(self._choices, best, strict=True):
                events = choice.take(self._output(beam))
                for event in events:
                    watch.see(event)
                if (work := sink(events)) is not None:
                    await work

    def _output(self, beam: Beam) -> TokenOutput:
        return TokenOutput(
            request_id=self._request.request_id, token_ids=beam.tokens,
            logprobs=() if self._num_shown is None else tuple(_cut(score, self._num_shown) for score in beam.scores),
            finish_reason="stop" if beam.is_done else "length",
        )  # fmt: skip

    async def _search(
        self, client: EngineClient, open_prompt: Callable[[PromptInfo], Awaitable[None]]
    ) -> list[Beam]:
        live, done = [Beam()], []
        for step in range(self._num_steps):
            outputs = await self._step(client, live)
            if step == 0:
                self._watch.see_output(outputs[0])
                await open_prompt(PromptInfo(outputs[0].num_cached_tokens, outputs[0].prompt_logprobs))
                self._step_params = replace(self._step_params, prompt_logprobs=None)
            live = self._extend(live, outputs, done)
            if self._is_settled(live, done):
                break
        return heapq.nlargest(self._width, done + live, key=self._score)

    async def _step(self, client: EngineClient, live: list[Beam]) -> list[TokenOutput]:
        """The next token of each beam with the likeliest others. The first error ends all."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._next(client, beam)) for beam in live]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _next(self, client: EngineClient, beam: Beam) -> TokenOutput:
        request = replace(
            self._request, request_id=uuid.uuid4().hex, params=self._step_params,
            prompt_token_ids=self._request.prompt_token_ids + beam.tokens,
        )  # fmt: skip
        async with aclosing(client.generate(request)) as outputs:
            output = await anext(outputs)
        if output.finish_reason == "error":
            raise engine_error(output)
        return output

    def _extend(self, live: list[Beam], outputs: list[TokenOutput], done: list[Beam]) -> list[Beam]:
        """The beams that go on; those that an EOS completes go to `done`."""
        steps = [(beam, output.logprobs[0]) for beam, output in zip(live, outputs, strict=True)]
        done += [self._completed(found) for step in steps for found in self._candidates(*step, are_eos=True)]
        done[:] = heapq.nlargest(self._width, done, key=self._score)
        # All are of one length, so the likeliest have the best scores; those of a beam come in their order.
        likeliest = heapq.merge(*(self._candidates(*step) for step in steps), key=lambda found: -found.logprob)
        return [_grown(found) for found in islice(likeliest, self._width)]

    def _candidates(self, beam: Beam, step: PositionLogprobs, are_eos: bool = False) -> Iterator[_Candidate]:
        """The likeliest extensions of a beam, in descending order, made as they are asked for."""
        for index, token in enumerate(step.top_ids[: 2 * self._width]):
            if (token in self._eos) == are_eos:
                yield _Candidate(beam, step, index, beam.logprob + step.top_logprobs[index])

    def _completed(self, found: _Candidate) -> Beam:
        grown, beam = _grown(found), found.beam
        tokens, scores = (grown.tokens, grown.scores) if self._keeps_eos else (beam.tokens, beam.scores)
        return Beam(tokens, scores, found.logprob, True, beam.length)

    def _score(self, beam: Beam) -> float:
        return self._scaled(beam.logprob, beam.length)

    def _scaled(self, logprob: float, length: int) -> float:
        return logprob / (len(self._request.prompt_token_ids) + length) ** self._penalty

    def _is_settled(self, live: list[Beam], done: list[Beam]) -> bool:
        """Whether no live beam can come among the best any more: its log-probability only falls."""
        if not live:
            return True
        if len(done) < self._width:
            return False
        worst = min(heapq.nlargest(self._width, map(self._score, done)))
        length = self._num_steps if self._penalty > 0 else live[0].length
        return worst > max(self._scaled(beam.logprob, length) for beam in live)


def _grown(found: _Candidate) -> Beam:
    beam, step, index = found.beam, found.step, found.index
    token = step.top_ids[index]
    score = replace(step, token_id=token, logprob=step.top_logprobs[index], rank=index + 1)
    return Beam((*beam.tokens, token), (*beam.scores, score), found.logprob, False, beam.length + 1)


def _cut(score: PositionLogprobs, count: int) -> PositionLogprobs:
    return replace(score, top_ids=score.top_ids[:count], top_logprobs=score.top_logprobs[:count])
