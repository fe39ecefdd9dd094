"""The longest time for which one large request delays the server's answers to others.

    python -P benchmarks/stalls.py [--base-url http://127.0.0.1:8000] [--kinds "chat;1M ids"] [--tries 3] [--json FILE]

While each large request runs, a separate process requests /health every 10 ms, reads the tokens of a stream, and sends
one small streaming request after the other. The report has the slowest /health answer, the slowest first token of the
small requests, the longest gap between tokens, the longest time the probing process itself was not scheduled (to
subtract), and the result of the large request. The kinds are requests of sizes and shapes that could stall a server:
large messages, many messages, many prompts, token ids, nesting, logit_bias, stop strings, tools, grammars, unknown
fields, images, large answers, and many requests at once. Those that hang (a template that does not end) need a server
with `--chat-template benchmarks/spin.jinja`. The kind "nothing" is the machine's own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import multiprocessing.synchronize
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

MB = 2**20
WORDS = "The quick brown fox jumps over the lazy dog and keeps running. "
CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"


def text(num_bytes: int) -> str:
    return (WORDS * (num_bytes // len(WORDS) + 1))[:num_bytes]


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def chat(content: object, **fields: object) -> tuple[str, dict]:
    return CHAT, {"messages": [user(content)], "max_tokens": 1, **fields}


def prompt(value: object, **fields: object) -> tuple[str, dict]:
    return COMPLETIONS, {"prompt": value, "max_tokens": 1, **fields}


def nested(depth: int) -> bytes:
    return b'{"prompt": "x", "deep": ' + b"[" * depth + b"]" * depth + b"}"


def structured(**rule: object) -> tuple[str, dict]:
    return chat("Hi", max_tokens=8, structured_outputs=rule)


def any_of(depth: int) -> dict:
    """2^depth kinds of objects within objects."""
    inner = any_of(depth - 1) if depth else {"type": "string"}
    return {"anyOf": [{"type": "object", "properties": {name: inner}, "required": [name]} for name in ("a", "b")]}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
KINDS: dict[str, Callable[[], tuple[str, dict | bytes]]] = {
    "chat of 54 MB": lambda: chat(text(54 * MB)),
    "chat of 8 MB": lambda: chat(text(8 * MB)),
    "chat of 200 kB": lambda: chat(text(200_000)),
    "100,000 messages": lambda: (CHAT, {"messages": [user("Hello there!")] * 100_000, "max_tokens": 1}),
    "1,024 prompts of 8 kB": lambda: prompt([text(8192)] * 1024),
    "1,024 prompts of 4 words": lambda: prompt(["The quick brown fox"] * 1024),
    "one prompt of 8 MB": lambda: prompt(text(8 * MB)),
    "one word of 8 MB": lambda: prompt("a" * (8 * MB)),
    "8 MB cut to 16 tokens": lambda: prompt(text(8 * MB), truncate_prompt_tokens=16),
    "4M token ids": lambda: prompt([100] * 4_000_000),
    "1,024 prompts of 4k ids": lambda: prompt([[100] * 4096] * 1024),
    "1M prompts": lambda: prompt([[5]] * 1_000_000),
    "1M ids and a text": lambda: prompt([*[100] * 1_000_000, "a"]),
    "nesting of 5 MB": lambda: (COMPLETIONS, nested(5 * MB)),
    "logit_bias of 500k": lambda: prompt("Hi", logit_bias={str(k): 1.0 for k in range(500_000)}),
    "1M stop strings": lambda: prompt("Hi", stop=["abc"] * 1_000_000),
    "1M stop_token_ids": lambda: prompt("Hi", stop_token_ids=[7] * 1_000_000),
    "1M bad_words": lambda: prompt("Hi", bad_words=["abc def"] * 1_000_000),
    "1M bad values": lambda: prompt("Hi", allowed_token_ids=["x"] * 1_000_000),
    "100,000 tools": lambda: chat("Hi", tools=[TOOL] * 100_000, tool_choice="none"),
    "an unknown field of 16 MB": lambda: chat("Hi", metadata={"a": [text(1000)] * 16_000}),
    "100,000 unknown fields": lambda: chat("Hi", **{f"field{k}": k for k in range(100_000)}),
    "an image of 20 MB": lambda: chat([{"type": "image_url", "image_url": {"url": "data:;base64," + "A" * (20 * MB)}}]),
    "200,000 parts of content": lambda: chat([{"type": "text", "text": "a b"}] * 200_000),
    "tokenize 8 MB": lambda: (TOKENIZE, {"prompt": text(8 * MB), "return_token_strs": True}),
    "tokenize a chat of 8 MB": lambda: (TOKENIZE, {"messages": [user(text(8 * MB))]}),
    "detokenize 2M ids": lambda: ("/detokenize", {"tokens": [100] * 2_000_000}),
    "log-probabilities of a prompt": lambda: prompt([100] * 1900, prompt_logprobs=20, echo=True, logprobs=20),
    "128 choices with log-probabilities": lambda: prompt("Hi", n=128, logprobs=20, max_tokens=64, ignore_eos=True),
    "regex of 100 kB": lambda: structured(regex="|".join(f"word{k:05d}" for k in range(10_000))),
    "enum of 20,000": lambda: structured(json={"enum": [f"word {k}" for k in range(20_000)]}),
    "anyOf, nested": lambda: structured(json=any_of(8)),
    "32 prompts and their log-probabilities": lambda: prompt([[100] * 1500] * 32, prompt_logprobs=20),
}
"""Name -> path and body (bytes are sent unchanged) of a large request."""


BURSTS: dict[str, tuple[int, Callable[[int], tuple[str, dict]]]] = {
    "24 requests of 2,000 ids": (24, lambda k: prompt([(7 * k + j) % 4000 + 5 for j in range(2000)])),
    "64 requests of 5 kB": (64, lambda k: prompt(text(5000 + k))),
    "64 short chats": (64, lambda k: chat(f"Hi {k}")),
    "48 chats that hang": (48, lambda k: chat("Hi", chat_template_kwargs={"spin": True})),
    "60 chats that hang": (60, lambda k: chat("Hi", chat_template_kwargs={"spin": True})),
    "16 long echoes with log-probabilities": (
        16, lambda k: prompt([(7 * k + j) % 4000 + 5 for j in range(1500)], echo=True, logprobs=5, stream=True),
    ),
}  # fmt: skip
"""Name -> number of requests at once, and path and body of the k-th."""


NOTHING = "nothing"
"""No large request: what the probes and the machine themselves take."""


@dataclass
class Stall:
    kind: str
    status: str
    seconds: float
    """Duration of the large request."""
    health: float
    """Slowest answer of /health, seconds."""
    first: float
    """Slowest first token of a small streaming request, seconds."""
    stream: float
    """Longest gap between tokens, seconds."""
    machine: float
    """Longest time for which the probing process was not scheduled, seconds."""


def measure(base_url: str, kind: str) -> Stall:
    """Runs the requests of `kind` beside the probes of /health and of a stream."""
    path, bodies = requests(kind)
    spawn = multiprocessing.get_context("spawn")
    found, stop = spawn.Queue(), spawn.Event()
    started = spawn.Event()
    prober = spawn.Process(target=_probe, args=(base_url, stop, started, found), daemon=True)
    prober.start()
    try:
        if not started.wait(60):
            raise TimeoutError(f"{base_url} does not answer")
        time.sleep(0.5)
        begin = time.perf_counter()
        status = ", ".join(sorted(set(send_all(base_url, path, bodies)))) if bodies else ""
        time.sleep(0 if bodies else 2)
        seconds = time.perf_counter() - begin
        time.sleep(0.3)
    finally:
        stop.set()
    health, first, stream, machine = found.get(timeout=120)
    prober.join(10)
    return Stall(kind, status, seconds, health, first, stream, machine)


def requests(kind: str) -> tuple[str, list[bytes]]:
    """Path and bodies of the large request of `kind`, or of its burst; none of NOTHING."""
    if kind == NOTHING:
        return "", []
    count, make = BURSTS.get(kind) or (1, lambda _: KINDS[kind]())
    made = [make(k) for k in range(count)]
    return made[0][0], [body if isinstance(body, bytes) else json.dumps(body).encode() for _, body in made]


def send_all(base_url: str, path: str, bodies: list[bytes]) -> list[str]:
    """Sends all at once; returns what `send` does of each."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda data: send(base_url, path, data), bodies))


