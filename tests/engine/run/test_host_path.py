"""Cost of a step for the host: counted in function calls, which no other load on the machine can change."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from fake_model import FakeModel, fake_config

from fuseline.compile.graph_inputs import StepOutput
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest, StepExpander, TokenDeltas
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import HostDevice, SampleOps

LONGEST = 4096


def always_seven(tokens, logprobs, ranks, top_ids, top_logprobs, ok, *_) -> None:
    tokens.fill_(7)
    ok.fill_(1)


class NoModel(FakeModel):
    def run(self, inputs) -> StepOutput:
        return StepOutput(torch.zeros(len(inputs.logits_rows), self.info.vocab_size))


def make_engine(num_running: int, num_waiting: int, context: int, ahead: bool) -> Engine:
    model = NoModel(max_model_len=LONGEST)
    num_blocks = num_running * (context + 200) // 4
    config = fake_config(
        max_model_len=LONGEST, max_num_seqs=num_running, max_num_batched_tokens=num_running * LONGEST,
        async_scheduling=ahead,
    )  # fmt: skip
    engine = Engine(config, model, [num_blocks], HostDevice(SampleOps(always_seven, always_seven)))
    for number in range(num_running + num_waiting):
        params = SamplingParams(max_tokens=100, temperature=0.0, eos_token_ids=(0,))
        # All of a length, so that their blocks get full in the same steps.
        prompt = (1 + number % 40, 2 + number // 40) * (context // 2)
        engine.add(EngineRequest(request_id=f"r{number}", prompt_token_ids=prompt, params=params))
    for _ in range(5):
        engine.step()
    assert len(engine.scheduler.running) == num_running and len(engine.scheduler.waiting) == num_waiting
    return engine


def count_calls(engine: Engine, num_steps: int = 1) -> int:
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # its callbacks, which other tests may have set, are calls too
    sys.setprofile(note)
    try:
        for _ in range(num_steps):
            engine.step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


BLOCK_STEPS = 4
"""After as many steps every sequence has got one block full and one new."""


def calls(num_running: int, num_waiting: int = 0, context: int = 40) -> int:
    return count_calls(make_engine(num_running, num_waiting, context, ahead=False), BLOCK_STEPS)


def test_calls_do_not_grow_with_the_queue() -> None:
    assert calls(8, num_waiting=600) == calls(8, num_waiting=1)


def test_calls_do_not_grow_with_the_context() -> None:
    # 32 blocks more may change the width of the tables once.
    assert calls(8, context=1600) <= calls(8, context=80) + 10


def test_a_plain_row_costs_no_call_of_its_own() -> None:
    few, many = calls(4), calls(64)
    # The rest is a full block: its key, its place in the cache, the next block; once in four steps.
    assert (many - few) / 60 <= 40
    engine_of_few, engine_of_many = (make_engine(count, 0, 41, ahead=False) for count in (4, 64))
    for engine in (engine_of_few, engine_of_many):
        engine.step()
    fewest = [min(count_calls(engine) for _ in range(BLOCK_STEPS)) for engine in (engine_of_few, engine_of_many)]
    assert fewest[1] == fewest[0], "a step without a full block has no loop over its sequences"


@pytest.mark.parametrize("ahead", [False, True], ids=["in_order", "overlapped"])
def test_plain_tokens_cross_as_two_arrays(ahead: bool) -> None:
    engine = make_engine(8, 0, 40, ahead)
    step = engine.step()
    assert not step.outputs and len(step.deltas.handles) == len(step.deltas.token_ids) == 8 * 8


def test_the_expander_tells_plain_tokens_apart_and_forgets_what_has_ended() -> None:
    engine = make_engine(1, 0, 40, ahead=False)
    expander, fresh = StepExpander(), StepExpander()
    engine.add(EngineRequest(request_id="x", prompt_token_ids=(3,), params=SamplingParams(max_tokens=3)))
    engine.abort("r0")
    seen = [output for _ in range(4) for output in expander.expand(engine.step()).outputs]
    assert [(output.request_id, output.token_ids, output.finish_reason) for output in seen] == [
        ("r0", (), "abort"), ("x", (7,), None), ("x", (7,), None), ("x", (7,), "length"),
    ]  # fmt: skip
    assert not expander._choices
    with pytest.raises(KeyError):
        fresh._output(0, 7)
    assert TokenDeltas().handles == b""
