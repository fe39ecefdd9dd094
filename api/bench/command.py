"""`fuseline bench serve`: flags, the run, the report."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fuseline.api.bench.client import Target, first_model, learn_vocabulary, open_session
from fuseline.api.bench.files import save_json
from fuseline.api.bench.kernels import run_kernels
from fuseline.api.bench.load import run_load, warm_up
from fuseline.api.bench.measure import Outcome, report, summarize
from fuseline.api.bench.offline import run_offline
from fuseline.api.bench.plot import require_matplotlib, save_plot
from fuseline.api.bench.startup import run_startup
from fuseline.api.bench.workload import MAX_PROMPTS, MAX_TOKENS, WorkloadConfig, arrival_times, make_samples
from fuseline.api.config import ConfigError, read_environment
from fuseline.api.remote import server_url

BENCHES = {
    "serve": "load an OpenAI-compatible server and report latencies and throughput",
    "offline": "speed of an engine in this process: prompts, one stream, many streams",
    "startup": "time from exec to the first streamed token, phase by phase, cold and warm",
    "kernels": "time of each native kernel at the sizes of real models, as a share of what the machine can do",
}
OTHERS = {"offline": run_offline, "startup": run_startup, "kernels": run_kernels}
"""Those that parse their own flags."""


def run_bench(arguments: Sequence[str]) -> int:
    """`fuseline bench` lists the benches; `fuseline bench serve ...` runs. 1 when a request failed."""
    if not arguments:
        print("\n".join(f"fuseline bench {name:<8}{text}" for name, text in BENCHES.items()))
        return 0
    if arguments[0] in OTHERS:
        return OTHERS[arguments[0]](arguments[1:])
    options = _parser().parse_args(arguments)
    _check(options)
    return _run(bench_serve(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuseline bench", allow_abbrev=False)
    benches = parser.add_subparsers(dest="bench", required=True)
    for name in OTHERS:
        benches.add_parser(name, help=BENCHES[name])
    serve = benches.add_parser("serve", help=BENCHES["serve"], description=BENCHES["serve"], allow_abbrev=False)
    target = serve.add_argument_group("server")
    words = "address of the server, with or without /v1"
    target.add_argument("--base-url", default="http://127.0.0.1:8000", help=words)
    target.add_argument("--endpoint", default="/v1/completions", help="/v1/completions or /v1/chat/completions")
    target.add_argument("--model", default="", help="name to ask for; default: the first the server lists")
    target.add_argument("--api-key", default="", help="default: $FUSELINE_API_KEY")
    target.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    work = serve.add_argument_group("workload")
    work.add_argument("--dataset", "--dataset-name", choices=("random", "shared-prefix", "chat"), default="random")
    work.add_argument("--num-prompts", type=int, default=100)
    work.add_argument("--random-input-len", type=int, default=512, help="tokens; for chat the median")
    work.add_argument("--random-output-len", type=int, default=128, help="tokens; for chat the median")
    work.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this fraction, 0 to 1")
    work.add_argument("--prefix-len", type=int, default=256, help="tokens all prompts of shared-prefix begin with")
    work.add_argument("--ignore-eos", action="store_true", help="always generate the full length")
    work.add_argument("--temperature", type=float, default=0.0)
    work.add_argument("--extra-body", default="", metavar="JSON", help='further fields of requests: {"logprobs": 5}')
    work.add_argument("--seed", type=int, default=0)
    load = serve.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, help="requests per second; default: all at once")
    load.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson arrivals; smaller: burstier")
    load.add_argument("--max-concurrency", type=int, default=0, help="requests in flight; 0: no bound")
    load.add_argument("--num-warmups", type=int, default=1, help="requests sent before, not counted")
    out = serve.add_argument_group("result")
    out.add_argument("--save-result", default="", metavar="FILE", help="write the result as JSON")
    out.add_argument("--plot", default="", metavar="FILE", help="write the latency distributions as PNG")
    out.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    return parser


def _check(options: argparse.Namespace) -> None:
    rules = {
        f"--num-prompts must be 1 to {MAX_PROMPTS}": 1 <= options.num_prompts <= MAX_PROMPTS,
        f"--random-input-len must be 1 to {MAX_TOKENS}": 1 <= options.random_input_len <= MAX_TOKENS,
        f"--random-output-len must be 1 to {MAX_TOKENS}": 1 <= options.random_output_len <= MAX_TOKENS,
        f"--prefix-len must be 0 to {MAX_TOKENS}": 0 <= options.prefix_len <= MAX_TOKENS,
        "--random-range-ratio must be 0 to 1": 0 <= options.random_range_ratio <= 1,
        "--request-rate must be above 0": options.request_rate > 0,
        "--burstiness must be above 0": 0 < options.burstiness < math.inf,
        "--max-concurrency must be 0 or more": options.max_concurrency >= 0,
        "--num-warmups must be 0 or more": options.num_warmups >= 0,
        "--timeout must be above 0": options.timeout > 0,
        "--base-url must begin with http:// or https://": options.base_url.startswith(("http://", "https://")),
        "--endpoint must begin with /": options.endpoint.startswith("/"),
    }
    for name in ("save_result", "plot"):
        folder = Path(getattr(options, name)).parent
        rules[f"--{name.replace('_', '-')}: there is no directory {folder}"] = folder.is_dir()
    _extra_body(options.extra_body)
    for message, is_met in rules.items():
        if not is_met:
            raise ConfigError(message)
    if options.plot:
        require_matplotlib()


def _extra_body(text: str) -> dict[str, object]:
    """The object that --extra-body gives. Raises ConfigError for anything else."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body must be a JSON object, not {type(value).__name__}")
    return value


