"""No request of any size, and no crowd of them, keeps the event loop from others: no round of it takes long.

What counts is the processor time of a round (a real server measures it), so other programs cannot fail these tests; a
mechanism that breaks takes seconds. benchmarks/stalls.py measures what a client sees of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import measured_server
import pytest
from prompt_cases import SPINNING, turned_on
from serve_cases import server

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "stalls.py"
MOST_SECONDS = 0.05
TRIES = 3
"""A round that is longer than that once may have met a slow moment of the machine; a broken mechanism shows always."""
KINDS = {
    "chat of 54 MB": "413", "chat of 8 MB": "400", "100,000 messages": "400", "1,024 prompts of 8 kB": "400",
    "1,024 prompts of 4 words": "200", "one word of 8 MB": "400", "4M token ids": "400", "nesting of 5 MB": "400",
    "logit_bias of 500k": "400", "1M bad_words": "400", "100,000 tools": "200", "an image of 20 MB": "400",
    "100,000 unknown fields": "200", "detokenize 2M ids": "200", "log-probabilities of a prompt": "200",
    "32 prompts and their log-probabilities": "200", "24 requests of 2,000 ids": "200", "64 requests of 5 kB": "200",
    "64 short chats": "200", "48 chats that hang": "", "16 long echoes with log-probabilities": "200",
}  # fmt: skip
"""Large request or burst -> status of its answers; empty: several."""
OUT_OF_TIME = "400 reading, rendering and encoding"
"""Begins the answer to any large request on a machine that is busy enough."""
Longest = Callable[[], float]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds") / "seconds"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, rounds: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(SPINNING)
    command = (sys.executable, "-P", measured_server.__file__, str(rounds))
    flags = ("-O1", "--chat-template", str(template), "--prompt-timeout", "8", "--disable-log-requests")
    with server(folder, *flags, command=command) as (base_url, _):
        yield base_url


@pytest.fixture
def longest(url: str, rounds: Path) -> Longest:
    """Seconds of the longest round since the last call."""
    seen = rounds.stat().st_size if rounds.exists() else 0

    def read() -> float:
        nonlocal seen
        text = rounds.read_text()[seen:] if rounds.exists() else ""
        seen += len(text)
        return max(map(float, text.split()), default=0.0)

    return read


@pytest.fixture(scope="module")
def stalls() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    import stalls

    yield stalls
    sys.path.remove(str(SCRIPT.parent))


def check(stalls: ModuleType, longest: Longest, url: str, path: str, bodies: list[bytes], status: str) -> None:
    seconds = []
    while len(seconds) < TRIES and (not seconds or seconds[-1] >= MOST_SECONDS):
        answers = stalls.send_all(url, path, bodies)
        assert all(answer.startswith((status, OUT_OF_TIME)) for answer in answers), set(answers)
        seconds.append(longest())
    assert seconds[-1] < MOST_SECONDS, seconds
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).is_success


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_round_of_the_event_loop_takes_long(url: str, longest: Longest, stalls: ModuleType, kind: str) -> None:
    check(stalls, longest, url, *stalls.requests(kind), KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["spin", "much", "wide"])
def test_no_round_takes_long_beside_a_template_without_end(
    url: str, longest: Longest, stalls: ModuleType, fault: str
) -> None:
    check(stalls, longest, url, "/v1/chat/completions", [turned_on(fault)], "400")


@pytest.mark.slow
def test_a_long_round_is_measured(url: str, longest: Longest, rounds: Path) -> None:
    """The start has long ones: the test's own eyes are open."""
    assert max(map(float, rounds.read_text().split())) > measured_server.LEAST_SECONDS
