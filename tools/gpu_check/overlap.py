"""Kernels that start before the previous one has ended: whether their results are the same, and the time they save."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuseline.compile.backends.cuda.graph_api import GraphApi
from fuseline.compile.config import GraphConfig
from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda import norm as cuda_norm
from fuseline.compile.kernels.cuda import rope as cuda_rope
from fuseline.compile.kernels.cuda.attention import decode_or_triton
from fuseline.compile.kernels.cuda.library import CudaLibrary, Overlap, library_for
from fuseline.compile.kernels.cuda.persistent import Recorder, recording_steps
from fuseline.compile.target import Target
from fuseline.compile.tuning.clock import Clock
from fuseline.compile.tuning.limits import Limits
from gpu_check.kernels import SILU, Made, Sizes
from gpu_check.llama import Load, Runner
from gpu_check.table import Table, microseconds, share_of

BLOCK = 16
CONTEXT = 600  # keys per sequence: several splits, so that attention runs two kernels


@dataclass(frozen=True)
class Products:
    """Two functions of compile/kernels/cuda/linear.py."""

    linear: Callable[..., Tensor]
    linear_act_mul: Callable[..., Tensor]


FEW_ROWS = Products(cuda_linear.linear, cuda_linear.linear_act_mul)


@dataclass(frozen=True)
class Layer:
    norms: tuple[Tensor, Tensor]
    qkv: Tensor
    attended: Tensor
    gate_up: Tensor
    down: Tensor
    caches: tuple[Tensor, Tensor]

    @property
    def products(self) -> tuple[Tensor, ...]:
        return self.qkv, self.attended, self.gate_up, self.down


class Chain:
    """Decode layers of our kernels only, each reading the previous one's output: rows -> rows."""

    def __init__(self, sizes: Sizes, make: Made, num_rows: int, num_layers: int = 2) -> None:
        s, heads = sizes, sizes.heads + 2 * sizes.kv_heads
        width = -(-CONTEXT // BLOCK)
        self._sizes = sizes
        self._layers = [
            Layer(
                (make(s.hidden), make(s.hidden)), _small(make(heads * s.head_dim, s.hidden)),
                _small(make(s.hidden, s.heads * s.head_dim)), _small(make(2 * s.inner, s.hidden)),
                _small(make(s.hidden, s.inner)), tuple(make(2, num_rows * width, s.kv_heads, BLOCK, s.head_dim)),
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self._angles = tuple(make(2, CONTEXT, s.head_dim))
        self._rows = make.ints([CONTEXT - 1] * num_rows, torch.int64)
        tables = torch.arange(num_rows * width, dtype=torch.int32).view(num_rows, width)
        self._slots = make.ints(tables[:, -1] * BLOCK + (CONTEXT - 1) % BLOCK, torch.int64)
        self._batch = make.ints(tables), make.ints([CONTEXT] * num_rows), make.ints(list(range(num_rows + 1)))

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for layer in self._layers for weight in layer.products)

    def run(self, lib: CudaLibrary | Recorder, x: Tensor, products: Products = FEW_ROWS) -> Tensor:
        """Runs the layers on x[T, hidden]."""
        total = x
        for layer in self._layers:
            x, total = cuda_norm.add_rms_norm(lib, x, total, layer.norms[0], 1e-5, 0)
            x = self._attention(lib, layer, products.linear(lib, x, layer.qkv))
            x = products.linear(lib, x, layer.attended)
            x, total = cuda_norm.add_rms_norm(lib, x, total, layer.norms[1], 1e-5, 0)
            x = products.linear_act_mul(lib, x, layer.gate_up, None, SILU)
            x = products.linear(lib, x, layer.down)
        return x

    def run_persistent(self, lib: CudaLibrary, x: Tensor) -> Tensor:
        """The same with one launch for what lies between two attentions."""
        with recording_steps(lib, [layer.attended for layer in self._layers]) as recorder:
            return self.run(recorder, x)

    def _attention(self, lib: CudaLibrary | Recorder, layer: Layer, joined: Tensor) -> Tensor:
        s = self._sizes
        heads = joined.view(1, joined.shape[0], -1, s.head_dim).transpose(1, 2)
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q = cuda_rope.rope_cache(lib, *layer.caches, q, k, v, *self._angles, self._rows, self._slots, s.head_dim, 0)
        found = decode_or_triton(lib, q, *layer.caches, *self._batch, None, 0, s.head_dim**-0.5, 0.0)
        return found.view(joined.shape[0], -1)


def _small(weight: Tensor) -> Tensor:
    return weight.mul_(weight.shape[1] ** -0.5)


def check_overlap(
    sizes: Sizes, make: Made, lib: CudaLibrary, api: GraphApi, table: Table, clock: Clock, num_replays: int = 300
) -> int:
    """Number of results of early launches, replayed and launched one by one, that differ in any bit from those of
    serial launches. Inputs differ each time, so that a premature read finds another input's numbers."""
    serial, early = (lib.overlapping(overlap) for overlap in (Overlap.NONE, Overlap.WEIGHTS))
    wrong = 0
    for num_rows in (1, 16):
        chain, x = Chain(sizes, make, num_rows), make(num_rows, sizes.hidden)
        differs = torch.zeros(2, dtype=torch.int64, device=make.device)
        api.warm_up(lambda: chain.run(serial, x))  # noqa: B023  run before the next round
        replays = [api.capture(lambda y, lib=lib: chain.run(lib, y), x) for lib in (serial, early)]  # noqa: B023
        seconds = [clock(replay) for replay, _ in replays]
        for _ in range(num_replays):
            x.normal_()
            found = [_bits(replay, result) for replay, result in replays]
            launched = chain.run(early, x).view(torch.int16)
            for way, bits in enumerate((found[1], launched)):
                differs[way] += (bits != found[0]).any()
        wrong += int(differs.sum())
        name = f"chain of {num_rows} rows"
        table.add(f"{name}, early launches: results that differ", f"{differs.tolist()} of {num_replays}", "", "0")
        table.add(f"{name}, one after the other", microseconds(seconds[0]))
        table.add(f"{name}, early", microseconds(seconds[1]), f"{100 * seconds[1] / seconds[0]:.0f} % of it")
    return wrong


def _bits(replay: Callable[[], None], result: Tensor) -> Tensor:
    replay()
    return result.view(torch.int16).clone()


def measure_overlap(
    runner: Runner, target: Target, load: Load, limits: Limits, table: Table, api: GraphApi | None = None
) -> None:
    """Measures decode steps of one sequence with and without overlap; the graphs of `runner` must be captured."""
    serial = copy.copy(runner)
    serial.model = runner.make_model(replace(target, overlaps=False), GraphConfig((1,), mixed_sizes=()))
    serial.model.allocate_caches([runner.width + 1])
    serial.capture(api)
    moved = runner.weight_bytes + load.context * runner.bytes_per_token
    library = library_for(target)
    state = "on" if library is not None and library.overlap else "off"
    for label, of in (("one after the other", serial), (f"early launches {state}", runner)):
        step, _ = of.decode(1, load.context, load.steps)
        share = f"{share_of(limits.bandwidth, moved, step)} of bandwidth"
        table.add(f"decode 1 x {load.context}, {label}", f"{step * 1e3:.3f} ms a step", share)
    serial.model.stop_capture()
