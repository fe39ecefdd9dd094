"""Level 3 on a GPU where there is a library of CUDA C++ kernels: they come first, and stay where nothing is faster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cuda_emulator
import zoo
from fake_gpu import GPU
from paged_driver import greedy
from torch import Tensor
from tune_gpu_cases import OURS, Clock, choices, config

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.cuda.library import CudaLibrary, Overlap
from fuseline.compile.kernels.cuda.persistent import LABEL
from fuseline.compile.kernels.registry import ANY
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.tuning import kernels as tune_gpu

__all__ = ["config"]
MIXED, WITH_TRITON = "cuda.bulk_attention, cuda.prefill_attention", f"cuda.bulk_attention, {OURS}"
HEADS_OF_64 = (("hidden_size", 256), ("head_dim", 64), ("num_hidden_layers", 1))


def in_cpp(config: CompileConfig, monkeypatch) -> CompileConfig:
    """With the library of CUDA C++ kernels there, and heads that it takes."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    return replace(config, hf_overrides=HEADS_OF_64)


def test_kernels_in_cpp_come_first_and_are_measured(config, monkeypatch):
    clock = Clock()
    found = choices(in_cpp(config, monkeypatch), clock)
    want = {"rows": [[16, "cuda.linear"], [ANY, "torch.linear"]]}
    assert all(choice == want for choice in found["linear"]) and len(found["linear"]) == 4
    assert found["linear_act_mul"] == [{"rows": [[ANY, "torch.linear, cuda.act_mul"]]}]
    assert found["paged_attention"] == [{DECODE: [[ANY, "cuda.bulk_attention"]], PREFILL: [[ANY, MIXED]]}]
    assert max(rows for label, rows in clock.seen if label in ("cuda.linear", "cuda.linear_act_mul")) == 16
    assert {rows for label, rows in clock.seen if label == "cuda.bulk_attention"} == {1, 8, 16, 20}
    assert {"torch.linear", "triton.linear", "triton.linear_act_mul", OURS} <= {label for label, _ in clock.seen}


def test_products_are_measured_as_they_overlap_in_a_step(config, monkeypatch):
    """A row of calls of one kernel, each of which may read its weight before the one ahead has ended."""
    overlaps = {}

    class Notes(Clock):
        def __call__(self, candidate, arguments) -> float:
            if candidate.label.startswith("cuda."):
                overlaps[candidate.label] = candidate.run.args[0].overlap
            return super().__call__(candidate, arguments)

    choices(in_cpp(config, monkeypatch), Notes())
    assert overlaps["cuda.linear"] == overlaps["cuda.linear_act_mul"] == Overlap.WEIGHTS
    assert overlaps["cuda.add_rms_norm"] == Overlap.HEADS


def test_kernels_in_cpp_give_way_to_what_is_faster(config, monkeypatch):
    faster = {("triton.linear", 1): 0.5, (OURS, 1): 0.5, (f"{WITH_TRITON} 64r", 300): 0.5}
    clock = Clock(lambda label, rows: faster.get((label, rows)))
    found = choices(in_cpp(config, monkeypatch), clock)
    assert found["linear"][0] == {"rows": [[1, "triton.linear"], [16, "cuda.linear"], [ANY, "torch.linear"]]}
    assert found["paged_attention"][0] == {
        DECODE: [[1, OURS], [ANY, "cuda.bulk_attention"]], PREFILL: [[ANY, f"{WITH_TRITON} 64r"]],
    }  # fmt: skip
    assert not any(label == OURS and rows == 300 for label, rows in clock.seen), "it leaves single tokens to the other"


def test_norms_and_the_caches_write_in_cpp_give_way_too(config, monkeypatch):
    faster = {"triton.rms_norm 4w": 64, "triton.rope_cache": 1}
    clock = Clock(lambda label, rows: 0.5 if rows >= faster.get(label, ANY) else None)
    found = choices(in_cpp(config, monkeypatch), clock)
    assert found["rms_norm"] == [{"rows": [[32, "cuda.rms_norm"], [ANY, "triton.rms_norm 4w"]]}]
    assert found["add_rms_norm"] == [{"rows": [[ANY, "cuda.add_rms_norm"]]}] * 2
    assert found["rope_cache"] == [{"rows": [[ANY, "triton.rope_cache"]]}]


def test_without_their_library_linears_and_attention_are_tritons_and_torchs(config):
    clock = Clock()
    found = choices(replace(config, hf_overrides=HEADS_OF_64), clock)
    assert found["paged_attention"] == [{DECODE: [[ANY, OURS]], PREFILL: [[ANY, OURS]]}]
    assert not any("cuda." in label for label, _ in clock.seen)


def test_a_model_runs_kernels_in_cpp_and_what_was_faster(config, monkeypatch):
    """Steps of one sequence by Triton's product, of several by that in CUDA C++."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    clock = Clock(lambda label, rows: 0.5 if label == "triton.linear" and rows == 1 else None)
    monkeypatch.setattr(tune_gpu, "DeviceTimer", lambda: clock)
    model = compile_model(config, GPU)
    labels = {kernel.label for kernel in model._executable.kernels.values()}
    assert {"triton.linear | cuda.linear | torch.linear", "cuda.add_rms_norm", "cuda.rope_cache"} <= labels
    for prompts in (zoo.make_prompts((3,)), zoo.make_prompts((3, 9))):
        assert greedy(model, prompts, 3) == zoo.truth(Path(config.model), prompts, 3)


def test_runs_of_ops_are_one_launch_for_as_many_rows_as_that_is_faster(config, monkeypatch):
    """Three layers are four runs, two of them alike, and the logits' norm and product a fifth."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    clock = Clock(lambda label, rows: 0.5 if label == LABEL and rows <= 2 else None)
    monkeypatch.setattr(tune_gpu, "DeviceTimer", lambda: clock)
    model = compile_model(config, GPU)
    measured = Counter((label, rows) for label, rows in clock.seen if label in (LABEL, "ops"))
    assert measured == {(label, rows): 4 for rows in (1, 2, 4, 8, 16) for label in (LABEL, "ops")}
    launched: Counter[int] = Counter()
    call = CudaLibrary.call

    def note(self: CudaLibrary, name: str, on: Tensor, **fields: object) -> None:
        launched[on.numel() // on.shape[-1]] += name == "persistent"
        call(self, name, on, **fields)

    monkeypatch.setattr(CudaLibrary, "call", note)
    for prompts in (zoo.make_prompts((3,)), zoo.make_prompts((3, 9, 4))):
        assert greedy(model, prompts, 3) == zoo.truth(Path(config.model), prompts, 3)
    assert set(+launched) == {1, 2} and launched[1] == 5 * 2, "of more rows each op is called"
