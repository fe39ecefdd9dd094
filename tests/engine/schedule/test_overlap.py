"""The next step scheduled, or launched, while one runs: the same answers, nothing lost or told twice, and on a device
that is a queue the tokens of the step before are all that is ever waited for."""

from __future__ import annotations

import threading

import pytest
from engine_client_cases import collect, greedy, make_request
from engine_walk_cases import Walk, make_engine
from fake_model import NAN_TOKEN, FakeModel, FakeQueue, build_slow_fake, fake_config, find_queue
from overlap_cases import REQUESTS, answers

from fuseline.engine.client import EngineClient
from fuseline.engine.engine import Engine
from fuseline.engine.run.device import SampleOps
from fuseline.engine.run.sampler_reference import reference_device

PROMPT = list(range(1, 15))
AHEAD = pytest.mark.parametrize("order", ["overlapped", "queued"])


def run_all(order: str, windows=(0,), **config) -> Walk:
    walk = Walk(make_engine(windows, order=order, **config))
    for params in REQUESTS.values():
        walk.submit(PROMPT, **{"max_tokens": 18, **params})
        walk.step()
    walk.submit([3, NAN_TOKEN, 4], max_tokens=5, n=2)
    walk.finish()
    return walk


@AHEAD
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_blocks": 17, "enable_prefix_caching": False},
        {"max_num_seqs": 2, "num_blocks": 12},
        {"rope_threshold": 16},
        {"windows": (0, 6), "num_blocks": 20},
        {"max_num_seqs": 12, "max_num_batched_tokens": 64},
    ],
    ids=["plain", "few blocks", "two seats", "rope switch", "window", "all at once"],
)
def test_answers_are_those_of_steps_in_order(config, order: str) -> None:
    in_order, ahead = run_all("in_order", **config), run_all(order, **config)
    expected = answers(in_order)
    assert answers(ahead) == expected
    if config.get("num_blocks", 40) < 20:
        assert ahead.engine.scheduler.num_preemptions > 0, "nothing was preempted"
    reasons = {told[3][0] for told in expected.values()}
    assert reasons == {"length", "stop", "error"}


class WatchedModel(FakeModel):
    """Its run ends only when the next step has been prepared, or after a second when it is told of none."""

    def __init__(self) -> None:
        super().__init__()
        self.was_prepared = threading.Semaphore(0)
        self.num_waited = 0

    def run(self, inputs):
        output = super().run(inputs)
        self.num_waited += self.was_prepared.acquire(timeout=1)
        return output


def test_the_next_step_is_prepared_while_one_runs() -> None:
    model = WatchedModel()
    model.allocate_caches([41])
    engine = Engine(fake_config(async_scheduling=True), model, [40], reference_device())
    walk = Walk(engine)
    walk.submit(PROMPT, max_tokens=5)
    schedule = engine.schedule
    prepared = []

    def watched():
        batch = schedule()
        if engine._order.is_running:
            prepared.append(batch.num_tokens > 0)
            model.was_prepared.release()
        return batch

    engine.schedule = watched
    walk.finish()
    assert model.num_waited == 5 and prepared == [True] * 4 + [False], "a known last token needs no further step"
    walk.check_all((0,))


@AHEAD
def test_a_sequence_that_ends_by_a_token_costs_one_more_row_and_no_token(order: str) -> None:
    counts = {}
    for how in ("in_order", order):
        walk = Walk(make_engine(order=how))
        walk.submit(PROMPT, max_tokens=20, eos_token_ids=tuple(range(20)))
        walk.finish()
        walk.check_all((0,))
        counts[how] = sum(walk.counts)
    assert counts[order] == counts["in_order"] + 1


@AHEAD
def test_abort_while_a_step_runs_drops_its_token_and_frees_the_row(order: str) -> None:
    walk = Walk(make_engine(order=order, max_num_seqs=1))
    first = walk.submit(PROMPT, max_tokens=20)
    for _ in range(4):
        walk.step()
    second = walk.submit([9, 8, 7], max_tokens=4)
    assert walk.engine._order.is_running
    walk.engine.abort(first)
    assert walk.engine.kv.usage == 0
    walk.finish()
    assert walk.reason(first) == "abort" and walk.reason(second) == "length"
    walk.check_all((0,))


@AHEAD
def test_sleep_reports_what_runs_first(order: str) -> None:
    walk = Walk(make_engine(order=order))
    name = walk.submit(PROMPT, max_tokens=8)
    for _ in range(3):
        walk.step()
    known = len(walk.tokens(name))
    walk.engine.pause()
    assert not walk.engine._order.is_running and walk.engine.has_work
    walk.step()
    assert len(walk.tokens(name)) == known + 1 and not walk.engine.has_work
    walk.engine.resume()
    walk.finish()
    walk.check_all((0,))


def test_a_fault_of_the_model_reaches_the_engines_loop() -> None:
    engine = make_engine(order="overlapped")
    walk = Walk(engine)
    walk.submit(PROMPT, max_tokens=3)

    def run(inputs):
        raise RuntimeError("the device is gone")

    engine.runner.model.run = run
    walk.step()
    with pytest.raises(RuntimeError, match="the device is gone"):
        walk.step()


