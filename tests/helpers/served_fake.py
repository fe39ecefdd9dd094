"""A served fake model without HTTP: requests in, events and metrics out."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fake_model import FakeModel, fake_config
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fuseline.api.metrics import Metrics
from fuseline.api.output.events import Event, PromptInfo
from fuseline.api.output.generation import Generation, TextOptions
from fuseline.api.output.watch import RequestWatch
from fuseline.engine.client import EngineClient
from fuseline.engine.config import CacheConfig
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.sampler_reference import reference_device


class Letters:
    """A tokenizer, and its pieces: token k is the character 64 + k."""

    cleans_up = has_runs = False
    special_ids: frozenset[int] = frozenset()

    @property
    def pieces(self) -> Letters:
        return self

    def piece(self, token: int, previous: int | None) -> str:
        return chr(64 + token)

    def inner(self, token: int) -> str:
        return chr(64 + token)


class Fake:
    """A served fake model; `shapes`: tokens of each sequence of each step."""

    def __init__(self, client: EngineClient, shapes: list[list[int]]) -> None:
        self.client, self.shapes = client, shapes
        self.registry = CollectorRegistry()
        self.metrics = Metrics("fuseline:", "fake", client.ready, CacheConfig(), self.registry)
        client.on_step.append(self.metrics.on_step)

    async def collect(
        self, prompt: list[int], stops: tuple[str, ...] = (), priority: int = 0, num_shown: int = 0, **params
    ) -> list[Event]:
        """The events of one request, as a route would get them."""
        request = EngineRequest(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(prompt), params=SamplingParams(**params),
            priority=priority, arrival_time=time.time(),
        )  # fmt: skip
        events: list[Event] = []
        watch = RequestWatch(request, "test", self.metrics, False, None)

        async def open_prompt(info: PromptInfo) -> None:
            events.append(info)

        options = TextOptions(stops, num_shown=num_shown)
        await Generation(request, Letters(), options, watch).run(self.client, events.extend, open_prompt)
        return events

    def value(self, sample: str, **labels: str) -> float:
        """Value of one sample of the metrics; `sample` is its name without the prefix."""
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for found in family.samples:
                if found.name == f"fuseline:{sample}" and labels.items() <= found.labels.items():
                    return found.value
        raise KeyError(sample)


@contextlib.asynccontextmanager
async def served_fake(step_seconds: float = 0.0, **settings: Any) -> AsyncIterator[Fake]:
    shapes: list[list[int]] = []

    class Watched(FakeModel):
        def run(self, inputs, *more):
            shapes.append(inputs.query_start.diff().tolist())
            return super().run(inputs, *more)

    def build(config, progress) -> FakeModel:
        return Watched(max_model_len=config.compile.max_model_len, step_seconds=step_seconds)

    client = EngineClient(fake_config(**settings), False, build, reference_device)
    await client.start()
    try:
        yield Fake(client, shapes)
    finally:
        await client.shutdown(5)


async def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.002)
