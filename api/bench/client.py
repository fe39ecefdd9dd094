"""Streams one request at a time from an OpenAI-compatible server and times it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import aiohttp

from fuseline.api.bench.measure import Outcome
from fuseline.api.bench.workload import Sample, Vocabulary, pool_text
from fuseline.api.config import ConfigError

READ_BUFFER = 2**20
MAX_ERROR_CHARS = 500


@dataclass(frozen=True)
class Target:
    """Where requests go and what they carry besides the prompt."""

    base_url: str
    endpoint: str
    model: str
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: Mapping[str, object] = field(default_factory=dict)
    """Further fields of each request's body; they replace fields of the same name."""

    @property
    def is_chat(self) -> bool:
        return self.endpoint.rstrip("/").endswith("chat/completions")


def open_session(api_key: str, timeout: float) -> aiohttp.ClientSession:
    """A session without a cap on connections: the load generator bounds the requests in flight itself."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=False),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers=headers,
        read_bufsize=READ_BUFFER,
    )


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """Name of the first model the server lists. Raises ConfigError when there is no such server."""
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url) as response:
            response.raise_for_status()
            return (await response.json(content_type=None))["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{url} lists no models ({error or type(error).__name__}); is the server up?") from error


async def learn_vocabulary(session: aiohttp.ClientSession, base_url: str, model: str, seed: int) -> Vocabulary:
    """Ask /tokenize which ids ordinary text has; servers without that route get prompts as text, a word for a token."""
    text = pool_text(seed)
    # llama-server calls the text "content" and takes no "prompt".
    for name in ("prompt", "content"):
        if ids := await _tokenize(session, base_url, {"model": model, name: text, "add_special_tokens": False}):
            return Vocabulary(ids, len(ids) / (text.count(" ") + 1))
    return Vocabulary()


async def _tokenize(session: aiohttp.ClientSession, base_url: str, body: dict[str, object]) -> tuple[int, ...]:
    try:
        async with session.post(f"{base_url}/tokenize", json=body) as response:
            response.raise_for_status()
            return tuple((await response.json(content_type=None))["tokens"])
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        return ()



def request_body(target: Target, sample: Sample) -> dict[str, object]:
    body: dict[str, object] = {
        "model": target.model,
        "max_tokens": sample.output_len,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.is_chat:
        body["messages"] = [{"role": "user", "content": sample.prompt}]
    else:
        body["prompt"] = sample.prompt
    return body | ({"ignore_eos": True} if target.ignore_eos else {}) | dict(target.extra_body)


async def ask(session: aiohttp.ClientSession, target: Target, sample: Sample) -> Outcome:
    """Send one request and time its stream. Failures become `Outcome.error`, never an exception."""
    outcome = Outcome(sample.input_len)
    start = time.perf_counter()
    try:
        async with session.post(target.base_url + target.endpoint, json=request_body(target, sample)) as response:
            if response.status != 200:
                outcome.error = f"{response.status}: {(await response.text())[:MAX_ERROR_CHARS]}"
                return outcome
            await _read(response, outcome, start)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.latency = time.perf_counter() - start
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, start: float) -> None:
    last, num_chunks, usage = start, 0, None
    async for event in _events(response):
        if "error" in event:
            raise ValueError(str(event["error"])[:MAX_ERROR_CHARS])
        usage = event.get("usage") or usage
        if not _has_text(event):
            continue
        now = time.perf_counter()
        if num_chunks:
            outcome.itls.append(now - last)
        else:
            outcome.ttft = now - start
        last, num_chunks = now, num_chunks + 1
    outcome.output_len = usage["completion_tokens"] if usage else num_chunks
    outcome.input_len = usage["prompt_tokens"] if usage else outcome.input_len


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict]:
    async for line in response.content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise ValueError("the stream ended without [DONE]")


def _has_text(event: dict) -> bool:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        names = ("content", "reasoning_content", "reasoning", "tool_calls")
        if choice.get("text") or any(delta.get(name) for name in names):
            return True
    return False
