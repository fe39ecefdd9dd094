"""Start, latency and throughput of `fuseline serve` with an 8B Llama of random weights, by `fuseline bench serve`.

python serve.py TABLE.md MARKS      MARKS: folder of what is not done (failures.py)
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import fuseline
from gpu_check.llama import LLAMA_8B
from gpu_check.table import Table, run_part

START = "serve, start to healthy"
FUSELINE = (sys.executable, "-P", "-m", "fuseline.api")
SHOWN_LINES = 15
"""Lines of a failed program's output that are shown."""


@dataclass(frozen=True)
class Load:
    """Requests of `tokens_in` and `tokens_out` tokens, so many of them at once."""

    at_once: tuple[int, ...] = (1, 16, 64, 256)
    tokens_in: int = 128
    tokens_out: int = 128
    rounds: int = 2
    """Requests of a run over those at once."""
    least: int = 6
    """Fewest requests of a run."""
    start_seconds: float = 110.0


def main(table: Path, marks: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder) / "model", LLAMA_8B)
        failed = measure_serve(model, ("--device", "cuda"), Load(), Table.resumed(table), marks)
    return 1 if failed else 0


def checkpoint(folder: Path, shape: dict) -> Path:
    """A model without weights, with the demo's tokenizer; ids beyond it are words, so that every token is text."""
    shutil.copytree(Path(fuseline.__file__).parent / "demo", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(shape))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    known = {*vocab.values(), *(token["id"] for token in added)}
    vocab.update({f"w{number}": number for number in range(shape["vocab_size"]) if number not in known})
    path.write_text(json.dumps(tokenizer))
    return folder


def measure_serve(model: Path, flags: Sequence[str], load: Load, table: Table, marks: Path) -> list[str]:
    """Adds a row for the start and rows for each number of requests at once. Returns what failed."""
    urls, failed = [], []
    with ExitStack() as stack:

        def start() -> None:
            begun = time.perf_counter()
            urls.append(stack.enter_context(served(model, ("--load-format", "dummy", *flags), load.start_seconds)))
            table.add(START, f"{time.perf_counter() - begun:.1f} s")

        if not run_part(START, start, table, marks):
            return [START]
        for count in load.at_once:
            name = f"serve, {count} at once, {load.tokens_in} in, {load.tokens_out} out"
            if not run_part(name, lambda: add_rows(table, name, run_bench(urls[0], load, count)), table, marks):  # noqa: B023
                failed.append(name)
    return failed


def add_rows(table: Table, name: str, found: dict[str, float]) -> None:
    table.add(f"{name}: throughput", f"{found['output_throughput']:.0f} token/s")
    for metric, words in (("ttft", "first token"), ("itl", "between tokens")):
        median, tail = (found[f"p{percent}_{metric}_ms"] for percent in (50, 99))
        table.add(f"{name}: {words}", f"{median:.1f} ms", f"p99 {tail:.1f} ms")


@contextmanager
def served(model: Path, flags: Sequence[str], seconds: float) -> Iterator[str]:
    """The address of a server, healthy. Raises RuntimeError with its last words if it is not within `seconds`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = model.with_name("serve.log")
    with log.open("w") as out:
        server = subprocess.Popen(
            [*FUSELINE, "serve", str(model), "--port", str(port), *flags], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + seconds
        while not is_healthy(url):
            if server.poll() is not None or time.monotonic() > deadline:
                state = "not healthy in time" if server.poll() is None else f"ended with status {server.returncode}"
                raise RuntimeError(f"{state}: {last_lines(log.read_text())}")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def run_bench(url: str, load: Load, count: int) -> dict[str, float]:
    """The results of `fuseline bench serve`. Raises RuntimeError if it or one of its requests fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [*FUSELINE, "bench", "serve", "--base-url", url, "--num-prompts", str(max(load.least, load.rounds * count)),
             "--max-concurrency", str(count), "--num-warmups", str(count), "--random-input-len", str(load.tokens_in),
             "--random-output-len", str(load.tokens_out), "--ignore-eos", "--disable-tqdm",
             "--save-result", str(result)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"bench serve ended with status {done.returncode}: {last_lines(done.stdout)}")
        return json.loads(result.read_text())


def last_lines(text: str) -> str:
    """Shows the end of a program's output; returns its last line."""
    lines = text.strip().splitlines()[-SHOWN_LINES:]
    print("\n".join(f"    {line}" for line in lines), flush=True)
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
