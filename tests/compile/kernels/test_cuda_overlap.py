"""Kernels that may begin before those ahead of them have ended: what they touch by then, and who may read a weight."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace

import cuda_emulator
import pytest
import torch
import triton_interpreter
from fake_gpu import GPU
from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile import target as targets
from fuseline.compile.backends.cuda.executable import chosen_kernels
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.cuda.library import CudaLibrary, Overlap
from fuseline.compile.kernels.registry import implementations
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.residency.offload import choose_offloaded
from fuseline.compile.residency.uploads import num_bytes
from fuseline.compile.target import Target

__all__ = ["triton_interpreter"]
PROGRAM = """
#include "cuda/device.h"

using namespace fuseline::cuda;

struct Args { float* out; const float *in, *weight; int what; };

// Right for 0; else what must not happen.
void kernel(const Args a) {
  __shared__ uint4 ring[32];
  const int thread = threadIdx.x;
  launch_dependents();
  prefetch(a.in + thread);
  copy_async(&ring[thread], (a.what == 1 ? a.in : a.weight) + 4 * thread, true);
  close_group();
  float early = 0.0f;
  if (a.what == 2 && thread == 7) early = a.in[thread];
  if (a.what == 3) a.out[thread] = 1.0f;
  static BulkBarrier copied;
  if (thread == 0) init(copied, 1);
  if (a.what == 5 && thread == 0) {
    arrive_expecting(copied, 16);
    copy_bulk_once(&ring[0], a.in, 16, copied);
  }
  wait_groups<0>();
  if (a.what == 4 && thread == 31) return;
  wait_for_prerequisites();
  a.out[thread] = a.in[thread] + early + bits_float(ring[thread].x);
}

