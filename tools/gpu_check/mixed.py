"""Steps that mix decoding with a chunk of a prompt: in pieces against op by op."""

from __future__ import annotations

import time

import torch
from llama import BLOCK, Runner
from table import Table

from fuseline.compile.graph_inputs import GraphInputs


def measure_mixed(runner: Runner, num_seqs: int, chunks: tuple[int, ...], context: int, table: Table) -> None:
    """Host and whole time of a step of `num_seqs` sequences that decode and one that has `chunk` tokens computed."""
    graphs = runner.model.graphs
    for chunk in chunks:
        step = mixed_step(runner, num_seqs, chunk, context)
        for name, used in (("in pieces", graphs), ("op by op", None)):
            runner.model.graphs = used
            host, whole = timed(runner, step)
            size = f"step of {num_seqs} + {chunk} tokens, {name}"
            table.add(size, f"{whole * 1e3:.2f} ms", f"host {host * 1e6:.0f} us")
    runner.model.graphs = graphs


def mixed_step(runner: Runner, num_seqs: int, chunk: int, context: int) -> GraphInputs:
    """The sequence of the chunk comes last; all read `context` tokens before their own."""
    counts = torch.tensor([1] * num_seqs + [chunk])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    owners = torch.repeat_interleave(torch.arange(num_seqs + 1), counts)
    positions = context + torch.arange(len(owners)) - starts[owners]
    width = -(-(context + chunk) // BLOCK)
    tables = torch.arange(1, 1 + (num_seqs + 1) * width, dtype=torch.int32).reshape(1, num_seqs + 1, width)
    slots = tables[0, owners, positions // BLOCK].long() * BLOCK + positions % BLOCK
    return GraphInputs(
        token_ids=positions % 100, positions=positions, rope_rows=positions, query_start=starts.int(),
        seq_lens=(context + counts).int(), slot_mapping=slots[None], block_tables=tables, logits_rows=starts[1:] - 1,
    )  # fmt: skip


def timed(runner: Runner, step: GraphInputs, repeats: int = 10) -> tuple[float, float]:
    """(host seconds, seconds) a step."""
    runner.model.run(step)
    runner.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        runner.model.run(step)
    launched = time.perf_counter() - started
    runner.wait()
    return launched / repeats, (time.perf_counter() - started) / repeats
