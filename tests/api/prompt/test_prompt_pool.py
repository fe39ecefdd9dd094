"""Worker processes: a request that takes too long, too much memory or too much text fails alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prompt_cases import SPINNING, body, chat, preparer, settings, turned_on

from fuseline.api.errors import ApiError
from fuseline.api.prompt.pool import SHORT, PromptPool
from fuseline.api.prompt.prepared import Prepared, Refused, Written

FLAGS = {"chat_template": SPINNING, "prompt_timeout": 2.0, "prompt_memory": 256 * 2**20, "max_prompt_bytes": 10**6}
LONG = "word " * 20_000


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[PromptPool]:
    """A pool with FLAGS; a test may replace some by an indirect parameter."""
    made = PromptPool(settings(**{**FLAGS, **getattr(request, "param", {})}), 2)
    assert isinstance(await made.prepare("chat", [chat()]), Prepared)
    yield made
    made.close()


async def test_an_endless_template_is_ended_and_holds_nobody_up(pool: PromptPool) -> None:
    begin = time.monotonic()
    spinning = asyncio.create_task(pool.prepare("chat", [turned_on("spin")]))
    others = 0
    while not spinning.done():
        assert isinstance(await pool.prepare("chat", [chat()]), Prepared)
        others += 1
    assert others > 3
    with pytest.raises(ApiError, match="--prompt-timeout") as refused:
        await spinning
    assert refused.value.status == 400 and time.monotonic() - begin < 30
    assert isinstance(await pool.prepare("chat", [chat()]), Prepared)


# The limit of time is not what is tested: a busy machine must not reach it first.
@pytest.mark.parametrize("pool", [{"prompt_timeout": 120.0}], indirect=True, ids=["patient"])
@pytest.mark.parametrize("fault, flag", [("much", "--max-prompt-bytes"), ("wide", "--prompt-memory")])
async def test_endless_text_and_memory_are_refused_in_words(pool: PromptPool, fault: str, flag: str) -> None:
    reply = await pool.prepare("chat", [turned_on(fault)])
    assert isinstance(reply, Refused) and reply.status == 400 and flag in reply.message
    assert isinstance(await pool.prepare("chat", [chat()]), Prepared)


async def test_a_process_that_ends_fails_its_request_alone(pool: PromptPool) -> None:
    spinning = asyncio.create_task(pool.prepare("chat", [turned_on("spin")]))
    await asyncio.sleep(0.3)
    (busy,) = pool.processes.busy
    busy._process.kill()
    with pytest.raises(ApiError) as failed:
        await spinning
    assert failed.value.status == 503 and failed.value.code == "prompt_worker_ended"
    assert isinstance(await pool.prepare("chat", [chat()]), Prepared)


async def test_a_client_that_leaves_frees_its_place(pool: PromptPool) -> None:
    leaving = [asyncio.create_task(pool.prepare("chat", [turned_on("spin")])) for _ in range(2)]
    await asyncio.sleep(0.3)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert not pool.processes.busy
    assert isinstance(await pool.prepare("chat", [chat()]), Prepared)


QUICK = replace(SHORT, least=0.4)


async def test_requests_that_hang_run_on_beside_others_until_there_are_too_many() -> None:
    """One place and four slow requests: the fifth one that hangs lets the first one go in words."""
    pool = PromptPool(settings(**FLAGS), 1, QUICK)
    try:
        assert isinstance(await pool.prepare("chat", [chat()]), Prepared)
        results = await asyncio.gather(
            *(pool.prepare("chat", [turned_on("spin")]) for _ in range(6)), return_exceptions=True
        )
    finally:
        pool.close()
    codes = [error.code for error in results]
    assert set(codes) == {"prompt_workers_busy", "request_too_slow"} and codes.count("request_too_slow") >= 4
    assert all((error.status == 503) == (error.code == "prompt_workers_busy") for error in results)
    assert pool._num_free == 1 and not pool.processes.busy and not pool._slow and not pool._waiting


@pytest.mark.parametrize("num_hung", [2, 7, 40])
async def test_a_crowd_of_requests_that_hang_delays_no_other(num_hung: int) -> None:
    pool = PromptPool(settings(**{**FLAGS, "prompt_timeout": 20.0}), 2, QUICK)
    try:
        assert isinstance(await pool.prepare("chat", [chat()]), Prepared)
        hung = [asyncio.create_task(pool.prepare("chat", [turned_on("spin")])) for _ in range(num_hung)]
        waits = []
        for _ in range(8):
            await asyncio.sleep(0.05)
            begin = time.monotonic()
            assert isinstance(await pool.prepare("chat", [chat()]), Prepared)
            waits.append(time.monotonic() - begin)
        assert not all(task.done() for task in hung)
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        assert sorted(waits)[4] < 1.0 and max(waits) < 3.0, waits
        assert pool._num_free == 2 and not pool.processes.busy and not pool._slow and not pool._waiting
    finally:
        pool.close()


async def test_a_place_that_comes_as_its_request_leaves_is_not_lost() -> None:
    pool = PromptPool(settings(**FLAGS), 1, QUICK)
    try:
        await pool._take_place()
        leaving = asyncio.create_task(pool._take_place())
        await asyncio.sleep(0)
        pool.give_place()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert pool._num_free == 1 and not pool._waiting
    finally:
        pool.close()


CASES = {
    "a chat": ("chat", chat("What is the capital of France?", echo=True, stop=["a"])),
    "a long chat": ("chat", chat(LONG, truncate_prompt_tokens=100)),
    "text": ("completion", body(prompt=["Once", "upon a time"], echo=True, logit_bias={"5": 1.0}, n=2)),
    "token ids": ("completion", body(prompt=[[1, 2], [3]], unheard_of=1, bad_words=["no"])),
    "tokens of a text": ("tokenize", body(prompt=LONG, return_token_strs=True)),
    "tokens of a chat": ("tokenize", body(messages=[{"role": "user", "content": "Hi"}])),
    "text of tokens": ("detokenize", body(tokens=[100] * 50_000)),
    "a refusal": ("completion", body(prompt="x", top_p=2)),
    "another model": ("chat", chat(model="nobody")),
    "no JSON": ("chat", b"{"),
    "nothing": ("chat", b""),
    "deep": ("completion", b'{"prompt": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


async def test_a_process_answers_as_the_server_itself() -> None:
    pool = PromptPool(settings(), 1)
    own = preparer()
    try:
        for name, (kind, raw) in CASES.items():
            pieces = [raw[at : at + 5000] for at in range(0, len(raw), 5000)]
            reply = await pool.prepare(kind, pieces)
            expected = own.prepare(kind, raw)
            if isinstance(expected, Written):
                assert b"".join(reply.pieces) == b"".join(expected.pieces), name
            else:
                assert reply == expected, name
    finally:
        pool.close()


async def test_processes_are_used_again() -> None:
    """However many requests come at once, those that are quick need as many processes as there are places."""
    pool = PromptPool(settings(), 2)
    try:
        assert isinstance(await pool.prepare("chat", [chat()]), Prepared)
        used: set[int] = set()
        for _ in range(3):
            await asyncio.gather(*(pool.prepare("chat", [chat()]) for _ in range(40)))
            used |= {process._process.pid for process in pool.processes.idle}
        assert len(used) <= 6  # two places, two kept ready, and room for two that a busy machine made slow
    finally:
        pool.close()
