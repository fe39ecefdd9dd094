"""Greedy tokens of tiny trained models on the GPU, op by op, replayed and served, against Transformers on the CPU;
kernels with overlap against kernels without.

python models.py MARKS [PART]     every part runs in a process of its own, all at once: a crash of one does not affect
others. MARKS: folder of what is not done (failures.py)
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.kernels.cuda.library import CudaLibrary, library_for
from fuseline.compile.target import detect_target
from fuseline.compile.tuning.clock import Clock, DeviceClock
from fuseline.engine.build import build_compiled_model, find_device
from fuseline.engine.config import EngineConfig, SchedulerConfig
from fuseline.engine.messages import EngineRequest, StepExpander
from fuseline.engine.params import SamplingParams
from fuseline.engine.service import EngineService
from gpu_check.failures import unless_done
from gpu_check.kernels import Made, Sizes
from gpu_check.overlap import check_overlap
from gpu_check.table import Table

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3", "phi3_longrope")
OVERLAP = "overlap"
PROMPTS = make_prompts((3, 9, 20, 33))
NUM_TOKENS = 24
THREADS = 2
"""CPU threads for each family."""


def main(marks: str) -> int:
    parts = (*FAMILIES, OVERLAP)
    with ThreadPoolExecutor(len(parts)) as pool:
        return max(pool.map(partial(run_alone, marks), parts))


def run_alone(marks: str, part: str) -> int:
    """Runs a part in its own process and prints its output as it comes; returns 1 if it failed."""
    with suppress(subprocess.CalledProcessError), unless_done(Path(marks), part):
        subprocess.run([sys.executable, "-P", __file__, marks, part], check=True)
        return 0
    return 1


def check(part: str) -> int:
    """Number of wrong answers."""
    if part != OVERLAP:
        return check_family(part)
    return check_early_launches(library_for(detect_target(device="cuda")), Sizes(), "cuda", DeviceClock)


def check_family(family: str) -> int:
    wrong = 0
    for dtype in ("float32", "bfloat16"):
        path = checkpoint(family, dtype)
        expected = truth(path, PROMPTS, NUM_TOKENS)
        for mode, find in (
            ("op by op", partial(tokens, path, GraphConfig(enabled=False))),
            ("graphs", partial(tokens, path, GraphConfig((1, 2, 4), mixed_sizes=(8, 16)))),
            ("whole mixed graphs", partial(tokens, path, GraphConfig((1,), mixed_sizes=(8, 16), is_mixed_whole=True))),
            ("served", partial(served_tokens, path)),
        ):
            wrong += tell(f"{family} {dtype} {mode}", find, expected)
    return wrong


def tell(what: str, find: Callable[[], object], expected: object) -> bool:
    """Reports a comparison; returns whether it failed."""
    try:
        verdict = "ok" if find() == expected else "DIFFERS"
    except Exception as error:
        traceback.print_exc()
        verdict = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    print(f"{what}: {verdict}", flush=True)
    return verdict != "ok"


def check_early_launches(
    library: CudaLibrary | None, sizes: Sizes, device: str, new_clock: Callable[[], Clock], num_replays: int = 300
) -> int:
    """Checks that overlapped kernels give the bits of serial ones, and that FUSELINE_CUDA_PDL=0 disables overlap."""
    if library is None:
        return 0

    def num_different() -> int:
        api = CudaGraphApi(CaptureStreams.of(torch.device(device)))
        return check_overlap(sizes, Made(sizes, device), library, api, Table(), new_clock(), num_replays)

    return tell(f"kernels in C++, overlap {library.overlap.name}", num_different, 0)


def tokens(path, graphs: GraphConfig) -> list[list[int]]:
    model = compile_model(CompileConfig(model=str(path)), detect_target(THREADS, "cuda"), graphs=graphs)
    allocate = model.allocate_caches

    def allocate_and_capture(num_blocks) -> None:
        allocate(num_blocks)
        model.capture_graphs()
        if model.graphs is not None:
            model.graphs.wait()
            for steps in (model.graphs.decode, model.graphs.whole_mixed, model.graphs.mixed):
                if set(steps.captured) != set(steps.sizes):
                    raise RuntimeError(f"captured {sorted(steps.captured)} of {steps.sizes}")

    model.allocate_caches = allocate_and_capture
    return greedy(model, PROMPTS, NUM_TOKENS)


def served_tokens(path) -> list[list[int]]:
    """Tokens from an engine started as by a server: warmed up, caches sized, graphs captured meanwhile."""
    config = EngineConfig(
        CompileConfig(model=str(path), max_num_batched_tokens=32, max_num_seqs=4, cpu_threads=THREADS),
        scheduler=SchedulerConfig(max_num_batched_tokens=32, max_num_seqs=4), device="cuda",
    )  # fmt: skip
    service = EngineService(config, build_compiled_model, find_device, lambda message: None)
    engine, expander = service.engine, StepExpander()
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    for k, prompt in enumerate(PROMPTS):
        engine.add(EngineRequest(request_id=str(k), prompt_token_ids=tuple(prompt), params=params))
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for output in expander.expand(engine.step()).outputs:
            found[int(output.request_id)] += output.token_ids
    service.device.stop_capture(engine.runner.model)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else min(1, check(sys.argv[2])))
