"""One server for the clients' tests: the bundled model, with tools, reasoning, a key and small bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serve_cases import server

FLAGS = [
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--api-key", "key",
    "-O1", "--max-num-seqs", "8", "--max-num-queued-reqs", "8", "--max-request-bytes", "200000",
    "--enable-request-id-headers",
]  # fmt: skip


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("clients"), *FLAGS) as (url, _):
        yield url
