"""Decode layers of our kernels in a chain, by the kernel of their products and what overlaps: what a step of few rows
takes, where the time of a single kernel with cold caches also has its start and end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.backends.cuda.graph_api import GraphApi
from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda.library import CudaLibrary, Overlap
from fuseline.compile.tuning.clock import Clock
from fuseline.compile.tuning.limits import Limits
from gpu_check.kernels import Case, Made, Sizes, measure_cases
from gpu_check.overlap import FEW_ROWS, Chain, Products
from gpu_check.table import Table


def _torch_linear(lib: CudaLibrary, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


KINDS = {"torch": Products(_torch_linear, cuda_linear.linear_then_act_mul), "few rows": FEW_ROWS}


def measure_chains(
    sizes: Sizes, make: Made, lib: CudaLibrary | None, api: GraphApi, table: Table, clock: Clock, limits: Limits,
    num_layers: int = 4, all_rows: tuple[int, ...] = (1, 4, 16),
) -> None:  # fmt: skip
    """Adds the time and share of bandwidth of `num_layers` layers, captured in one graph."""
    if lib is None:
        table.add("chains of layers", "not measured: no CUDA C++ kernels")
        return
    kept: list[Case] = []  # the last graph that is dropped takes the pool of all with it
    for num_rows in all_rows:
        chain = Chain(sizes, make, num_rows, num_layers)
        x = make(num_rows, sizes.hidden)
        cases = list(_cases(chain, x, lib, api, num_rows))
        kept += cases
        measure_cases(cases, clock, limits, table)
        table.add(f"layers of {num_rows} rows, persistent: numbers that differ", _difference(chain, lib, x), "", "0")


def _cases(chain: Chain, x: Tensor, lib: CudaLibrary, api: GraphApi, num_rows: int) -> Iterator[Case]:
    for kind, products in KINDS.items():
        for overlap in (Overlap.NONE, Overlap.WEIGHTS):
            run = functools.partial(chain.run, lib.overlapping(overlap), products=products)
            name = f"layers of {num_rows} rows, {kind}, overlap {overlap.name.lower()}"
            yield Case(name, _captured(api, run, x), moved=chain.weight_bytes, goal="88 %")
    run = functools.partial(chain.run_persistent, lib.overlapping(Overlap.WEIGHTS))
    name = f"layers of {num_rows} rows, persistent between attentions"
    yield Case(name, _captured(api, run, x), moved=chain.weight_bytes, goal="88 %", is_tuning=True)


def _difference(chain: Chain, lib: CudaLibrary, x: Tensor) -> str:
    """How many results of the persistent kernel are not those of the kernel of few rows: at an 8B model's sizes none,
    since both have the same tiles."""
    try:
        return str(int((chain.run(lib, x) != chain.run_persistent(lib, x)).sum()))
    except RuntimeError as error:  # a GPU before sm_90
        return f"not run: {error}"


def _captured(api: GraphApi, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Captures at its first call."""

    @functools.cache
    def replay() -> Callable[[], None]:
        api.warm_up(lambda: run(x))
        return api.capture(run, x)[0]

    return lambda: replay()()
