"""A running OpenAI-compatible server as our own clients see it: its address, its model, its streams."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from fuseline.api.config import ConfigError, read_environment

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
                self._model = _first_model(response.read(), self.url)
        return self._model

    def stream_chat(self, messages: list[dict[str, Any]], fields: Fields) -> Iterator[dict[str, Any]]:
        """Deltas of the first choice."""
        body = {"model": self.model, "messages": messages, **fields}
        for event in self._events("/v1/chat/completions", body):
            yield from (choice.get("delta") or {} for choice in event.get("choices") or ())

    def stream_completion(self, prompt: str, fields: Fields) -> Iterator[str]:
        """Text of the first choice."""
        for event in self._events("/v1/completions", {"model": self.model, "prompt": prompt, **fields}):
            yield from (choice.get("text") or "" for choice in event.get("choices") or ())

    def _events(self, path: str, body: Fields) -> Iterator[dict[str, Any]]:
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = _event(line[5:], self.url)
                if "error" in event:
                    raise ValueError(_words(line[5:].decode(errors="replace")))
                yield event

    def _open(self, path: str, body: Fields | None = None):  # noqa: ANN202 (urllib's response has no public type)
        import http.client
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
            raise ValueError(f"{url}: {error.code} {_words(error.read().decode(errors='replace'))}") from error
        except urllib.error.URLError as error:
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise OSError(f"{url} does not answer ({reason}); is the server up?") from error
        except http.client.HTTPException as error:
            raise OSError(f"{url} does not answer as an HTTP server does ({type(error).__name__})") from error


def _event(data: bytes, url: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{url} streams what is no JSON") from error
    if not isinstance(event, dict):
        raise ValueError(f"{url} streams no chunks of an answer")
    return event


def _first_model(listed: bytes, url: str) -> str:
    try:
        return json.loads(listed)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} lists no models, so it is no OpenAI-compatible server; give another --url") from error


def _words(text: str) -> str:
    """The message of an error body; else the body."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text[:500]


def server_url(url: str, flag: str = "--url") -> str:
    """The address without a final / or /v1, before which our clients put the paths of routes. Raises ConfigError."""
    address = url.strip()
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address or re.search(r"\s", address):
        raise ConfigError(f"{flag} {url}: give an address such as http://127.0.0.1:8000")
    return address.rstrip("/").removesuffix("/v1").rstrip("/")
