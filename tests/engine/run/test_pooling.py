"""Pooled vectors: of the last token, or the mean, whatever happens around their request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_walk_cases import ORDERS, Walk, make_engine
from fake_model import HIDDEN_SIZE, build_fake, fake_config, hidden_state

from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineRequest, PooledOutput
from fuseline.engine.params import PoolingParams
from fuseline.engine.run.sampler_reference import reference_device

PROMPT = list(range(1, 15))
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)
KINDS = [(kind, normalize) for kind in ("last", "mean") for normalize in (False, True)]


def expected_vector(prompt: list[int], kind: str, normalize: bool) -> np.ndarray:
    states = np.stack([hidden_state(token, position) for position, token in enumerate(prompt)])
    vector = states[-1] if kind == "last" else states.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


class PoolWalk(Walk):
    def check_vector(self, name: str) -> None:
        (output,) = self.outputs[name, 0]
        request = self.requests[name]
        expected = expected_vector(request.prompt_token_ids, request.params.pooling, request.params.normalize)
        assert output.finish_reason == "stop" and output.error == ""
        np.testing.assert_allclose(np.frombuffer(output.vector, np.float32), expected, rtol=1e-5, atol=1e-6)

    def check_vectors(self) -> None:
        for name in [name for name, request in self.requests.items() if isinstance(request.params, PoolingParams)]:
            self.check_vector(name)
            del self.requests[name]


@EACH_ORDER
@pytest.mark.parametrize("config", [{}, {"num_blocks": 16, "num_host_blocks": 60}, {"max_num_batched_tokens": 5}])
def test_vectors_among_streams(order, config) -> None:
    """Prompts in chunks, cached prefixes, preemption, swapping: beside requests for tokens in the same steps."""
    walk = PoolWalk(make_engine(order=order, scheduling_policy="priority", **config))
    for number in range(4):
        walk.submit([number + 1, *PROMPT], max_tokens=20, priority=1)
        for kind, normalize in KINDS:
            walk.pool([*PROMPT, *range(20, 20 + 3 * number)], kind, normalize)
        walk.step()
    walk.finish()
    streams = {
        name: request for name, request in walk.requests.items() if not isinstance(request.params, PoolingParams)
    }
    walk.check_vectors()
    assert walk.requests == streams
    walk.check_all((0,))


@EACH_ORDER
def test_a_mean_sees_all_tokens_and_the_last_takes_the_cached_prefix(order) -> None:
    walk = PoolWalk(make_engine(order=order))
    walk.submit(PROMPT, max_tokens=1)
    walk.finish()
    last, mean = walk.pool([*PROMPT, 3], "last"), walk.pool([*PROMPT, 3], "mean")
    walk.finish()
    assert [walk.outputs[name, 0][0].num_cached_tokens for name in (last, mean)] == [12, 0]
    walk.check_vectors()


@EACH_ORDER
def test_a_preempted_mean_is_summed_anew(order) -> None:
    walk = PoolWalk(make_engine(order=order, max_num_batched_tokens=4))
    walk.pool(PROMPT, "mean")
    walk.step()
    walk.step()
    walk.engine.pause()
    walk.engine.resume()
    walk.finish()
    walk.check_vectors()


@EACH_ORDER
def test_vectors_that_are_not_finite_fail_alone(order) -> None:
    walk = PoolWalk(make_engine(order=order))
    model = walk.engine.runner.model
    real = model._hidden_states
    bad_state = float(hidden_state(40, 2)[0])
    model._hidden_states = lambda inputs: real(inputs).masked_fill(real(inputs)[:, :1] == bad_state, float("nan"))
    good, bad = walk.pool(PROMPT), walk.pool([1, 2, 40])
    walk.finish()
    assert walk.outputs[bad, 0][0].finish_reason == "error" and "not finite" in walk.outputs[bad, 0][0].error
    walk.check_vector(good)


@EACH_ORDER
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_aborted(order, num_steps) -> None:
    walk = PoolWalk(make_engine(order=order, max_num_batched_tokens=4))
    name = walk.pool(PROMPT, "mean")
    for _ in range(num_steps):
        walk.step()
    walk.engine.abort(name)
    walk.finish()
    assert [output.finish_reason for output in walk.outputs[name, 0]] == ["abort"]


def test_a_model_without_hidden_states_refuses() -> None:
    walk = PoolWalk(make_engine())
    walk.engine.requests._info = replace(walk.engine.runner.model.info, hidden_dim=0)
    name = walk.pool(PROMPT)
    walk.finish()
    (output,) = walk.outputs[name, 0]
    assert isinstance(output, PooledOutput) and output.is_bad_request and "no pooled vectors" in output.error


@pytest.mark.parametrize("own_process", [True, False], ids=["process", "thread"])
async def test_a_vector_crosses_to_the_client(own_process: bool) -> None:
    client = EngineClient(fake_config(), own_process, build_fake, reference_device)
    await client.start()
    try:
        request = EngineRequest(request_id="r", prompt_token_ids=(5, 6, 7), params=PoolingParams(pooling="mean"))
        output = await client.pool(request)
        expected = expected_vector([5, 6, 7], "mean", True)
        np.testing.assert_allclose(np.frombuffer(output.vector, np.float32), expected, rtol=1e-5)
        assert len(output.vector) == 4 * HIDDEN_SIZE and client.num_in_flight == 0
    finally:
        await client.shutdown(5)
