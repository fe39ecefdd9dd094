"""Requests for tests of the engine client, greedy ones among them."""

from __future__ import annotations

import time

from fake_model import next_logits

from fuseline.engine.client import EngineClient
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams


def make_request(name: str, prompt=(5, 6, 7), **params) -> EngineRequest:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params, arrival_time=time.time())


def greedy(prompt, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(tokens, (0,)).argmax()))
    return tokens[len(prompt) :]


async def collect(client: EngineClient, request: EngineRequest) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {index: [] for index in range(request.params.n)}
    async for output in client.generate(request):
        tokens[output.index] += output.token_ids
    return tokens
