"""Logits processors, named log-probabilities and the temperature of scores, in steps of all kinds."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from engine_walk_cases import ORDERS, Walk, expected_tokens, make_engine
from fake_model import NAN_TOKEN, VOCAB_SIZE, next_logits

from fuseline.engine.params import LogitsProcessor, SamplingParams
from fuseline.engine.run.logits_processors import find_callable, for_sequence, make_processor

PROMPT = list(range(1, 15))
NAME = "row_edit_cases"


class Counting:
    """Allows only the token whose number is how often it was called, plus an offset."""

    def __init__(self, offset: int = 0) -> None:
        self.offset, self.count = offset, 0

    def clone(self) -> Counting:
        return Counting(self.offset)

    def __call__(self, generated: list[int], row: torch.Tensor) -> torch.Tensor:
        assert len(generated) == self.count, "it sees every token once"
        token, self.count = (self.offset + self.count) % VOCAB_SIZE, self.count + 1
        return torch.full_like(row, -torch.inf).index_fill(0, torch.tensor([token]), 0.0)


def echo(prompt: list[int], generated: list[int], row: torch.Tensor) -> torch.Tensor:
    row[prompt[len(generated)]] = torch.inf
    return row


def lower(generated: list[int], row: torch.Tensor) -> torch.Tensor:
    """The likeliest token becomes the least likely one; changes the row it was given."""
    row[row.argmax()] = -torch.inf
    return row


def fail(generated: list[int], row: torch.Tensor) -> torch.Tensor:
    if len(generated) == 2:
        raise RuntimeError("no")
    return row


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType(NAME)
    bad = {"wide": lambda generated, row: row[:-1], "nothing": lambda generated, row: row - torch.inf}
    for name, value in {"Counting": Counting, "echo": echo, "lower": lower, "fail": fail, **bad}.items():
        setattr(made, name, value)
    monkeypatch.setitem(sys.modules, NAME, made)


def named(name: str, **arguments: object) -> tuple[LogitsProcessor, ...]:
    return (LogitsProcessor(qualname=f"{NAME}.{name}", is_factory=bool(arguments), **arguments),)


@pytest.mark.parametrize("order", ORDERS)
def test_processors_choose_the_tokens_of_their_sequence_alone(order: str) -> None:
    walk = Walk(make_engine(order=order))
    counts = walk.submit(PROMPT, n=2, max_tokens=6, logits_processors=named("Counting", args=(20,)))
    other = walk.submit([5, 6, 7], max_tokens=6, seed=3)
    echoes = walk.submit(PROMPT, temperature=0.0, max_tokens=6, logits_processors=named("echo"))
    walk.finish()
    assert walk.tokens(counts, 0) == walk.tokens(counts, 1) == list(range(20, 26))
    assert walk.tokens(echoes) == PROMPT[:6]
    assert walk.tokens(other) == expected_tokens(walk.requests[other], 0, (0,))


def test_processors_run_in_their_order_and_before_bias_and_masks() -> None:
    walk = Walk(make_engine())
    first = named("Counting", args=(20,)) + named("Counting", args=(30,))
    both = walk.submit(PROMPT, max_tokens=3, logits_processors=first)
    banned = walk.submit(PROMPT, max_tokens=1, bad_words=((20,),), logits_processors=named("Counting", args=(20,)))
    walk.finish()
    assert walk.tokens(both) == [30, 31, 32]
    assert 20 not in walk.tokens(banned), "a mask is harder than a processor"


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs"])
def test_raw_scores_are_those_before_the_processors(mode: str) -> None:
    engine = make_engine()
    engine.runner.sampler.mode = ["raw_logprobs", "processed_logprobs", "raw_logits"].index(mode)
    walk = Walk(engine)
    name = walk.submit(PROMPT, temperature=0.0, max_tokens=1, logprobs=3, logits_processors=named("lower"))
    walk.finish()
    raw = torch.from_numpy(next_logits(PROMPT, (0,)))
    second = int(raw.argsort(descending=True)[1])
    (scores,) = walk.outputs[name, 0][0].logprobs
    assert scores.token_id == second
    if mode == "processed_logprobs":
        raw[raw.argmax()] = -torch.inf
    values = raw if mode == "raw_logits" else torch.log_softmax(raw, 0)
    assert scores.logprob == pytest.approx(float(values[second]), abs=1e-5)
    assert scores.rank == (1 if mode == "processed_logprobs" else 2)
    best = values.topk(3)
    assert list(scores.top_ids) == best.indices.tolist()
    assert list(scores.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["fail", "wide", "nothing"])
def test_a_processor_that_fails_ends_its_request_alone(name: str) -> None:
    walk = Walk(make_engine())
    bad = walk.submit(PROMPT, max_tokens=6, logits_processors=named(name))
    good = walk.submit(PROMPT, max_tokens=6, seed=3)
    walk.finish()
    last = walk.outputs[bad, 0][-1]
    assert last.finish_reason == "error" and last.is_bad_request and "logits processor" in last.error
    assert walk.tokens(good) == expected_tokens(walk.requests[good], 0, (0,))
    again = walk.submit([*PROMPT, 1], max_tokens=2, seed=3)
    walk.finish()
    assert walk.outputs[again, 0][0].num_cached_tokens == 12, "its KV is as good as any"


def test_a_fault_of_the_model_stays_one() -> None:
    walk = Walk(make_engine())
    bad = walk.submit([*PROMPT, NAN_TOKEN], max_tokens=2, logprobs=1, logits_processors=named("echo"))
    walk.finish()
    last = walk.outputs[bad, 0][-1]
    assert last.finish_reason == "error" and "not finite" in last.error and not last.is_bad_request


def test_one_that_cannot_be_made_is_the_requests_own_error() -> None:
    walk = Walk(make_engine())
    for spec in (named("nobody"), named("Counting", kwargs={"x": 1}), named("Counting", args=(1, 2))):
        name = walk.submit(PROMPT, logits_processors=spec)
        walk.finish()
        assert walk.outputs[name, 0][-1].is_bad_request and "cannot be used" in walk.outputs[name, 0][-1].error


@pytest.mark.parametrize("order", ORDERS)
def test_named_tokens_are_scored_in_place_of_the_best(order: str) -> None:
    walk = Walk(make_engine(order=order))
    ids = (9, 3, 40)
    name = walk.submit(PROMPT, temperature=0.0, max_tokens=4, logprobs=0, logprob_token_ids=ids)
    other = walk.submit(PROMPT, temperature=0.0, max_tokens=4, logprobs=2)
    walk.finish()
    tokens = list(PROMPT)
    for output, plain in zip(walk.outputs[name, 0], walk.outputs[other, 0], strict=True):
        (scores,) = output.logprobs
        values = torch.log_softmax(torch.from_numpy(next_logits(tokens, (0,))), 0)
        assert scores.top_ids == ids
        assert list(scores.top_logprobs) == pytest.approx(values[list(ids)].tolist(), abs=1e-5)
        assert len(plain.logprobs[0].top_ids) == 2 and plain.logprobs[0].logprob == scores.logprob
        tokens.append(scores.token_id)


def test_scores_at_a_temperature_of_greedy_steps() -> None:
    walk = Walk(make_engine())
    name = walk.submit(PROMPT, temperature=0.0, max_tokens=1, logprobs=4, scores_temperature=2.5)
    walk.finish()
    (scores,) = walk.outputs[name, 0][0].logprobs
    best = torch.log_softmax(torch.from_numpy(next_logits(PROMPT, (0,))) / 2.5, 0).topk(4)
    assert list(scores.top_ids) == best.indices.tolist()
    assert list(scores.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_names_are_found_and_called_as_they_take_it() -> None:
    assert find_callable("collections.abc.Sequence.index").__name__ == "index"
    for bad in ("nodots", "no_such_module.x", "math.nothing", "math.pi"):
        with pytest.raises(ValueError):
            find_callable(bad)
    assert for_sequence(make_processor(named("echo")[0])).takes_prompt
    assert not for_sequence(make_processor(named("Counting", args=(1,))[0])).takes_prompt
    assert SamplingParams().logits_processors == ()