def send(base_url: str, path: str, data: bytes, timeout: float = 180) -> str:
    """Returns the status and the beginning of an error message, or the connection error."""
    connection = _connect(base_url, timeout)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
    except OSError as error:  # refused during sending; an answer may have arrived
        failure = type(error).__name__
    else:
        failure = ""
    try:
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        return failure or type(error).__name__
    finally:
        connection.close()
    return str(response.status) + ("" if response.status == 200 else f" {_message(answer)}")


def _message(answer: bytes) -> str:
    try:
        return json.loads(answer)["error"]["message"][:80]
    except (ValueError, KeyError, TypeError):
        return answer[:80].decode(errors="replace")


def _connect(base_url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(base_url)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def _probe(base_url: str, stop: multiprocessing.synchronize.Event, started: object, found: object) -> None:
    """Entry of the probing process; sends the last four figures of a Stall once told to stop."""
    gaps: list[float] = []
    firsts: list[float] = []
    late: list[float] = []
    Thread(target=_watch_clock, args=(stop, late), daemon=True).start()
    streams = [
        Thread(target=_follow_streams, args=(base_url, stop, num_tokens, firsts, gaps), daemon=True)
        for num_tokens, firsts in ((1500, []), (16, firsts))
    ]
    for stream in streams:
        stream.start()
    delays = _ask_health(base_url, stop, started)
    for stream in streams:
        stream.join(60)
    # The first of all may have met a start.
    found.put((max(delays), max(firsts[1:], default=0.0), max(gaps, default=0.0), max(late, default=0.0)))


def _watch_clock(stop: multiprocessing.synchronize.Event, late: list[float]) -> None:
    while not stop.is_set():
        begin = time.perf_counter()
        time.sleep(0.01)
        late.append(time.perf_counter() - begin - 0.01)


def _ask_health(base_url: str, stop: multiprocessing.synchronize.Event, started: object) -> list[float]:
    connection = _connect(base_url, 180)
    delays = []
    while not stop.is_set():
        begin = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        delays.append(time.perf_counter() - begin)
        started.set()
        time.sleep(max(0.0, 0.01 - delays[-1]))
    return delays


def _follow_streams(
    base_url: str, stop: multiprocessing.synchronize.Event, num_tokens: int, firsts: list[float], gaps: list[float]
) -> None:
    """Records times to the first token of consecutive streams, and the gaps between tokens."""
    body = json.dumps({"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    while not stop.is_set():
        begin = time.perf_counter()
        connection = _connect(base_url, 180)
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        last = None
        while not stop.is_set() and (line := response.readline()):
            now = time.perf_counter()
            if line.startswith(b"data: {"):
                gaps.append(now - last if last else 0.0)
                firsts += [] if last else [now - begin]
                last = now
        connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--kinds", default="", help="names that begin so, separated by semicolons; default all")
    parser.add_argument("--tries", type=int, default=1, help="measurements of each kind")
    parser.add_argument("--json", default="", help="file for the figures")
    options = parser.parse_args()
    wanted = tuple(options.kinds.split(";"))
    rows = []
    columns = ("/health", "first token", "stream", "machine")
    print(f"{'request':40}{''.join(f'{name:>12}' for name in columns)}, ms{'took, s':>9}{'load':>6}  answer")
    kinds = [kind for kind in [NOTHING, *KINDS, *BURSTS] if kind.startswith(wanted)]
    for kind in (kind for kind in kinds for _ in range(options.tries)):
        row = measure(options.base_url, kind)
        rows.append(row)
        times = "".join(f"{seconds * 1e3:12.0f}" for seconds in (row.health, row.first, row.stream, row.machine))
        print(f"{kind:40}{times}    {row.seconds:9.1f}{os.getloadavg()[0]:6.1f}  {row.status}", flush=True)
    quiet = statistics.median(row.health for row in rows)
    print(f"median of the slowest answers of /health: {quiet * 1e3:.0f} ms")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
