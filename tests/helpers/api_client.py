"""The server's application on the bundled model, in this process: one engine for all tests of a module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fuseline.api.llm import LLM

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Api:
    def __init__(self, model: str = "demo", **flags: Any) -> None:
        self._llm = LLM(model, show_progress=False, **flags)

    def call(self, method: str, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._llm._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await client.request(method, path, **({"json": body} if body is not None else {}), **kwargs)

        return self._llm._call(send())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.call("POST", path, body)

    def answer(self, path: str, **fields: Any) -> dict[str, Any]:
        response = self.post(path, {"model": "demo", **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer; it must end with [DONE]."""
        response = self.post(path, {"model": "demo", "stream": True, **fields})
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def close(self) -> None:
        self._llm.close()


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    opened = Api()
    yield opened
    opened.close()
