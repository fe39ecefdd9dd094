"""Cost of batch invariance on a CPU: our kernels timed alternately with the fastest ones that lack it.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/sameness.py 135m,0.5b

For every linear of a step it times ours; oneDNN's bf16 linear on weights in its own packed layout, which selects a
kernel by the number of rows; and ours with k split over two threads, that is, a linear with half the k and twice the
outputs (without the final addition). Weights are read from memory, as in a model: several copies are used in rotation.
`cost` is the time of a step's linears over the time if each were computed by the fastest of the three. GLIBC_TUNABLES
gives all of them large pages, which ours have in a model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseline import _C
from fuseline.api.bench.kernels import SHAPES
from fuseline.compile.ops.linear import pack
from fuseline.compile.target import detect_target
from fuseline.compile.tuning.clock import HostClock

LAYERS = {"135m": 30, "0.5b": 24}
ROWS = (1, 4, 16, 64, 256, 1024)
COPIED_BYTES = 128 << 20
PAUSE_SECONDS = 0.05
WAYS = ("ours", "oneDNN", "k in two")


@dataclass(frozen=True)
class Product:
    name: str
    num_in: int
    num_out: int
    count: int
    """Calls per step."""


def products(shape: str) -> Iterator[Product]:
    d, width, heads, kv_heads, head_dim, vocab = SHAPES[shape]
    layers = LAYERS[shape]
    yield Product("q, k, v", d, (heads + 2 * kv_heads) * head_dim, layers)
    yield Product("output", heads * head_dim, d, layers)
    yield Product("gate and up", d, 2 * width, layers)
    yield Product("down", width, d, layers)
    yield Product("logits", d, vocab, 1)


def ways(product: Product, weight: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """Calls by name; each writes rows of [N]."""
    linear, rows, (n, k) = torch.ops.fuseline_cpu.linear, x.shape[0], weight.shape
    out = torch.empty(rows, n, dtype=x.dtype)
    halves, half_x = torch.empty(rows, 2 * n, dtype=x.dtype), x[:, : k // 2].contiguous()
    panels, cut = pack(weight), pack(torch.cat(weight.chunk(2, 1)))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return {
        "ours": lambda: linear(out, x, panels, None, n, 0),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "k in two": lambda: linear(halves, half_x, cut, None, 2 * n, 0),
    }


def seconds(product: Product, rows: int, rounds: int) -> dict[str, float]:
    """Median seconds per call, timed alternately."""
    copies = max(2, min(product.count, COPIED_BYTES // (2 * product.num_in * product.num_out)))
    x = torch.randn(rows, product.num_in, dtype=torch.bfloat16)
    calls = [
        ways(product, torch.randn(product.num_out, product.num_in, dtype=torch.bfloat16), x) for _ in range(copies)
    ]
    clock = HostClock(repeats=1, warm_ups=1)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            # Threads of the previous implementation spin for a while after a call, which would slow the next one.
            time.sleep(PAUSE_SECONDS)
            times[way].append(clock(lambda way=way: [copy[way]() for copy in calls]) / copies)
    return {way: statistics.median(of_way) for way, of_way in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="?", default="135m,0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    threads = detect_target().num_threads
    _C.set_num_threads(threads)
    torch.set_num_threads(threads)
    print(f"{_C.cpu_isa()}, {threads} threads\n\n| shape | rows | product | ours, us | oneDNN | k in two |")
    print("|---|---|---|---|---|---|")
    for shape in options.shapes.split(","):
        for rows in ROWS:
            ours = fastest = 0.0
            for product in products(shape):
                # A prompt step computes the logits of its last token only.
                of_way = seconds(product, 1 if product.name == "logits" and rows > 64 else rows, options.rounds)
                ours += product.count * of_way["ours"]
                fastest += product.count * min(of_way.values())
                others = " | ".join(f"{of_way[way] / of_way['ours']:.2f}" for way in WAYS[1:])
                print(f"| {shape} | {rows} | {product.name} | {1e6 * of_way['ours']:.0f} | {others} |", flush=True)
            print(f"| {shape} | {rows} | **cost, all** | {ours / fastest:.3f} | | |", flush=True)


if __name__ == "__main__":
    main()
