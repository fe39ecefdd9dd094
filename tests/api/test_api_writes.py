"""One write for a client and a step of the engine, with any number of choices and prompts; comments while silent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from api_writes_cases import CHAT, COMPLETIONS, Answer, events, open_app, until

from fuseline.api.output.outbox import KEEP_ALIVE, Outbox


@pytest.mark.parametrize(
    "path, body, num_choices",
    [
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": "a", "n": 3, "temperature": 1.0}, 3),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1.0}, 6),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3, "temperature": 1.0}, 3),
    ],
    ids=["one", "choices", "prompts", "chat"],
)
async def test_a_step_is_one_write(path: str, body: dict[str, Any], num_choices: int) -> None:
    app, engine = open_app()
    answer = Answer(app, path, body)
    await until(lambda: sum(request.params.n for request in engine.requests) == num_choices)
    for count in range(1, 6):
        engine.step()
        await until(lambda count=count: len(answer.writes) >= count)
        await asyncio.sleep(0.01)
        assert len(answer.writes) == count
    for write in answer.writes[1:]:
        assert sorted(choice["index"] for event in events(write) for choice in event["choices"]) == [
            *range(num_choices)
        ]
    engine.step("length")
    await answer.task
    ends = [choice for event in events(answer.writes[5]) for choice in event["choices"] if choice["finish_reason"]]
    assert len(ends) == num_choices
    # The end of several prompts is known a moment after the last of them.
    assert len(answer.writes) <= (7 if len(engine.requests) > 1 else 6)
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_an_error_is_the_last_event() -> None:
    app, engine = open_app()
    answer = Answer(app, COMPLETIONS, {"prompt": "a"})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: answer.writes)
    engine.step("error", "the model's output is not finite")
    await answer.task
    assert events(answer.writes[-1])[0]["error"]["message"] == "the model's output is not finite"
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_aborts_its_request() -> None:
    app, engine = open_app()
    answer = Answer(app, COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 1.0})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: answer.writes)
    answer.leave()
    await answer.task
    await until(lambda: engine.messages)
    assert engine.messages[0].request_ids == (engine.requests[0].request_id,) and engine.num_in_flight == 0


async def test_comments_while_silent() -> None:
    app, engine = open_app(sse_keep_alive_interval=0.05)
    answer = Answer(app, COMPLETIONS, {"prompt": "a"})
    await until(lambda: engine.requests)
    engine.step()
    await until(lambda: len(answer.writes) == 3)
    assert answer.writes[1:] == [KEEP_ALIVE] * 2
    engine.step("length")
    await answer.task
    assert answer.writes[-1].endswith(b"data: [DONE]\n\n")


async def test_no_comments_while_there_is_news() -> None:
    outbox = Outbox(0.06)
    taken = []
    for number in range(12):
        asyncio.get_running_loop().call_later(0.01, outbox.add, b"%d" % number)
        taken.append(await outbox.take())
    assert b"".join(taken) == b"01234567891011"
    assert await outbox.take() == KEEP_ALIVE
    outbox.close()
    assert await outbox.take() == b""


async def test_an_outbox_joins_what_has_gathered() -> None:
    outbox = Outbox(0)
    for part in (b"a", b"b", b"c"):
        outbox.add(part)
    assert await outbox.take() == b"abc"
    outbox.add(b"d")
    outbox.close()
    assert (await outbox.take(), await outbox.take()) == (b"d", b"")
