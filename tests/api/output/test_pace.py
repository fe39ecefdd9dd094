"""No round of the event loop does much, however much there is to prepare, to start, to take or to encode."""

from __future__ import annotations

import asyncio
from array import array
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rounds import WorkClock, longest_round

from fuseline.api.config_resolve import resolve
from fuseline.api.middleware import PaceMiddleware
from fuseline.api.output.events import Prompt, PromptInfo, TextDelta
from fuseline.api.output.generation import OUTPUTS_AT_ONCE, Generation, TextOptions
from fuseline.api.output.interval import Interval
from fuseline.api.output.logprobs import SLICE, JsonList, LogprobWriter, encode_pieces
from fuseline.api.output.openai_chat import ChatWriter
from fuseline.api.output.openai_completion import CompletionWriter, Shape
from fuseline.api.output.outbox import WRITE_BYTES
from fuseline.api.output.pace import LARGE, SLICE_SECONDS, Turns
from fuseline.api.output.response import Answer, raw_response
from fuseline.api.output.watch import RequestWatch
from fuseline.api.served import Served, load_tokenizer
from fuseline.engine.messages import EngineRequest, PositionLogprobs, TokenOutput
from fuseline.engine.params import SamplingParams

NUM_POSITIONS = 1000
POSITION_SECONDS = 1e-4
PIECE_SECONDS = SLICE * POSITION_SECONDS
TOP = tuple(range(300, 320)), tuple(-0.25 * k for k in range(20))
IDS = [100 + k % 3000 for k in range(NUM_POSITIONS)]
POSITIONS = [PositionLogprobs(id, -1.5, 3, *TOP) for id in IDS]


class Slow(LogprobWriter):
    """Each position is some work."""

    def __init__(self, clock: WorkClock) -> None:
        super().__init__(load_tokenizer(resolve({"model": "demo"})), False)
        self._clock = clock

    def completion(self, positions, tokens, offsets):
        self._clock.work(POSITION_SECONDS * len(positions))
        return super().completion(positions, tokens, offsets)

    def chat_tokens(self, positions, num_top):
        self._clock.work(POSITION_SECONDS * len(positions))
        return super().chat_tokens(positions, num_top)

    def prompt(self, positions):
        self._clock.work(POSITION_SECONDS * len(positions))
        return super().prompt(positions)


def shape(clock: WorkClock, **fields: Any) -> Shape:
    fields = {"wants_logprobs": True, "num_top": 20, **fields}
    return Shape("id-1", 0, "demo", Slow(clock), turns=Turns(clock), **fields)


def prompt() -> Prompt:
    return Prompt(array("i", IDS), 0, load_tokenizer(resolve({"model": "demo"})).decode(IDS, False))


def parsed(body: dict[str, Any]) -> dict[str, Any]:
    return msgspec.json.decode(b"".join(encode_pieces(body)))


async def test_work_at_the_same_time_takes_turns() -> None:
    """However many there are, a round has a slice of one of them, and a piece of another."""
    clock = WorkClock()
    turns = Turns(clock)

    async def work() -> None:
        for _ in range(20):
            await turns.rest()
            clock.work(0.002)

    longest, _ = await longest_round(clock, asyncio.wait([asyncio.create_task(work()) for _ in range(20)]))
    assert longest <= SLICE_SECONDS + 2 * 0.002 + 1e-9


