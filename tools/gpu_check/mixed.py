"""Steps that mix decoding with a chunk of a prompt: piecewise graphs against op-by-op launches."""

from __future__ import annotations

import statistics
import time

import torch

from fuseline.compile.graph_inputs import StepInputs, make_step
from gpu_check.llama import BLOCK, Runner
from gpu_check.table import Table


def measure_mixed(runner: Runner, num_seqs: int, chunks: tuple[int, ...], context: int, table: Table) -> None:
    """Host and total time of a step with `num_seqs` decoding sequences and one that computes `chunk` tokens."""
    graphs = runner.model.graphs
    for chunk in chunks:
        step = mixed_step(runner, num_seqs, chunk, context)
        for name, used in (("piecewise", graphs), ("op by op", None)):
            runner.model.graphs = used
            host, whole = timed(runner, step)
            size = f"step of {num_seqs} + {chunk} tokens, {name}"
            table.add(size, f"{whole * 1e3:.2f} ms", f"host {host * 1e6:.0f} us")
    runner.model.graphs = graphs


def mixed_step(runner: Runner, num_seqs: int, chunk: int, context: int) -> StepInputs:
    """The sequence with the chunk comes last; each sequence has `context` earlier tokens."""
    counts = [1] * num_seqs + [chunk]
    width = -(-(context + chunk) // BLOCK)
    tables = torch.arange(1, 1 + len(counts) * width, dtype=torch.int32).reshape(1, len(counts), width)
    return make_step(counts, [context + count for count in counts], tables, BLOCK)


def timed(runner: Runner, step: StepInputs, repeats: int = 10) -> tuple[float, float]:
    """(host seconds, seconds) per step: of a launch while the device has nothing to do, and of steps in a row."""
    launches = []
    for _ in range(repeats):
        runner.wait()
        started = time.perf_counter()
        runner.model.run(step)
        launches.append(time.perf_counter() - started)
    runner.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        runner.model.run(step)
    runner.wait()
    return statistics.median(launches), (time.perf_counter() - started) / repeats
