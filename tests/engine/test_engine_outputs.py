"""Outputs of a request: endings, log-probabilities, errors that stay its own; and the sampling rules of SPEC 6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_walk_cases import Walk, expected_tokens, make_engine
from fake_model import NAN_TOKEN, next_logits

from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.sampler import Sampler, banned_tokens
from fuseline.engine.run.sampler_reference import reference_device
from fuseline.engine.run.sampling import launch_sampling
from fuseline.engine.schedule.budget import StepBudget, make_batch
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.sequence import SequenceOptions, make_sequences

PROMPT = list(range(1, 15))


def greedy_walk(**params) -> tuple[Walk, str]:
    walk = Walk(make_engine())
    name = walk.submit(PROMPT, **{"temperature": 0.0, "max_tokens": 6, **params})
    walk.finish()
    return walk, name


FREE = expected_tokens(
    EngineRequest(request_id="r", prompt_token_ids=tuple(PROMPT), params=SamplingParams(temperature=0.0, max_tokens=6)),
    0,
    (0,),
)


def test_the_free_run_has_distinct_tokens() -> None:
    assert len(set(FREE[:4])) == 4


@pytest.mark.parametrize(
    "params, tokens, reason, stop_token",
    [
        ({}, FREE, "length", None),
        ({"eos_token_ids": (FREE[2],)}, FREE[:3], "stop", None),
        ({"stop_token_ids": (FREE[2],)}, FREE[:3], "stop", FREE[2]),
        ({"eos_token_ids": (FREE[2],), "stop_token_ids": (FREE[2],)}, FREE[:3], "stop", None),
        ({"max_tokens": 1, "stop_token_ids": (FREE[0],)}, FREE[:1], "stop", FREE[0]),
        ({"max_tokens": 0}, [], "length", None),
    ],
)
def test_endings(params, tokens, reason, stop_token) -> None:
    walk, name = greedy_walk(**params)
    last = walk.outputs[name, 0][-1]
    assert (walk.tokens(name), last.finish_reason, last.stop_token_id) == (tokens, reason, stop_token)


def test_min_tokens_masks_what_would_end_the_sequence() -> None:
    walk, name = greedy_walk(min_tokens=4, stop_token_ids=(FREE[0],), masked_eos_token_ids=(FREE[1],))
    tokens = walk.tokens(name)
    assert not {FREE[0], FREE[1]} & set(tokens[:4]) and len(tokens) >= 4


def test_context_ends_the_sequence() -> None:
    walk = Walk(make_engine())
    name = walk.submit([5] * 60, max_tokens=50)
    walk.finish()
    assert len(walk.tokens(name)) == 4 and walk.reason(name) == "length"


def log_softmax(tokens: list[int]) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(next_logits(tokens, (0,))), 0).numpy()


def check_position(entry, tokens: list[int], token: int, count: int) -> None:
    expected = log_softmax(tokens)
    assert entry.token_id == token and entry.logprob == pytest.approx(expected[token], abs=1e-6)
    assert entry.rank == int((expected > expected[token]).sum()) + 1
    assert list(entry.top_ids) == np.argsort(-expected, kind="stable")[:count].tolist()
    assert entry.top_logprobs == pytest.approx(sorted(expected, reverse=True)[:count], abs=1e-6)


def test_logprobs_are_raw_and_one_for_each_token() -> None:
    walk, name = greedy_walk(logprobs=3, logit_bias=((FREE[0], -100.0),))
    entries = [entry for output in walk.outputs[name, 0] for entry in output.logprobs]
    tokens = walk.tokens(name)
    assert len(entries) == 6 and tokens[0] != FREE[0]
    for count, entry in enumerate(entries):
        check_position(entry, PROMPT + tokens[:count], tokens[count], 3)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_despite_a_cached_prefix(max_tokens: int) -> None:
    walk = Walk(make_engine())
    walk.submit(PROMPT, max_tokens=1)
    walk.finish()
    name = walk.submit(PROMPT, max_tokens=max_tokens, prompt_logprobs=2, n=2)
    walk.finish()
    first, *others = walk.outputs[name, 0]
    assert len(first.prompt_logprobs) == len(PROMPT) and first.prompt_logprobs[0] is None
    for position in range(1, len(PROMPT)):
        check_position(first.prompt_logprobs[position], PROMPT[:position], PROMPT[position], 2)
    assert all(output.prompt_logprobs is None for output in [*others, *walk.outputs[name, 1]])


def test_not_finite_logits_fail_that_request_alone() -> None:
    walk = Walk(make_engine())
    good = walk.submit(PROMPT, max_tokens=6)
    bad = walk.submit([3, NAN_TOKEN, 4], max_tokens=6, n=2)
    walk.finish()
    assert [walk.reason(bad, index) for index in range(2)] == ["error", "error"]
    assert "not finite" in walk.outputs[bad, 0][-1].error
    assert walk.tokens(good) == expected_tokens(walk.requests[good], 0, (0,))


def test_an_exception_fails_its_request_alone(monkeypatch) -> None:
    import fuseline.engine.outputs as module

    real = module.find_ending

    def find_ending(seq, token, length, max_model_len):
        if seq.request.request_id == "r1":
            raise RuntimeError("broken")
        return real(seq, token, length, max_model_len)

    monkeypatch.setattr(module, "find_ending", find_ending)
    walk = Walk(make_engine())
    names = [walk.submit(PROMPT, max_tokens=4) for _ in range(3)]
    walk.finish()
    assert [walk.reason(name) for name in names] == ["length", "error", "length"]


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "empty"),
        ([48], {}, "out of vocabulary"),
        ([5] * 64, {}, "64 tokens"),
        ([5], {"logit_bias": ((-1, 1.0),)}, "-1"),
    ],
)
def test_requests_that_cannot_be_served(prompt, params, message) -> None:
    walk = Walk(make_engine())
    name = walk.submit(prompt, **params)
    walk.finish()
    assert walk.reason(name) == "error" and message in walk.outputs[name, 0][-1].error


def test_unseeded_requests_follow_the_servers_seed() -> None:
    def run(seed: int) -> list[int]:
        walk = Walk(make_engine(seed=seed))
        name = walk.submit(PROMPT, max_tokens=8, seed=None)
        walk.finish()
        return walk.tokens(name)

    assert run(1) == run(1) != run(2)


def sequence(tokens: list[int], num_prompt: int, **params):
    request = EngineRequest(
        request_id="r", prompt_token_ids=tuple(tokens[:num_prompt]), params=SamplingParams(**params)
    )
    (seq,) = make_sequences(request, (0,), params.get("seed") or 0, SequenceOptions(is_caching=False))
    seq.tokens.extend(tokens[num_prompt:])
    seq.row = 0
    return seq


def draw(logits: list[float], tokens=(0,), num_prompt=1, **params) -> int:
    rows = RequestRows(1, 64)
    seq = sequence(list(tokens), num_prompt, **params)
    rows.load(seq, len(tokens) - 1)
    budget = StepBudget(1, 1, np.ones(1, np.int64), np.zeros(1, np.int64))
    sampler, batch = Sampler(rows, len(logits), "raw_logprobs"), make_batch(budget, rows)
    arguments = sampler.prepare(batch)
    sampler.fill(batch, arguments, None)
    return int(launch_sampling(reference_device(), torch.tensor([logits]), arguments, None).tokens[0])


def support(logits: list[float], **params) -> set[int]:
    return {draw(logits, seed=seed, **params) for seed in range(300)}


def test_truncation_keeps_the_right_tokens() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    assert support(logits) == {0, 1, 2, 3}
    assert support(logits, top_k=2) == {0, 1}
    assert support(logits, top_p=0.7) == {0, 1}
    assert support(logits, min_p=0.4) == {0, 1}
    # min_p first: of 0.5, 0.25 kept, top_p 0.6 then needs only the first.
    assert support(logits, min_p=0.4, top_p=0.6) == {0}
    assert support(logits, top_p=0.01) == {0}


def test_masks_bias_and_penalties() -> None:
    logits = [3.0, 2.0, 1.0, -1.0]
    assert draw(logits, temperature=0.0) == 0
    assert draw(logits, temperature=0.0, allowed_token_ids=(2, 3)) == 2
    assert draw(logits, temperature=0.0, allowed_token_ids=(2, 3), logit_bias=((0, 100.0), (3, 2.5))) == 3
    assert draw(logits, temperature=0.0, repetition_penalty=2.0) == 1  # token 0 is in the prompt
    assert draw(logits, temperature=0.0, presence_penalty=2.0) == 0  # and presence looks at the output only
    assert draw(logits, tokens=(3, 0), temperature=0.0, presence_penalty=1.5) == 1
    assert draw(logits, tokens=(3, 0, 0), temperature=0.0, frequency_penalty=0.6) == 1


def test_tiny_temperature_is_raised() -> None:
    rows = RequestRows(1, 8)
    rows.load(sequence([1], 1, temperature=1e-6))
    assert rows.temperature[0] == np.float32(0.01)


def test_bad_words_ban_the_last_token_after_their_beginning() -> None:
    params = SamplingParams(bad_words=((4,), (5, 6), (1, 7)))
    assert banned_tokens(params, np.array([], np.int32)) == [4]
    assert banned_tokens(params, np.array([5], np.int32)) == [4, 6]
    assert banned_tokens(params, np.array([1, 2], np.int32)) == [4]


def test_the_prompt_is_not_output_for_bad_words() -> None:
    logits = [0.0] * 7 + [3.0]
    assert draw(logits, tokens=(2, 1), num_prompt=2, temperature=0.0, bad_words=((1, 7),)) == 7
    assert draw(logits, tokens=(2, 1), num_prompt=1, temperature=0.0, bad_words=((1, 7),)) != 7
