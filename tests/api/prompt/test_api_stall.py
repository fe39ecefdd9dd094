"""No request of any size keeps a server from answering others: /health and a stream go on beside each of them.

Tens of seconds without these bounds. The bound here leaves room for a machine that does other things too;
benchmarks/stalls.py measures closely.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from prompt_cases import SPINNING, turned_on
from serve_cases import server

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "stalls.py"
MOST_SECONDS = 0.5
KINDS = {
    "chat of 54 MB": "413", "chat of 8 MB": "400", "100,000 messages": "400", "1,024 prompts of 8 kB": "400",
    "1,024 prompts of 4 words": "200", "one word of 8 MB": "400", "4M token ids": "400", "nesting of 5 MB": "400",
    "logit_bias of 500k": "400", "1M bad_words": "400", "100,000 tools": "200", "an image of 20 MB": "400",
    "100,000 unknown fields": "200", "detokenize 2M ids": "200", "log-probabilities of a prompt": "200",
    "32 prompts and their log-probabilities": "200",
}  # fmt: skip
"""Large request -> status of its answer."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(SPINNING)
    flags = ("-O1", "--chat-template", str(template), "--prompt-timeout", "8", "--disable-log-requests")
    with server(folder, *flags) as (base_url, _):
        yield base_url


@pytest.fixture(scope="module")
def stalls() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # stays: the probing process imports it too
    import stalls

    return stalls


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_others_are_answered_beside_a_large_request(url: str, stalls: ModuleType, kind: str) -> None:
    check(stalls.measure(url, kind), KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["spin", "much", "wide"])
def test_others_are_answered_beside_a_template_without_end(url: str, stalls: ModuleType, fault: str) -> None:
    path, raw = "/v1/chat/completions", turned_on(fault)
    check(stalls.measure_body(url, fault, path, raw), "400")
    assert httpx.post(url + path, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).is_success


def check(found: Any, status: str) -> None:
    assert found.status.startswith(status), found
    assert max(found.health, found.stream) - found.machine < MOST_SECONDS, found