async def test_a_cancelled_request_does_not_keep_its_turn() -> None:
    turns = Turns()
    waiting = [asyncio.create_task(turns.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait_for(waiting[2], 60)
    await asyncio.wait_for(turns.wait(), 60)


async def test_a_small_request_passes_a_crowd_of_larger_ones_and_the_oldest_is_not_left_behind() -> None:
    clock, order = WorkClock(), []
    turns = Turns(clock)

    async def work(name: str, size: int) -> None:
        await turns.wait(size)
        order.append(name)

    crowd = [asyncio.create_task(work(f"large {k}", 5000 + k)) for k in range(60)]
    await asyncio.sleep(0)
    small = [asyncio.create_task(work(f"small {k}", 72)) for k in range(30)]
    await asyncio.wait_for(asyncio.gather(*crowd, *small), 60)
    assert order.index("small 0") <= 3
    firsts = [name for name in order if name.startswith("large")]
    assert firsts.index("large 0") == 0 and order.index("large 20") <= 2 * 21 + 2
    assert len(order) == 90 and not turns._by_size


async def test_small_bodies_that_come_at_once_are_prepared_one_a_round() -> None:
    clock = WorkClock()

    def prepare(kind: str, raw: bytes) -> str:
        clock.work(0.003)
        return "prepared"

    served = SimpleNamespace(pools=None, preparer=SimpleNamespace(prepare=prepare), turns=Turns(clock))
    jobs = [asyncio.create_task(Served.prepare(served, "completion", [b"{}"])) for _ in range(64)]
    longest, _ = await longest_round(clock, asyncio.wait(jobs))
    assert {job.result() for job in jobs} == {"prepared"}
    assert longest <= SLICE_SECONDS + 2 * 0.003 + 1e-9


SIZES = {
    "get": ([], 0), "small": ([(b"content-length", b"72")], 72), "wrong": ([(b"content-length", b"-1")], 0),
    "chunked": ([(b"transfer-encoding", b"chunked")], LARGE),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
async def test_a_request_waits_by_the_size_of_its_body(name: str) -> None:
    headers, size = SIZES[name]
    asked = []

    async def rest(size: int) -> None:
        asked.append(size)

    async def app(scope, receive, send) -> None:
        asked.append(scope)

    scope = {"type": "http", "headers": [(b"host", b"here"), *headers]}
    await PaceMiddleware(app, SimpleNamespace(rest=rest))(scope, None, None)
    assert asked == [size, scope]


async def test_requests_that_come_at_once_are_routed_one_a_round() -> None:
    clock = WorkClock()

    async def app(scope, receive, send) -> None:
        clock.work(0.0005)

    start = PaceMiddleware(app, Turns(clock))
    work = asyncio.gather(*(start({"type": "http", "headers": []}, None, None) for _ in range(64)))
    longest, _ = await longest_round(clock, work)
    assert longest <= SLICE_SECONDS + 2 * 0.0005 + 1e-9 and clock.now == pytest.approx(64 * 0.0005)


@pytest.mark.parametrize("num_requests, num_prompts", [(1, 64), (64, 1), (8, 8)])
async def test_prompts_that_come_at_once_start_one_after_the_other(num_requests: int, num_prompts: int) -> None:
    clock = WorkClock()
    turns, started = Turns(clock), []

    def make() -> SimpleNamespace:
        async def run(*_: object) -> None:
            clock.work(0.001)
            started.append(1)

        return SimpleNamespace(run=run)

    def answer() -> Answer:
        writer = SimpleNamespace(open=print)
        return Answer(None, [(Prompt(array("i")), make)] * num_prompts, writer, nullcontext(), None, turns=turns)

    work = asyncio.gather(*(answer()._generate(lambda *_: None) for _ in range(num_requests)))
    longest, _ = await longest_round(clock, work)
    assert len(started) == num_requests * num_prompts
    # Those that start in the round after they asked come on top.
    assert longest <= SLICE_SECONDS + (2 + num_requests * (num_prompts > 1)) * 0.001 + 1e-9


@pytest.mark.parametrize("n", [1, 3])
async def test_outputs_that_have_gathered_are_taken_in_slices(n: int) -> None:
    clock, seen = WorkClock(), []
    request = EngineRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams(n=n, max_tokens=1000))

    class Client:
        """Has all outputs from the beginning."""

        async def generate(self, _: EngineRequest):
            for token in range(1000):
                for index in range(n):
                    reason = "length" if token == 999 else None
                    yield TokenOutput(request_id="r", index=index, token_ids=(token,), finish_reason=reason)

    def sink(events: list) -> None:
        clock.work(1e-4)
        seen.extend(events)

    generation = Generation(
        request, None, TextOptions(turns=Turns(clock)), RequestWatch(request, "r", None, False, None)
    )
    longest, _ = await longest_round(clock, generation.run(Client(), sink, None))
    assert len(seen) == 1001 * n and longest <= SLICE_SECONDS + 2 * OUTPUTS_AT_ONCE * 1e-4


async def test_the_log_probabilities_of_an_echo_are_written_in_slices() -> None:
    clock = WorkClock()
    made = prompt()
    writer = CompletionWriter(shape(clock), [made], 2)
    longest, _ = await longest_round(clock, writer.open(made, PromptInfo(0, [None, *POSITIONS[1:]])))
    assert longest <= SLICE_SECONDS + 2 * PIECE_SECONDS
    for index in range(2):
        event = TextDelta(index, " x", [200], [POSITIONS[1]], [0])
        assert writer.is_long(made, [event])
        longest, (chunk,) = await longest_round(clock, writer.long_chunks(made, [event]))
        assert longest <= POSITION_SECONDS + 1e-9, "the echo is encoded once"
        (choice,) = parsed(chunk)["choices"]
        shown = choice["logprobs"]
        assert choice["text"] == made.echo + " x" and shown["tokens"][0] == writer._shape.writer.text(100)
        assert {len(values) for values in shown.values()} == {NUM_POSITIONS + 1}
        assert shown["token_logprobs"][:2] == [None, -1.5] and len(shown["top_logprobs"][1]) == 21
        assert shown["text_offset"][1] == len(shown["tokens"][0])
        assert not writer.is_long(made, [TextDelta(index, " y", [201], [POSITIONS[2]], [2])])


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_a_chunk_of_many_tokens_is_written_in_slices(kind: str) -> None:
    """As a large --stream-interval makes it."""
    clock = WorkClock()
    made = Prompt(array("i", [1]))

    def writer() -> ChatWriter | CompletionWriter:
        return ChatWriter(shape(clock), made, 1) if kind == "chat" else CompletionWriter(shape(clock), [made], 1)

    def event() -> list[TextDelta]:
        return [TextDelta(0, "text", list(IDS), list(POSITIONS), list(range(len(IDS))))]

    assert writer().is_long(made, event())
    longest, chunks = await longest_round(clock, writer().long_chunks(made, event()))
    assert longest <= SLICE_SECONDS + 2 * PIECE_SECONDS
    plain = [msgspec.json.decode(msgspec.json.encode(chunk)) for chunk in writer().chunks(made, event())]
    assert [parsed(chunk) for chunk in chunks] == plain
    assert max(len(piece) for piece in encode_pieces(chunks[-1])) < 200_000


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_a_whole_answer_is_encoded_in_slices_and_pieces(kind: str) -> None:
    clock = WorkClock()
    made = Prompt(array("i", IDS))
    writer = ChatWriter(shape(clock), made, 2) if kind == "chat" else CompletionWriter(shape(clock), [made], 2)
    await writer.open(made, PromptInfo(0, [None, *POSITIONS[1:]]))
    for index in range(2):
        writer.fold(made, [TextDelta(index, "text", list(IDS), list(POSITIONS), list(range(len(IDS))))])
    longest, pieces = await longest_round(clock, writer.whole())
    assert longest <= SLICE_SECONDS + 2 * PIECE_SECONDS and max(map(len, pieces)) < 200_000
    answer = msgspec.json.decode(b"".join(pieces))
    shown = [choice["logprobs"]["content" if kind == "chat" else "tokens"] for choice in answer["choices"]]
    assert [len(values) for values in shown] == [NUM_POSITIONS, NUM_POSITIONS]
    scores = answer["prompt_logprobs"] if kind == "chat" else answer["choices"][1]["prompt_logprobs"]
    assert len(scores) == NUM_POSITIONS and scores[0] is None


def test_lists_of_any_number_of_parts_become_json() -> None:
    empty, one, two = JsonList(), JsonList(), JsonList()
    one.extend([1, None])
    two.extend([{"a": "\0"}])
    two.extend([2.5, "b"])
    body = {"x": empty, "y": [one, {"z": two}], "\0": "\0"}
    assert parsed(body) == {"x": [], "y": [[1, None], {"z": [{"a": "\0"}, 2.5, "b"]}], "\0": "\0"}
    with pytest.raises(TypeError, match="not JSON"):
        encode_pieces({"x": object()})


async def test_pieces_of_any_size_become_few_writes() -> None:
    sizes = (10, 1, 3 * WRITE_BYTES + 5, 0, WRITE_BYTES - 5, 7, WRITE_BYTES)
    pieces = [bytes([97 + k]) * size for k, size in enumerate(sizes)]
    sent: list[bytes] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    await raw_response(pieces)({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    assert b"".join(sent) == b"".join(pieces) and max(map(len, sent)) <= WRITE_BYTES
    assert len([body for body in sent if body]) <= 8


def test_an_interval_joins_without_copying_what_it_holds() -> None:
    sent: list[TextDelta] = []
    interval = Interval(4, sent.extend)
    for k in range(9):
        interval.feed([TextDelta(0, "a", [k], [], [k])])
    assert [(event.text, event.token_ids) for event in sent] == [
        ("a", [0]), ("aaaa", [1, 2, 3, 4]), ("aaaa", [5, 6, 7, 8]),
    ]  # fmt: skip
