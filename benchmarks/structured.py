"""Structured output: throughput beside free text, first compile time, and validity on the demo model at temperature 1.

    python benchmarks/structured.py [--schemas 320] [--seeds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from fuseline.api.llm import LLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from schema_cases import schemas  # noqa: E402

STREAMS = 16
NUM_TOKENS = 200
ROUNDS = 9
CHAT = "/v1/chat/completions"
WIDE = {
    "type": "object",
    "properties": {f"property_{index}": {"type": ("string", "integer", "boolean")[index % 3]} for index in range(200)},
    "required": [f"property_{index}" for index in range(0, 200, 2)],
}
LINES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
        "required": ["name", "age", "city"],
    },
    "minItems": 50,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    llm = LLM("demo", show_progress=False, disable_frontend_multiprocessing=False)  # the engine as servers have it
    try:
        ask(llm, [{"guided_choice": ["a"], "max_tokens": 5}])  # starts the process that compiles
        print("first compile of 200 properties: %.0f ms with its first token" % (1000 * seconds(llm, [wide()])))
        print("from the cache:                  %.0f ms" % (1000 * seconds(llm, [wide()])))
        throughput(llm)
        validity(llm, options.schemas, options.seeds)
    finally:
        llm.close()


def throughput(llm: LLM) -> None:
    """Tokens a second on 16 streams, free and under a schema, in turns."""
    free = [{"ignore_eos": True, "seed": seed} for seed in range(STREAMS)]
    held = [{"guided_json": LINES, "seed": seed} for seed in range(STREAMS)]
    rates: dict[str, list[float]] = {"free": [], "schema": []}
    ask(llm, held)
    for _ in range(ROUNDS):
        for name, requests in (("free", free), ("schema", held)):
            begin = time.perf_counter()
            answers = ask(llm, requests)
            tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
            rates[name].append(tokens / (time.perf_counter() - begin))
    free_rate, held_rate = (statistics.median(rates[name]) for name in ("free", "schema"))
    factor = held_rate / free_rate
    print(f"{STREAMS} streams: {free_rate:.0f} tokens/s free, {held_rate:.0f} under a schema: x {factor:.2f}")


def validity(llm: LLM, count: int, seeds: int) -> None:
    num_stopped = num_cut = 0
    faults = []
    for schema in schemas(count):
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for answer in ask(llm, [{"guided_json": schema, "seed": seed, "temperature": 1} for seed in range(seeds)]):
            choice = answer["choices"][0]
            if choice["finish_reason"] != "stop":
                num_cut += 1
                continue
            num_stopped += 1
            if not validator.is_valid(json.loads(choice["message"]["content"])):
                faults.append((schema, choice["message"]["content"]))
    num_valid = num_stopped - len(faults)
    print(f"{count} schemas, {seeds} seeds: {num_stopped} ended, {num_valid} valid, {num_cut} cut by length")
    for schema, text in faults:
        print("  not valid:", json.dumps(schema), text)


def wide() -> dict[str, Any]:
    return {"guided_json": WIDE, "max_tokens": 1}


def seconds(llm: LLM, requests: list[dict[str, Any]]) -> float:
    begin = time.perf_counter()
    ask(llm, requests)
    return time.perf_counter() - begin


def ask(llm: LLM, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import httpx

    async def one(client: httpx.AsyncClient, fields: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Tell me about five people as JSON"}]
        body = {"model": "demo", "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 1, **fields}
        response = await client.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def run() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(llm._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=600) as client:
            return await asyncio.gather(*(one(client, fields) for fields in requests))

    return llm._call(run())


if __name__ == "__main__":
    main()
