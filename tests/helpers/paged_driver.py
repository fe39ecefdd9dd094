"""A minimal engine for compiler tests: several prompts in one batch, chunked, staggered, over shuffled blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.graph_inputs import StepInputs

BLOCK_SIZE = 16


@dataclass
class Sequence_:
    tokens: list[int]
    num_prompt: int
    blocks: list[int]
    starts_at: int
    slot: int = 0
    num_computed: int = 0
    variant: int = 0


def greedy(model: CpuModel, prompts: Sequence[Sequence[int]], num_tokens: int, chunk: int = 7) -> list[list[int]]:
    """`num_tokens` greedy tokens after each prompt; prompt k joins at step k, at most `chunk` tokens of it a step."""
    blocks_each = -(-(max(len(p) for p in prompts) + num_tokens) // BLOCK_SIZE)
    free = list(range(1, blocks_each * len(prompts) + 1))
    random.Random(0).shuffle(free)
    model.allocate_caches([len(free) + 1] * len(model.info.cache_groups))
    if model.info.state_specs:
        model.allocate_states(len(prompts))
    sequences = [
        Sequence_(list(p), len(p), [free.pop() for _ in range(blocks_each)], k, len(prompts) - 1 - k)
        for k, p in enumerate(prompts)
    ]
    step = 0
    while active := [s for s in sequences if len(s.tokens) - s.num_prompt < num_tokens]:
        _run_step(model, [s for s in active if s.starts_at <= step], chunk)
        step += 1
    return [s.tokens[s.num_prompt :] for s in sequences]


def _run_step(model: CpuModel, batch: list[Sequence_], chunk: int) -> None:
    switch = model.info.rope_switch
    tokens, positions, rope_rows, slots, starts = [], [], [], [], [0]
    for sequence in batch:
        if switch and sequence.variant != (variant := int(len(sequence.tokens) > switch.threshold)):
            sequence.variant, sequence.num_computed = variant, 0
        begin = sequence.num_computed
        sequence.num_computed = min(begin + chunk, len(sequence.tokens))
        for at in range(begin, sequence.num_computed):
            tokens.append(sequence.tokens[at])
            positions.append(at)
            rope_rows.append(at + (sequence.variant * switch.table_rows if switch else 0))
            slots.append(sequence.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE)
        starts.append(len(tokens))
    num_groups = len(model.info.cache_groups)
    inputs = StepInputs(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        rope_rows=torch.tensor(rope_rows),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([s.num_computed for s in batch], dtype=torch.int32),
        slot_mapping=torch.tensor(slots).expand(num_groups, -1),
        block_tables=torch.tensor([s.blocks for s in batch], dtype=torch.int32).expand(num_groups, -1, -1),
        state_slots=torch.tensor([s.slot for s in batch]) if model.info.state_specs else None,
        logits_rows=torch.tensor(starts[1:]) - 1,
    )
    for sequence, row in zip(batch, model.run(inputs).logits, strict=True):
        if sequence.num_computed == len(sequence.tokens):
            sequence.tokens.append(int(row.argmax()))