int main(int, char** given) {
  static float out[32], in[128], weight[128];
  for (int k = 0; k < 128; ++k) in[k] = weight[k] = 1.0f;
  const Stream stream{nullptr, static_cast<Overlap>(given[2][0] - '0')};
  const int what = given[1][0] - '0';
  emulated::check_race([&](const auto& hidden) {
    launch(kernel, dim3(2), 32, stream, Args{hidden(out), hidden(in + 0), weight, what}, Overlap::kWeights);
  });
  const int error = launch(kernel, dim3(2), 32, stream, Args{out, in, weight, what}, Overlap::kWeights);
  return error || out[31] < 2.0f;
}
"""
TOUCHES = "a thread touches memory and has not waited for the kernels ahead"
ENDS = "a thread ends and has not waited for the kernels ahead"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """what it does, overlap -> how it ended."""
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "program.cpp").write_text(PROGRAM)
    subprocess.run([*cuda_emulator.COMMAND, folder / "program.cpp", "-o", folder / "program"], check=True)

    def run(what: int, overlap: Overlap) -> subprocess.CompletedProcess:
        return subprocess.run([folder / "program", str(what), str(int(overlap))], capture_output=True, text=True)

    return run


def test_a_kernel_that_reads_only_weights_and_waits_is_right(program) -> None:
    for overlap in Overlap:
        assert program(0, overlap).returncode == 0


@pytest.mark.parametrize(("what", "why"), [(1, TOUCHES), (2, TOUCHES), (3, TOUCHES), (4, ENDS), (5, TOUCHES)],
                         ids=("copies", "reads", "writes", "does not wait", "copies in bulk"))  # fmt: skip
def test_the_emulator_ends_with_a_kernel_that_is_too_early(program, what: int, why: str) -> None:
    done = program(what, Overlap.WEIGHTS)
    assert done.returncode < 0 and why in done.stderr


def test_a_launch_that_waits_may_touch_what_it_likes(program) -> None:
    for what in (1, 2, 3):
        assert program(what, Overlap.HEADS).returncode == 0


@pytest.fixture
def called(monkeypatch) -> Counter[tuple[str, Overlap]]:
    """Calls of the library by name and overlap; it is there for every target."""
    found: Counter[tuple[str, Overlap]] = Counter()
    call = CudaLibrary.call

    def note(self: CudaLibrary, name: str, on: torch.Tensor, **fields: object) -> None:
        found[name, self.overlap] += 1
        call(self, name, on, **fields)

    monkeypatch.setattr(CudaLibrary, "call", note)
    monkeypatch.setattr(cuda_library, "_installed", cuda_emulator.emulator)
    return found


@pytest.mark.parametrize(("overlaps", "of_constant", "of_computed"), [
    (True, Overlap.WEIGHTS, Overlap.HEADS), (False, Overlap.NONE, Overlap.NONE),
])  # fmt: skip
def test_only_a_weight_that_nothing_writes_is_read_early(called, overlaps, of_constant, of_computed) -> None:
    aten, weight = torch.ops.aten, torch.randn(24, 64).bfloat16()
    graph, x = torch.fx.Graph(), torch.randn(2, 64).bfloat16()
    node, held = graph.placeholder("x"), graph.get_attr("held")
    made = graph.call_function(aten.neg.default, (held,))
    nodes = [graph.call_function(torch.ops.fuseline.linear.default, (node, w, None)) for w in (held, made)]
    for of, value in ((node, x), (held, weight), (made, weight), *((n, x[:, :24]) for n in nodes)):
        of.meta["val"] = value.to("meta")
    graph.output(tuple(nodes))
    module = torch.fx.GraphModule({"held": weight}, graph)
    gpu = Target("cuda", "sm_90", 1, overlaps=overlaps)
    for constants in ({"held"}, ()):
        called.clear()
        kernels = chosen_kernels(module, Kernels(gpu, {}), constants)
        for linear in nodes:
            torch.testing.assert_close(kernels[linear].run(x, weight), torch.nn.functional.linear(x, weight))
        first = of_constant if constants else of_computed
        assert called == Counter([("linear", first)]) + Counter([("linear", of_computed)])


def test_weights_that_come_through_slots_are_not_read_early(called, monkeypatch) -> None:
    """The last of three layers is offloaded. The fused product is no default: here it comes first."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    kernels = implementations("cuda")
    fused = [one for one in kernels["linear_act_mul"] if one.label == "cuda.linear_act_mul"]
    others = [one for one in kernels["linear_act_mul"] if one not in fused]
    monkeypatch.setitem(kernels, "linear_act_mul", (*(replace(one, order=0) for one in fused), *others))
    path = str(checkpoint("llama", "bfloat16"))
    graph = optimize(CompileConfig(model=path), GPU)[0].graph
    last = num_bytes(choose_offloaded(graph, 1 << 30)[-1])
    model = compile_model(CompileConfig(model=path, cpu_offload_gb=last / (1 << 30)), GPU)
    assert len(model._executable.offload.layers) == 1
    prompts = make_prompts((3, 9))
    assert greedy(model, prompts, 3) == truth(checkpoint("llama", "bfloat16"), prompts, 3)
    steps = called["linear_act_mul", Overlap.HEADS]
    expected = {("linear", Overlap.WEIGHTS): 7, ("linear", Overlap.HEADS): 3, ("linear_act_mul", Overlap.WEIGHTS): 2}
    assert steps and {key: called[key] for key in expected} == {key: n * steps for key, n in expected.items()}
    assert {overlap for name, overlap in called if not name.startswith("linear")} == {Overlap.HEADS}


@pytest.mark.parametrize(("variable", "overlap"), [
    (None, Overlap.HEADS), ("1", Overlap.HEADS), ("0", Overlap.NONE),
])  # fmt: skip
def test_it_can_be_turned_off(called, variable, overlap, monkeypatch) -> None:
    monkeypatch.setattr(targets, "missing_for_cuda", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("FUSELINE_CUDA_PDL", raising=False)
    if variable is not None:
        monkeypatch.setenv("FUSELINE_CUDA_PDL", variable)
    found = cuda_library.library_for(targets.detect_target(device="cuda"))
    assert found.overlap == overlap


def test_a_library_that_cannot_is_never_asked(monkeypatch) -> None:
    unable = cuda_emulator.emulator().overlapping(Overlap.NONE)
    monkeypatch.setattr(cuda_library, "_installed", lambda: unable)
    assert cuda_library.library_for(replace(GPU, tensors="")).overlapping(Overlap.WEIGHTS).overlap == Overlap.NONE
