"""Beam search (SPEC 6.11), which runs in the engine: its hypotheses become the events of choices."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

from msgspec.structs import replace

from fuseline.api.output.events import PromptInfo
from fuseline.api.output.generation import Sink, TextOptions, engine_error, make_choices
from fuseline.api.output.parsed import Parsed
from fuseline.api.output.watch import RequestWatch
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.prepared import BeamOptions
from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import BeamParams, SamplingParams


class BeamSearch:
    """Runs one prompt, like a Generation. The request's own sampling settings are those of a step's result: of them
    count n (the width), temperature, max_tokens, logprobs and the EOS ids.
    """

    def __init__(
        self, request: EngineRequest, tokenizer: TextTokenizer | None, options: TextOptions, beams: BeamOptions,
        watch: RequestWatch,
    ) -> None:  # fmt: skip
        params = request.params
        settings = BeamParams(
            length_penalty=beams.length_penalty, keeps_eos=options.include_stop, num_shown=params.logprobs
        )
        own = SamplingParams(
            n=params.n, temperature=0.0, max_tokens=params.max_tokens, logprobs=max(2 * params.n, params.logprobs or 0),
            prompt_logprobs=params.prompt_logprobs, scores_temperature=params.temperature or 1.0,
            eos_token_ids=params.eos_token_ids, beams=settings,
        )  # fmt: skip
        self._request, self._watch = replace(request, params=own), watch
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
            async with aclosing(client.generate(self._request)) as outputs:
                async for output in outputs:
                    if output.finish_reason == "error":
                        raise engine_error(output)
                    watch.see_output(output)
                    if output.finish_reason is None:
                        await open_prompt(PromptInfo(output.num_cached_tokens, output.prompt_logprobs))
                        continue
                    events = self._choices[output.index].take(output)
                    for event in events:
                        watch.see(event)
                    if (work := sink(events)) is not None:
                        await work
