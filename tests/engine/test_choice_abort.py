"""A choice that a stop string has ended is computed no further; the others go on, and the counts are right."""

from __future__ import annotations

import pytest
from engine_walk_cases import ORDERS, Walk, expected_tokens, make_engine
from served_fake import served_fake, until

from fuseline.api.output.events import Done, TextDelta
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams

PROMPT = list(range(1, 15))
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)


def choices(n: int, max_tokens: int, seed: int) -> list[list[int]]:
    params = SamplingParams(n=n, max_tokens=max_tokens, seed=seed)
    request = EngineRequest(request_id="r", prompt_token_ids=tuple(PROMPT), params=params)
    return [expected_tokens(request, index, (0,)) for index in range(n)]


def first_to_end(told: list[list[int]]) -> tuple[int, int]:
    """A choice and a token that comes early in it and not in the others."""
    for index, tokens in enumerate(told):
        for token in tokens[2:8]:
            if not any(token in other for k, other in enumerate(told) if k != index):
                return index, token
    raise AssertionError("try another seed")


async def test_a_stop_string_ends_its_choice_in_the_engine() -> None:
    told = choices(3, 40, 5)
    index, token = first_to_end(told)
    length = told[index].index(token) + 1
    async with served_fake(0.004, max_num_seqs=4) as fake:
        events = await fake.collect(PROMPT, (chr(64 + token),), n=3, max_tokens=40, seed=5)
        counts = [sum(len(e.token_ids) for e in events if isinstance(e, TextDelta) and e.index == k) for k in range(3)]
        assert counts == [length if k == index else 40 for k in range(3)]
        ends = {event.index: (event.finish_reason, event.stop_reason) for event in events if isinstance(event, Done)}
        assert ends[index] == ("stop", chr(64 + token))
        assert all(ends[k] == ("length", None) for k in range(3) if k != index)
        whole = len(PROMPT) + 2 * (len(PROMPT) - 12) + 3 * 39
        assert sum(map(sum, fake.shapes)) < whole - (40 - length) // 2, "the message takes a few steps to arrive"
        assert fake.value("generation_tokens_total") == sum(counts)
        assert fake.value("request_success_total", finished_reason="stop") == 1
        assert fake.value("request_success_total", finished_reason="length") == 2


async def test_the_last_choice_ends_the_request() -> None:
    told = choices(1, 40, 5)
    async with served_fake(0.004) as fake:
        await fake.collect(PROMPT, (chr(64 + told[0][3]),), max_tokens=40, seed=5)
        await until(lambda: fake.value("num_requests_running") == 0)
        assert len(fake.shapes) < 40


@EACH_ORDER
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_an_aborted_choice_is_in_no_later_step(order, index, num_steps) -> None:
    walk = Walk(make_engine(order=order))
    name = walk.submit(PROMPT, n=3, max_tokens=12)
    for _ in range(num_steps):
        walk.step()
    walk.engine.abort_choice(name, index)
    walk.engine.abort_choice(name, 7)
    walk.engine.abort_choice("unknown", 0)
    seqs = [*walk.engine.scheduler.running, *walk.engine.scheduler.waiting]
    assert not any(seq.index == index for seq in seqs)
    walk.finish()
    walk.check_all((0,))
    reasons = [walk.reason(name, k) for k in range(3)]
    assert reasons == ["abort" if k == index else "length" for k in range(3)]


@EACH_ORDER
def test_equal_choices_end_one_by_one(order) -> None:
    walk = Walk(make_engine(order=order, num_blocks=16))
    name = walk.submit(PROMPT, n=3, max_tokens=20, temperature=0.0)
    others = [walk.submit([k, *PROMPT], max_tokens=20) for k in (1, 2, 3)]
    for index, num_steps in ((0, 3), (2, 4)):
        for _ in range(num_steps):
            walk.step()
        walk.engine.abort_choice(name, index)
    walk.finish()
    walk.check_all((0,))
    assert [walk.reason(name, k) for k in range(3)] == ["abort", "length", "abort"]
    assert len(walk.tokens(name, 0)) < len(walk.tokens(name, 2)) < len(walk.tokens(name, 1)) == 20
    assert all(walk.reason(other) == "length" for other in others)
