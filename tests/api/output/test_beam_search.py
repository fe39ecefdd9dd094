"""Beam search and best_of over the fake model, against the rules written down once more (SPEC 6.10, 6.11)."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from fake_model import NAN_TOKEN, VOCAB_SIZE, next_logits
from served_fake import Fake, Letters, served_fake

from fuseline.api.errors import ApiError
from fuseline.api.output.beam import BeamSearch
from fuseline.api.output.best_of import BestOf
from fuseline.api.output.events import Done, Event, PromptInfo, TextDelta
from fuseline.api.output.generation import TextOptions
from fuseline.api.output.watch import RequestWatch
from fuseline.api.prompt.prepared import BeamOptions
from fuseline.engine.messages import EngineRequest, PositionLogprobs
from fuseline.engine.params import SamplingParams

PROMPT = list(range(1, 15))


def reference(
    width: int, num_steps: int, temperature: float, penalty: float, eos: set[int]
) -> list[tuple[list[int], str]]:
    """Tokens and endings of the best hypotheses; an EOS is not among the tokens."""

    def score(tokens: list[int], logprob: float) -> float:
        return logprob / (len(PROMPT) + len(tokens)) ** penalty

    live, done = [([], 0.0)], []
    for _ in range(num_steps):
        found = []
        for tokens, logprob in live:
            logits = torch.from_numpy(next_logits(PROMPT + tokens, (0,))) / (temperature or 1.0)
            best = torch.log_softmax(logits, 0).topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if token in eos:
                    done.append((tokens, logprob + value, "stop"))
                else:
                    found.append((tokens + [token], logprob + value))
        live = sorted(found, key=lambda beam: -score(*beam))[:width]
    every = done + [(*beam, "length") for beam in live]
    best = sorted(every, key=lambda beam: -score(*beam[:2]))[:width]
    return [(tokens, reason) for tokens, _, reason in best]


async def search(
    fake: Fake, width: int, steps: int, options: TextOptions, penalty: float, **params: Any
) -> list[Event]:
    request = EngineRequest(
        request_id="beams", prompt_token_ids=tuple(PROMPT), params=SamplingParams(n=width, max_tokens=steps, **params)
    )
    events: list[Event] = []

    async def open_prompt(info: PromptInfo) -> None:
        events.append(info)

    watch = RequestWatch(request, "test", fake.metrics, False, None)
    beams = BeamSearch(request, Letters(), options, BeamOptions(penalty), watch)
    await beams.run(fake.client, events.extend, open_prompt)
    return events


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    async with served_fake(max_num_seqs=8) as served:
        yield served


CASES = list(itertools.product((1, 2, 4), (1, 7), (0.0, 0.6, 1.7), (-0.5, 0.0, 1.0, 4.0)))


async def test_hypotheses_are_those_of_the_rules(fake: Fake) -> None:
    for width, steps, temperature, penalty in CASES:
        eos = {3, 11, 20, 28, 33}
        events = await search(
            fake, width, steps, TextOptions(), penalty, temperature=temperature, eos_token_ids=tuple(eos)
        )
        deltas = [event for event in events if isinstance(event, TextDelta)]
        ends = [event for event in events if isinstance(event, Done)]
        assert [event.index for event in deltas] == [event.index for event in ends] == list(range(width))
        found = [(delta.token_ids, end.finish_reason) for delta, end in zip(deltas, ends, strict=True)]
        assert found == reference(width, steps, temperature, penalty, eos), (width, steps, temperature, penalty)
        assert all(delta.text == "".join(chr(64 + token) for token in delta.token_ids) for delta in deltas)


async def test_an_eos_is_kept_where_it_is_to_be_shown_and_scores_are_of_each_token(fake: Fake) -> None:
    eos = (3, 11, 20, 28, 33)
    plain = await search(fake, 3, 7, TextOptions(), 1.0, temperature=0.0, eos_token_ids=eos)
    kept = await search(fake, 3, 7, TextOptions(include_stop=True), 1.0, temperature=0.0, eos_token_ids=eos, logprobs=2)
    ends = {event.index for event in plain if isinstance(event, Done) and event.finish_reason == "stop"}
    assert ends
    for one, other in zip(plain, kept, strict=True):
        if not isinstance(one, TextDelta):
            continue
        has_eos = one.index in ends
        assert other.token_ids[: len(one.token_ids)] == one.token_ids and (other.token_ids[-1] in eos) == has_eos
        assert len(other.token_ids) == len(one.token_ids) + has_eos
        tokens = list(PROMPT)
        for token, position in zip(other.token_ids, other.logprobs, strict=True):
            values = torch.log_softmax(torch.from_numpy(next_logits(tokens, (0,))), 0)
            assert position.token_id == token and position.logprob == pytest.approx(float(values[token]), abs=1e-5)
            assert position.rank == int((values > values[token]).sum()) + 1 and len(position.top_ids) == 2
            tokens.append(token)


async def test_beams_are_one_batch_and_compute_a_token_each(fake: Fake) -> None:
    await search(fake, 4, 9, TextOptions(), 1.0, temperature=0.0)
    assert fake.shapes == [[len(PROMPT)], *([[1] * 4] * 8)]


async def test_what_a_prompt_is_worth_comes_with_the_first_step(fake: Fake) -> None:
    events = await search(fake, 2, 3, TextOptions(), 1.0, temperature=0.0, prompt_logprobs=1)
    assert isinstance(events[0], PromptInfo) and len(events[0].prompt_logprobs) == len(PROMPT)


async def test_a_fault_of_one_beam_is_the_requests_error(fake: Fake) -> None:
    request = EngineRequest(
        request_id="r", prompt_token_ids=(1, NAN_TOKEN), params=SamplingParams(n=2, max_tokens=4, temperature=0.0)
    )
    watch = RequestWatch(request, "test", fake.metrics, False, None)
    with pytest.raises(ApiError) as caught:
        await BeamSearch(request, Letters(), TextOptions(), BeamOptions(), watch).run(fake.client, print, print)
    assert caught.value.status == 500 and fake.client.num_in_flight == 0


async def test_the_likeliest_choices_are_kept_best_first() -> None:
    sent: list[list[Event]] = []
    best = BestOf(2, 3, lambda events: sent.append(list(events)))
    for index, logprobs in enumerate([(-1.0, -3.0), (-0.5,), (-2.0, -0.1)]):
        for k, value in enumerate(logprobs):
            assert not sent
            end = [Done(index, "stop")] if k == len(logprobs) - 1 else []
            text = TextDelta(index, f"{index}{k}", [k], [PositionLogprobs(k, value, 1)])
            if (work := best.feed([text, *end])) is not None:
                await work
    assert [[event.index for event in events] for events in sent] == [[0, 0], [1, 1, 1]]
    assert [sent[0][0].text, sent[1][0].text, sent[1][1].text] == ["10", "20", "21"]


async def test_best_of_takes_the_best_of_what_sampling_gives(fake: Fake) -> None:
    common = {"max_tokens": 5, "seed": 4, "temperature": 1.0, "logprobs": 0}
    choices = [await fake.collect(PROMPT, **{**common, "seed": 4 + k}) for k in range(4)]
    sums = [sum(p.logprob for e in events if isinstance(e, TextDelta) for p in e.logprobs) for events in choices]
    assert len(set(sums)) == 4 and VOCAB_SIZE > 8
    texts = ["".join(e.text for e in events if isinstance(e, TextDelta)) for events in choices]
    expected = [texts[k] for k in sorted(range(4), key=lambda k: -sums[k])[:2]]
    found = await fake.collect(PROMPT, num_shown=2, n=4, **common)
    joined = ["".join(e.text for e in found if isinstance(e, TextDelta) and e.index == k) for k in range(2)]
    assert joined == expected
