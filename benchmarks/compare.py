"""fuseline and installed peers on one checkpoint, alternately: each round starts every server once, runs the loads
against it with one client (`fuseline bench serve`), and stops it. Prints medians over the rounds, and ratios.

    python benchmarks/compare.py --model DIR --gguf FILE --llama-bin DIR --vllm PATH --loads 1,16,prefix --rounds 3

Peers that are not given are not run. `--offline` compares with `llama-bench` instead (prompt processing and one stream,
no HTTP), also that of ik_llama.cpp, and measures the read bandwidth and the fp32 matrix rate in the same run. `--model`
may be the GGUF file itself: then all read equal bits. Each `--variant` runs fuseline once more with other flags:

    python benchmarks/compare.py --offline --model Q8_0.gguf --gguf Q8_0.gguf --llama-bin DIR --ik-bin DIR \
        --threads 2 --variant="--activation-dtype int8"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from machine import limits_of

BIN = Path(sys.executable).parent
START_SECONDS = 600
CONTEXT = 4096
BUSY = "1 stream, one core busy"
IDLE_SECONDS = 10.0
OURS = "fuseline"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
EXTRAS = {
    "logprobs": ("/v1/completions", {"logprobs": 5}),
    "chat": ("/v1/chat/completions", {}),
    "tools": ("/v1/chat/completions", {"tools": [WEATHER], "tool_choice": "auto"}),
}
"""Loads of 16 streams with further fields: endpoint and fields. `chat` is what `tools` is compared with."""
Row = dict[tuple[str, str], list[float]]
"""(load, figure) -> one value per round."""


@dataclass(frozen=True)
class Server:
    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """A load by its flags of `fuseline bench serve`."""

    name: str
    flags: Sequence[str]


def make_load(name: str) -> Load:
    """A number of streams with 128 tokens in and 128 out. `busy`: one stream while another process spins on one core.
    `prefix`: 16 streams that share a prefix of 1,500 tokens. Names of EXTRAS: 16 streams with its fields."""
    common = ("--ignore-eos", "--disable-tqdm", "--timeout", "900")
    if name == "prefix":
        flags = ("--dataset", "shared-prefix", "--prefix-len", "1500", "--random-input-len", "32")
        flags += ("--num-warmups", "0", "--num-prompts", "16", "--random-output-len", "16", "--max-concurrency", "16")
        return Load("shared prefix", (*flags, *common))
    if name in EXTRAS:
        endpoint, fields = EXTRAS[name]
        # Prompts of their own: those of another load would be found in the prefix cache.
        seed = str(1 + list(EXTRAS).index(name))
        extra = ("--endpoint", endpoint, "--extra-body", json.dumps(fields), "--seed", seed)
        return Load(f"16 streams, {name}", (*make_load("16").flags, *extra))
    streams, output_len = ("1", "32") if name == "busy" else (name, "128")
    lengths = ("--random-input-len", "128", "--random-output-len", output_len)
    counts = ("--num-prompts", str(max(3, int(streams))), "--max-concurrency", streams)
    return Load(BUSY if name == "busy" else f"{name} streams", (*lengths, *counts, *common))


def servers(options: argparse.Namespace, port: int) -> list[Server]:
    streams = str(max(16, *(int(load) for load in options.loads.split(",") if load.isdigit())))
    found = [
        Server(
            OURS,
            [str(BIN / "fuseline"), "serve", options.model, "--port", str(port), "--max-model-len", str(CONTEXT),
             "--max-num-seqs", streams, *options.flags.split()],
        )
    ]  # fmt: skip
    if options.llama_bin:
        command = [f"{options.llama_bin}/llama-server", "-m", options.gguf, "--port", str(port), "--host", "127.0.0.1"]
        threads = str(len(os.sched_getaffinity(0)))
        shape = ["-np", streams, "-t", threads, "-c", str(2048 * int(streams)), "--no-webui"]
        found.append(Server("llama.cpp", [*command, *shape]))
    if options.vllm:
        command = [options.vllm, "serve", options.model, "--port", str(port), "--host", "127.0.0.1"]
        shape = ["--max-model-len", str(CONTEXT), "--max-num-seqs", streams, *options.vllm_flags.split()]
        found.append(Server("vLLM", [*command, *shape], {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}))
    return found


@contextmanager
def running(server: Server, port: int) -> Iterator[tuple[psutil.Process, float]]:
    """Runs a server; yields its process and the seconds until it was healthy."""
    log = tempfile.NamedTemporaryFile("w+", prefix=f"{server.name}-", suffix=".log", delete=False)
    start = time.perf_counter()
    process = subprocess.Popen(
        server.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **server.env}, start_new_session=True
    )
    try:
        wait_healthy(process, port, log.name)
        yield psutil.Process(process.pid), time.perf_counter() - start
    finally:
        end(process)
        log.close()


def wait_healthy(process: subprocess.Popen, port: int, log: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args[0]} ended with {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"{process.args[0]} was not healthy in {START_SECONDS} s; see {log}")


def end(process: subprocess.Popen) -> None:
    """Asks the server to stop, then kills everything it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *children] if children else [], timeout=20)
    for left in alive:
        left.kill()
    process.wait()


