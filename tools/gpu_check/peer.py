"""Transformers' continuous batching against ours, with the same weights and the same amount of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fuseline.engine.run.device import Device
from gpu_check.llama import Runner
from gpu_check.serving import Batch, Waits, make_engine, prompts_of
from gpu_check.table import Table

BATCH = Batch(num_seqs=64, prompt=128, generated=64)


def against_transformers(runner: Runner, device: Device, table: Table, folder: Path, batch: Batch = BATCH) -> None:
    """Runs all requests at once, greedy; each side has run the same requests before."""
    waits = Waits(device)
    ours = seconds_of(lambda name: make_engine(runner, waits, batch, name).drain_all())
    tokens = batch.num_seqs * batch.generated
    table.add(f"{batch.num_seqs} x {batch.prompt} in, {batch.generated} out", f"{tokens / ours:.0f} token/s")
    runner.model.stop_capture()
    generated = []

    def generate(name: str) -> None:
        generated[:] = generate_all(model, runner, batch)

    model = peer_of(runner, folder)
    theirs = seconds_of(generate)
    if any(len(tokens) != batch.generated for tokens in generated):
        raise RuntimeError(f"transformers gave {sorted({len(tokens) for tokens in generated})} tokens a request")
    table.add("the same by transformers' continuous batching", f"{tokens / theirs:.0f} token/s",
              f"ours {theirs / ours:.1f} x")  # fmt: skip


def seconds_of(call: Callable[[str], object]) -> float:
    """Seconds of the call's second run."""
    call("peer warm ")
    started = time.perf_counter()
    call("peer timed ")
    return time.perf_counter() - started


def generate_all(model: nn.Module, runner: Runner, batch: Batch) -> list[list[int]]:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=batch.generated, do_sample=False, eos_token_id=-1, pad_token_id=0
    )  # fmt: skip
    prompts = prompts_of(batch, runner.model.info.vocab_size)
    outputs = model.generate_batch([list(prompt) for prompt in prompts], generation_config=settings)
    return [output.generated_tokens for output in outputs.values()]


def peer_of(runner: Runner, folder: Path) -> nn.Module:
    """Transformers' model over the runner's weights, which are shared, not copied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(runner.parameters(), strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(f"weights that only one of the two models has: {[*missing, *unexpected][:5]}")
    # Only parameters are shared; buffers, such as those of positions, are computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(runner.device)
    return model.eval()