def _run(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def bench_serve(options: argparse.Namespace) -> int:
    """One run: warm-up, load, report, files."""
    api_key = options.api_key or read_environment().api_key
    base_url = server_url(options.base_url, "--base-url")
    async with open_session(api_key, options.timeout) as session:
        model = options.model or await first_model(session, base_url)
        extra_body = _extra_body(options.extra_body)
        target = Target(base_url, options.endpoint, model, options.temperature, options.ignore_eos, extra_body)
        workload = WorkloadConfig(
            options.dataset, options.num_prompts + options.num_warmups, options.random_input_len,
            options.random_output_len, options.prefix_len, options.random_range_ratio, options.seed,
        )  # fmt: skip
        vocabulary = await learn_vocabulary(session, base_url, model, options.seed)
        made = make_samples(workload, vocabulary, wants_ids=not target.is_chat)
        samples, warmups = made[: options.num_prompts], made[options.num_prompts :]
        if error := await warm_up(session, target, warmups):
            raise ConfigError(f"the warm-up request failed: {error}")
        times = arrival_times(len(samples), options.request_rate, options.burstiness, options.seed)
        with tqdm(total=len(samples), desc="requests", disable=options.disable_tqdm) as bar:
            outcomes, duration = await run_load(
                session, target, samples, times, options.max_concurrency, lambda outcome: bar.update()
            )
    return _finish(options, model, outcomes, duration)


def _finish(options: argparse.Namespace, model: str, outcomes: list[Outcome], duration: float) -> int:
    result = summarize(outcomes, duration)
    print(report(result))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        print(f"first error: {errors[0]}")
    if options.save_result:
        save_json(options.save_result, result | _details(options, model, outcomes))
    if options.plot:
        save_plot(options.plot, outcomes, f"{model}: {result['output_throughput']:.1f} output token/s")
    return 1 if errors else 0


def _details(options: argparse.Namespace, model: str, outcomes: list[Outcome]) -> dict[str, object]:
    """The run's settings and the single values, under the names `vllm bench serve` uses."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint": options.endpoint,
        "model_id": model,
        "dataset": options.dataset,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency or None,
        "seed": options.seed,
        "extra_body": _extra_body(options.extra_body),
        "input_lens": [outcome.input_len for outcome in outcomes],
        "output_lens": [outcome.output_len for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itls for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }
