"""Greedy tokens of tiny trained models on the card, op by op and replayed, against Transformers on the CPU."""

from __future__ import annotations

import sys

from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.target import detect_target

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3", "phi3_longrope")
PROMPTS = make_prompts((3, 9, 20, 33))
NUM_TOKENS = 24


def main() -> int:
    wrong = 0
    for family in FAMILIES:
        for dtype in ("float32", "bfloat16"):
            path = checkpoint(family, dtype)
            expected = truth(path, PROMPTS, NUM_TOKENS)
            for mode, config in (("op by op", GraphConfig(enforce_eager=True)), ("graphs", GraphConfig((1, 2, 4)))):
                found = tokens(path, config)
                wrong += found != expected
                print(f"{family} {dtype} {mode}: {'ok' if found == expected else 'DIFFERS'}", flush=True)
    return 1 if wrong else 0


def tokens(path, graphs: GraphConfig) -> list[list[int]]:
    model = compile_model(CompileConfig(model=str(path)), detect_target(device="cuda"), graphs=graphs)
    allocate = model.allocate_caches

    def allocate_and_capture(num_blocks) -> None:
        allocate(num_blocks)
        model.capture_graphs()
        if model.graphs is not None:
            model.graphs.wait()
            if set(model.graphs.graphs) != {1, 2, 4}:
                raise RuntimeError(f"captured {sorted(model.graphs.graphs)} of (1, 2, 4)")

    model.allocate_caches = allocate_and_capture
    return greedy(model, PROMPTS, NUM_TOKENS)


if __name__ == "__main__":
    sys.exit(main())