def resident_bytes(process: psutil.Process) -> float:
    """Proportional set size of the process and its children: shared pages are counted once."""
    return sum(each.memory_full_info().pss for each in [process, *process.children(recursive=True)])


def run_load(load: Load, port: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(BIN / "fuseline"), "bench", "serve", "--base-url", f"http://127.0.0.1:{port}"]
        done = subprocess.run([*command, *load.flags, "--save-result", str(result)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{load.name} failed: {done.stdout[-800:]} {done.stderr[-800:]}")
        return json.loads(result.read_text())


def figures(result: dict[str, float], is_prefix: bool) -> dict[str, float]:
    if is_prefix:
        first, *rest = result["ttfts"]
        return {"TTFT of the first, ms": first * 1000, "TTFT p50 of the others, ms": statistics.median(rest) * 1000}
    return {
        "output token/s": result["output_throughput"],
        "TTFT p50, ms": result["median_ttft_ms"],
        "TPOT mean, ms": result["mean_tpot_ms"],
        "ITL p50, ms": result["median_itl_ms"],
        "ITL p99, ms": result["p99_itl_ms"],
    }


@contextmanager
def busy_core(is_wanted: bool) -> Iterator[None]:
    """Runs a process that spins on the first of our cores."""
    if not is_wanted:
        yield
        return
    core = min(os.sched_getaffinity(0))
    endless = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    spinner = subprocess.Popen([sys.executable, "-c", endless])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def idle_share(process: psutil.Process) -> float:
    """CPU usage of the idle server and its children, in percent of a core."""

    def seconds() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])

    time.sleep(2)
    before = seconds()
    time.sleep(IDLE_SECONDS)
    return 100 * (seconds() - before) / IDLE_SECONDS


def serve_round(server: Server, port: int, loads: Sequence[Load], rows: Row) -> None:
    with running(server, port) as (process, seconds):
        rows["start", "healthy after, s"].append(seconds)
        for load in loads:
            with busy_core(load.name == BUSY):
                result = run_load(load, port)
            for name, value in figures(result, load.name == "shared prefix").items():
                rows[load.name, name].append(value)
        alone, beside = (rows.get((load, "TPOT mean, ms")) for load in ("1 streams", BUSY))
        if alone and beside:
            rows[BUSY, "decode, % of the idle machine's"].append(100 * alone[-1] / beside[-1])
        rows["idle", "CPU, % of a core"].append(idle_share(process))
        rows["memory", "resident, MiB"].append(resident_bytes(process) / 2**20)


def compare_servers(options: argparse.Namespace) -> dict[str, Row]:
    loads = [make_load(name) for name in options.loads.split(",")]
    results: dict[str, Row] = defaultdict(lambda: defaultdict(list))
    for number in range(options.rounds):
        port = free_port()
        for server in servers(options, port):
            print(f"round {number + 1}: {server.name}", file=sys.stderr, flush=True)
            try:
                serve_round(server, port, loads, results[server.name])
            except (SystemExit, subprocess.SubprocessError, OSError) as error:
                if server.name == OURS:
                    raise
                # A peer that fails to start or crashes must not lose the figures of the others.
                print(f"{server.name}: {error}", file=sys.stderr, flush=True)
    return results


