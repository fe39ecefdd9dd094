"""Addresses of servers that our own clients talk to."""

from __future__ import annotations


def server_root(url: str) -> str:
    """The address that routes are appended to, also when it is given as OpenAI's clients take it, with /v1."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