def schedule(log: list[tuple[str, int]]) -> list[str]:
    return [f"{kind} {number}" for kind, number in log]


def test_a_queue_is_never_waited_for_but_for_the_step_before() -> None:
    """Prompts in chunks that sample nothing, penalties, stops, log-probabilities, preemption: always one step ahead."""
    device = FakeQueue()
    engine = make_engine(num_blocks=17, enable_prefix_caching=False)
    engine = Engine(engine.config, engine.runner.model, engine.num_blocks, device)
    walk = Walk(engine)
    for name, params in REQUESTS.items():
        if name != "bad words":
            walk.submit([*PROMPT, *range(15, 15 + len(name))], **{"max_tokens": 12, **params})
    waits = []
    while engine.has_work:
        begun = len(device.log)
        walk.step()
        waits.append(schedule(device.log[begun:]))
    last = len(waits) - 1
    assert waits[0] == ["sent 0"] and waits[last] == [f"read {last - 1}"]
    assert waits[1:last] == [[f"sent {n}", f"read {n - 1}"] for n in range(1, last)]
    assert engine.scheduler.num_preemptions > 0
    walk.finish()


def test_a_step_that_reads_its_tokens_on_the_host_is_launched_once_they_are_there() -> None:
    """Bad words of several tokens; one token long, they need to know nothing."""
    for words, is_late in ((((5, 6),), True), (((5,),), False)):
        engine = make_engine(order="queued")
        walk = Walk(engine)
        walk.submit(PROMPT, max_tokens=4, temperature=0.0, bad_words=words)
        walk.finish()
        late = schedule(engine.runner.device.log)
        assert late == ["sent 0", *(f"{kind} {n}" for n in range(3) for kind, n in (
            (("read", n), ("sent", n + 1)) if is_late else (("sent", n + 1), ("read", n)))), "read 3"]  # fmt: skip


def test_history_is_kept_on_the_device() -> None:
    """In a step that was launched before its newest tokens were known, each row with penalties sees its own; a token
    goes there once, and not at all if it came from there."""
    seen, sent = [], []
    reference = FakeQueue().ops

    def sample(*arguments) -> None:
        spans, history = arguments[17], arguments[18]
        seen.append([history[a:b].tolist() for a, b in spans.T.tolist()])
        reference.sample(*arguments)

    class Queue(FakeQueue):
        def upload(self, tensors):
            sent.append([len(tensors.get(f"{kind}_places", ())) for kind in ("known", "unknown")])
            assert tensors["history"].numel() == 0
            return super().upload(tensors)

    device = Queue(SampleOps(sample, reference.row_logprobs))
    plain = make_engine()
    walk = Walk(Engine(plain.config, plain.runner.model, plain.num_blocks, device))
    walk.submit([1, 2], max_tokens=4, frequency_penalty=0.5, temperature=0.0)
    walk.submit([3, 4], max_tokens=4)
    walk.submit([5], max_tokens=4, repetition_penalty=1.5)
    walk.finish()
    first, third = ([*walk.requests[name].prompt_token_ids, *walk.tokens(name)] for name in ("r0", "r2"))
    assert seen == [[first[: 2 + n], [], third[: 1 + n]] for n in range(4)]
    assert sent == [[3, 0], [0, 2], [0, 2], [0, 2]]
    walk.submit([7, 8, 9], max_tokens=2, presence_penalty=0.5)
    walk.finish()
    assert seen[4:] == [[[7, 8, 9]], [[7, 8, 9, *walk.tokens("r3")[:1]]]], "in a row that another has had"
    assert sent[4:] == [[3, 0], [0, 1]]


def test_histories_follow_who_is_preempted() -> None:
    """Into another row, with a token that came meanwhile; prompts in pieces."""
    told = []
    for order in ("in_order", "queued"):
        walk = Walk(make_engine(num_blocks=14, order=order, max_num_batched_tokens=7))
        for number in range(4):
            walk.submit([number + 1, *PROMPT], max_tokens=15, n=1 + number % 2, **REQUESTS["penalties"])
            walk.step()
        walk.finish()
        assert walk.engine.scheduler.num_preemptions > 2
        told.append(answers(walk))
    assert told[0] == told[1]


@pytest.mark.parametrize("own_process", [True, False], ids=["process", "thread"])
@pytest.mark.parametrize("find_device", [reference_device, find_queue])
async def test_a_whole_engine_with_steps_ahead(own_process: bool, find_device) -> None:
    client = EngineClient(fake_config(async_scheduling=True), own_process, build_slow_fake, find_device)
    await client.start()
    try:
        stream = client.generate(make_request("r", max_tokens=20))
        tokens = list((await anext(stream)).token_ids)
        await client.sleep(2)
        await client.wake_up()
        async for output in stream:
            tokens += output.token_ids
        assert tokens == greedy((5, 6, 7), 20)
        assert await collect(client, make_request("s", prompt=(4, 4))) == {0: greedy((4, 4), 8)}
    finally:
        await client.shutdown(5)
