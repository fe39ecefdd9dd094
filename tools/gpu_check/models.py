"""Greedy tokens of tiny trained models on the card, op by op, replayed and served, against Transformers on the CPU."""

from __future__ import annotations

import sys

import torch
from kernels import Made, Sizes
from overlap import check_overlap
from paged_driver import greedy
from table import CardClock, Table
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.graph_api import CudaGraphApi
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.kernels.cuda_library import CudaLibrary, library_for
from fuseline.compile.target import detect_target
from fuseline.engine.build import build_compiled_model, find_device
from fuseline.engine.config import EngineConfig, SchedulerConfig
from fuseline.engine.messages import EngineRequest, SamplingParams, StepExpander
from fuseline.engine.service import EngineService

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3", "phi3_longrope")
PROMPTS = make_prompts((3, 9, 20, 33))
NUM_TOKENS = 24


def main() -> int:
    wrong = 0
    for family in FAMILIES:
        for dtype in ("float32", "bfloat16"):
            path = checkpoint(family, dtype)
            expected = truth(path, PROMPTS, NUM_TOKENS)
            for mode, config in (
                ("op by op", GraphConfig(enabled=False)),
                ("graphs", GraphConfig((1, 2, 4), mixed_sizes=(8, 16))),
            ):
                wrong += tell(f"{family} {dtype} {mode}", tokens(path, config) == expected)
        wrong += tell(f"{family} {dtype} served", served_tokens(path) == expected)
    library = library_for(detect_target(device="cuda"))
    if library is not None:
        wrong += tell(f"kernels in C++, overlap {library.overlap.name}", early_launches_are_right(library))
    return 1 if wrong else 0


def tell(what: str, is_right: bool) -> bool:
    """Whether it is wrong."""
    print(f"{what}: {'ok' if is_right else 'DIFFERS'}", flush=True)
    return not is_right


def early_launches_are_right(library: CudaLibrary) -> bool:
    """As those that wait for each other, to the bit. FUSELINE_CUDA_PDL=0 turns them off."""
    sizes = Sizes()
    api = CudaGraphApi(torch.device("cuda"))
    return check_overlap(sizes, Made(sizes, "cuda"), library, api, Table(), CardClock()) == 0


def tokens(path, graphs: GraphConfig) -> list[list[int]]:
    model = compile_model(CompileConfig(model=str(path)), detect_target(device="cuda"), graphs=graphs)
    allocate = model.allocate_caches

    def allocate_and_capture(num_blocks) -> None:
        allocate(num_blocks)
        model.capture_graphs()
        if model.graphs is not None:
            model.graphs.wait()
            for steps in (model.graphs.decode, model.graphs.mixed):
                if set(steps.captured) != set(steps.sizes):
                    raise RuntimeError(f"captured {sorted(steps.captured)} of {steps.sizes}")

    model.allocate_caches = allocate_and_capture
    return greedy(model, PROMPTS, NUM_TOKENS)


def served_tokens(path) -> list[list[int]]:
    """Through an engine that was started as a server's is: warmed up, caches sized, graphs captured meanwhile."""
    config = EngineConfig(
        CompileConfig(model=str(path), max_num_batched_tokens=32, max_num_seqs=4),
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
    sys.exit(main())
