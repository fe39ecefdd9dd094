"""Attention over latents against the heads that are expanded from them: bytes a token, decode and prompt times.

    python benchmarks/latent.py --contexts 512,4096

A model of DeepSeek-V2-Lite's attention with small experts, random bf16 weights; both forms run in this process, one
after the other for each figure, the second without the pass absorb_latent. A figure is the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DeepseekV2Config

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.target import detect_target

BLOCK_SIZE, CHUNK, DECODED = 16, 512, 16
LAYERS = 4


def write_config(folder: Path) -> None:
    """Heads and ranks of DeepSeek-V2-Lite; its layers, experts and vocabulary would only add to both sides."""
    DeepseekV2Config(
        hidden_size=2048, intermediate_size=1408, moe_intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, vocab_size=4096, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
        architectures=["DeepseekV2ForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip


class Side:
    """One sequence, its prompt in chunks."""

    def __init__(self, folder: Path, threads: int, longest: int, off: tuple[str, ...]) -> None:
        config = CompileConfig(
            str(folder), level=1, load_format="dummy", skip_model_check=True, max_num_batched_tokens=CHUNK,
            disabled_passes=off,
        )  # fmt: skip
        self._model: CpuModel = compile_model(config, detect_target(threads))
        self._blocks = -(-longest // BLOCK_SIZE) + 1
        self._model.allocate_caches([self._blocks + 1])
        self.bytes_per_token = sum(spec.bytes_per_token() for spec in self._model.info.cache_specs)

    def _step(self, count: int, length: int) -> StepInputs:
        return make_step([count], [length], torch.arange(1, self._blocks + 1)[None, None], BLOCK_SIZE)

    def prompt(self, length: int) -> float:
        """Seconds."""
        started = time.perf_counter()
        for end in range(CHUNK, length + CHUNK, CHUNK):
            self._model.run(self._step(min(end, length) - end + CHUNK, min(end, length)))
        return time.perf_counter() - started

    def decode(self, length: int) -> float:
        """Seconds of a token behind `length` others."""
        started = time.perf_counter()
        for k in range(DECODED):
            self._model.run(self._step(1, length + k + 1))
        return (time.perf_counter() - started) / DECODED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.cpu_threads)
    contexts = [int(value) for value in options.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder))
        longest = max(contexts) + DECODED
        sides = [Side(Path(folder), options.cpu_threads, longest, off) for off in ((), ("absorb_latent",))]
        latents, heads = (side.bytes_per_token // LAYERS for side in sides)
        print(f"bytes a token and layer: latents {latents}, heads {heads}")
        for length in contexts:
            times = {kind: ([], []) for kind in ("prompt", "decode")}
            for _ in range(options.repeats):
                for at, side in enumerate(sides):
                    for kind, found in times.items():
                        found[at].append(getattr(side, kind)(length))
            for kind, found in times.items():
                ours, theirs = (1e3 * statistics.median(one) for one in found)
                times_text = f"latents {ours:.2f} ms, heads {theirs:.2f} ms, {theirs / ours:.2f} x"
                print(f"{kind} at {length}: {times_text}", flush=True)


if __name__ == "__main__":
    main()
