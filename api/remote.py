"""A running OpenAI-compatible server as our own clients see it: its address, its model, its streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fuseline.api.config import read_environment

TIMEOUT = 600
"""Seconds of silence."""
Fields = Mapping[str, Any]


class Remote:
    """A server. `url` may end in /v1, as the base URL of OpenAI's SDK does; `model` empty takes the first one listed.

    All methods raise OSError when it does not answer and ValueError with its words when it refuses.
    """

    def __init__(self, url: str, model: str = "", api_key: str = "") -> None:
        self.url = server_url(url)
        self._key = api_key or read_environment().api_key
        self._model = model

    @property
    def model(self) -> str:
        if not self._model:
            with self._open("/v1/models") as response:
                self._model = json.load(response)["data"][0]["id"]
        return self._model

    def stream_chat(self, messages: list[dict[str, Any]], fields: Fields) -> Iterator[dict[str, Any]]:
        """Deltas of the first choice."""
        body = {"model": self.model, "messages": messages, **fields}
        for event in self._events("/v1/chat/completions", body):
            yield from (choice["delta"] for choice in event["choices"])

    def stream_completion(self, prompt: str, fields: Fields) -> Iterator[str]:
        """Text of the first choice."""
        for event in self._events("/v1/completions", {"model": self.model, "prompt": prompt, **fields}):
            yield from (choice.get("text") or "" for choice in event["choices"])

    def _events(self, path: str, body: Fields) -> Iterator[dict[str, Any]]:
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                yield event

    def _open(self, path: str, body: Fields | None = None):  # noqa: ANN202 (urllib's response has no public type)
        import urllib.error
        import urllib.request

        url = self.url + path
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"{url}: {error.code} {text[:500]}") from error
        except urllib.error.URLError as error:
            raise OSError(f"{url} does not answer ({error.reason}); is the server up?") from error


def server_url(url: str) -> str:
    """The address without a final / or /v1, before which our clients put the paths of routes."""
    return url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