def compare_offline(options: argparse.Namespace) -> dict[str, Row]:
    """Figures of `llama-bench` and `fuseline bench offline` from one run, for every number of threads."""
    results: dict[str, Row] = defaultdict(lambda: defaultdict(list))
    cores = len(os.sched_getaffinity(0))
    for number in range(options.rounds):
        for threads in [options.threads] if options.threads else range(1, cores + 1):
            print(f"round {number + 1}: {threads} threads", file=sys.stderr, flush=True)
            machine, limits = results["machine"], limits_of(threads)
            machine[f"{threads} threads", "read GB/s"].append(limits.bandwidth / 1e9)
            machine[f"{threads} threads", "fp32 product GFLOP/s"].append(limits.matrix_rate / 1e9)
            for name, speeds in engines(options):
                for figure, value in speeds(threads).items():
                    results[name][f"{threads} threads", figure].append(value)
    return results


def engines(options: argparse.Namespace) -> list[tuple[str, Callable[[int], dict[str, float]]]]:
    """Functions that measure token/s by a number of threads, by the name of their engine."""
    found = [(OURS, partial(our_speeds, options, options.flags))]
    for flags in options.variant:
        found.append((f"{OURS} {flags}", partial(our_speeds, options, f"{options.flags} {flags}")))
    if options.llama_bin:
        found.append(("llama.cpp", partial(llama_speeds, options, options.llama_bin, ())))
    if options.ik_bin:
        # Its weights are stored again in the layout of its fastest kernels, as ours are.
        found.append(("ik_llama.cpp", partial(llama_speeds, options, options.ik_bin, ("-rtr", "1"))))
    return found


def our_speeds(options: argparse.Namespace, flags: str, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [str(BIN / "fuseline"), "bench", "offline", options.model, "--input-lens", options.input_lens]
        command += ["--output-len", "64", "--cpu-threads", str(threads), "--max-model-len", str(CONTEXT)]
        subprocess.run(
            [*command, *flags.split(), "--save-result", str(path)], check=True, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        speeds = json.loads(path.read_text())["speeds"]
    names = {"prefill": "prefill {}, token/s", "decode": "decode, token/s"}
    return {names[s["name"]].format(s["input_len"]): s["tokens_per_second"] for s in speeds}


def llama_speeds(options: argparse.Namespace, folder: str, flags: Sequence[str], threads: int) -> dict[str, float]:
    command = [f"{folder}/llama-bench", "-m", options.gguf, "-p", options.input_lens, "-n", "64", *flags]
    text = subprocess.run(
        [*command, "-t", str(threads), "-r", "3", "-o", "json"], check=True, capture_output=True, text=True
    ).stdout
    return {
        f"prefill {test['n_prompt']}, token/s" if test["n_prompt"] else "decode, token/s": test["avg_ts"]
        for test in json.loads(re.sub(r"^[^\[]*", "", text))
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def print_table(results: dict[str, Row]) -> None:
    names = [name for name in results if name != "machine"]
    pairs = [(own, peer) for own in names if own.startswith(OURS) for peer in names if not peer.startswith(OURS)]
    print("| load | figure | " + " | ".join([*names, *(f"{own} / {peer}" for own, peer in pairs)]) + " |")
    print("|" + "---|" * (2 + len(names) + len(pairs)))
    for key in results[OURS]:
        found = {name: statistics.median(results[name][key]) for name in names if results[name].get(key)}
        cells = [f"{found[name]:.1f}" if name in found else "-" for name in names]
        cells += [f"{found[own] / found[peer]:.2f}" if found.get(peer) else "-" for own, peer in pairs]
        print(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    for key, values in results.get("machine", {}).items():
        print(f"{key[0]}: {key[1]} {statistics.median(values):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--gguf", default="", help="the same checkpoint for llama.cpp")
    parser.add_argument("--llama-bin", default="", help="folder of llama-server and llama-bench")
    parser.add_argument("--vllm", default="", help="vLLM's command")
    parser.add_argument("--vllm-flags", default="")
    parser.add_argument("--flags", default="", help="more flags of fuseline")
    parser.add_argument("--loads", default="1,16,64,prefix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--ik-bin", default="", help="folder of ik_llama.cpp's llama-bench, of --offline")
    parser.add_argument("--variant", action="append", default=[], help="further flags of fuseline, of --offline")
    parser.add_argument("--threads", type=int, default=0, help="of --offline; 0: 1 to as many as there are cores")
    parser.add_argument("--input-lens", default="256,2048", help="of --offline")
    parser.add_argument("--out", default="", help="all values as JSON")
    options = parser.parse_args()
    results = compare_offline(options) if options.offline else compare_servers(options)
    print_table(results)
    if options.out:
        plain = {name: {" / ".join(key): values for key, values in row.items()} for name, row in results.items()}
        Path(options.out).write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
