"""Beams as sequences of the engine: in any room and any order of stages, the hypotheses are those of the rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from fake_model import NAN_TOKEN, FakeModel, FakeQueue, fake_config, next_logits, reference_device

from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest, TokenOutput
from fuseline.engine.params import BeamParams, SamplingParams

PROMPT = tuple(range(1, 14))
EOS = (3, 11, 20, 28)


def reference(
    prompt: tuple[int, ...], width: int, num_steps: int, windows: tuple[int, ...], with_state: bool = False
) -> list[list[int]]:
    """Tokens of the best hypotheses, without a penalty for length; an EOS is not among the tokens."""
    live, done = [([], 0.0)], []
    for _ in range(num_steps):
        found = []
        for tokens, logprob in live:
            logits = torch.from_numpy(next_logits([*prompt, *tokens], windows, None, with_state))
            best = torch.log_softmax(logits, 0).topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                (done if token in EOS else found).append((tokens + [token], logprob + value))
        live = sorted(found, key=lambda beam: -beam[1])[:width]
    every = [(tokens[:-1], logprob) for tokens, logprob in done] + live
    return [tokens for tokens, _ in sorted(every, key=lambda beam: -beam[1])[:width]]


def beams(name: str, width: int, steps: int, prompt: tuple[int, ...] = PROMPT) -> EngineRequest:
    params = SamplingParams(
        n=width, temperature=0.0, max_tokens=steps, logprobs=2 * width, eos_token_ids=EOS,
        beams=BeamParams(length_penalty=0.0),
    )  # fmt: skip
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params)


def stream(name: str, steps: int) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=(5, 6, 7), params=SamplingParams(max_tokens=steps, temperature=0.0)
    )


def engine_of(
    windows: tuple[int, ...] = (0,), is_queue: bool = False, blocks: int = 64, states: int = 0, **settings: object
) -> Engine:
    model = FakeModel(windows, with_state=states > 0)
    model.allocate_caches([blocks + 1] * len(windows))
    model.allocate_states(states)
    device = FakeQueue() if is_queue else reference_device(None)
    config = fake_config(**{"max_num_seqs": 8, **settings})
    return Engine(config, model, [blocks] * len(windows), device, num_states=states)


def run(engine: Engine, *requests: EngineRequest) -> dict[str, list[TokenOutput]]:
    found: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(2000):
        if not engine.has_work:
            return found
        for output in engine.step().outputs:
            found[output.request_id].append(output)
    raise AssertionError("it does not end")


def tokens(outputs: list[TokenOutput]) -> list[list[int]]:
    ended = [output for output in outputs if output.finish_reason]
    assert [output.index for output in ended] == list(range(len(ended)))
    return [list(output.token_ids) for output in ended]


SETTINGS: dict[str, dict[str, object]] = {
    "roomy": {}, "overlapped": {"async_scheduling": True}, "asynchronous": {"is_queue": True},
    "few rows": {"max_num_seqs": 3}, "one row": {"max_num_seqs": 1}, "few blocks": {"blocks": 13},
    "few blocks, asynchronous": {"blocks": 13, "is_queue": True}, "no cache": {"enable_prefix_caching": False},
    "few tokens": {"max_num_batched_tokens": 8}, "window": {"windows": (6,)}, "groups": {"windows": (0, 7)},
    "groups, few blocks": {"windows": (0, 7), "blocks": 14}, "states": {"states": 8}, "few states": {"states": 3},
    "states, asynchronous": {"states": 8, "is_queue": True}, "only states": {"states": 6, "windows": ()},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_hypotheses_are_those_of_the_rules(settings: dict[str, object]) -> None:
    windows, with_state = settings.get("windows", (0,)), "states" in settings
    for width, steps in itertools.product((1, 3, 5), (1, 9)):
        engine = engine_of(**settings)
        found = run(engine, stream("s", 12), beams("a", width, steps), beams("b", 2, steps, PROMPT[::-1]))
        assert tokens(found["a"]) == reference(PROMPT, width, steps, windows, with_state)
        assert tokens(found["b"]) == reference(PROMPT[::-1], 2, steps, windows, with_state)
        assert engine.kv.usage == 0 and not engine.scheduler.running and not engine.requests.live


def test_forks_share_full_blocks_and_copy_one() -> None:
    engine = engine_of()
    engine.add(beams("a", 8, 20, PROMPT))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.kv.groups[0].pool.num_used)
    alone = -(-(len(PROMPT) + 20) // engine.kv.block_size)
    assert most < 8 * alone / 2


def test_forks_copy_the_state() -> None:
    """Beams that go on in a slot of their own compute no prompt again."""
    engine = engine_of(states=8)
    engine.add(beams("a", 4, 20))
    computed = 0
    while engine.has_work:
        computed += engine.step().stats.num_prompt_tokens
    assert computed == len(PROMPT)


def test_an_abort_frees_all_of_a_group() -> None:
    engine = engine_of(blocks=13)
    engine.add(beams("a", 5, 30))
    for _ in range(4):
        engine.step()
    assert engine.kv.usage > 0
    engine.abort("a")
    outputs = [output for _ in range(3) for output in engine.step().outputs]
    assert [(output.index, output.finish_reason) for output in outputs] == [(k, "abort") for k in range(5)]
    assert engine.kv.usage == 0 and not engine.has_work


def test_a_fault_ends_all_choices() -> None:
    (outputs,) = run(engine_of(), beams("a", 3, 5, (1, NAN_TOKEN))).values()
    assert [(output.index, output.finish_reason) for output in outputs] == [(k, "error") for k in range(3)]


def test_a_pause_in_the_middle_changes_nothing() -> None:
    engine = engine_of()
    engine.add(beams("a", 4, 12))
    outputs = [output for _ in range(6) for output in engine.step().outputs]
    engine.pause()
    engine.resume()
    while engine.has_work:
        outputs += engine.step().outputs
    assert tokens(outputs) == reference(PROMPT, 4, 12, (0,))
