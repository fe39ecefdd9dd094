"""The emulation of CUDA on a CPU, whatever the machine's compiler does by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_emulator
import pytest

PROGRAM = """
#include "cuda/device.h"
using namespace fuseline::cuda;
struct Args { float* out; };
void sum(Args args) {
  wait_for_prerequisites();
  const float found = warp_sum(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 33) *args.out = found;
}
int main() {
  float found = 0;
  launch(sum, dim3(2), 64, Stream{}, Args{&found});
  return found == 32 * (32 + 63) / 2 ? 0 : 1;
}
"""
BULK_PROGRAM = """
#include "cuda/device.h"
using namespace fuseline::cuda;
struct Args { float* out; const float* in; int what; };

// Sums 8 x 32 numbers that one warp copies through a ring of two stages to another. Right for 0, else a fault.
void sum_ring(const Args a) {
  static BulkBarrier full[2], empty[2];
  auto stages = reinterpret_cast<float(*)[32]>(dynamic_shared());
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      init(full[s], 1);
      init(empty[s], 32);
    }
    show_barriers();
  }
  __syncthreads();
  wait_for_prerequisites();
  float sum = 0.0f;
  for (int item = 0; item < 8; ++item) {
    const int s = item % 2, round = item / 2 % 2;
    if (threadIdx.x < 32) {
      if (a.what != 1) wait_for(empty[s], round ^ 1);
      if (lane == 0) {
        arrive_expecting(full[s], a.what == 2 ? 256 : 128);
        copy_bulk_once(stages[s], a.in + 32 * item + (a.what == 3), 128, full[s]);
      }
    } else {
      if (a.what == 6) sum += stages[s][lane];
      if (a.what != 4 || item < 7) wait_for(full[s], round);
      sum += stages[s][lane];
      if (a.what != 5) arrive(empty[s]);
    }
  }
  if (threadIdx.x >= 32) a.out[lane] = sum;
}

int main(int, char** given) {
  alignas(16) static float out[32], in[260];
  for (int k = 0; k < 256; ++k) in[k] = k / 32;
  const int error = launch(sum_ring, dim3(1), 64, Stream{}, Args{out, in, given[1][0] - '0'}, Overlap::kHeads, 256);
  for (int k = 0; k < 32; ++k)
    if (out[k] != 28.0f) return 3;
  return error;
}
"""
GRID_PROGRAM = """
#include "cuda/device.h"
using namespace fuseline::cuda;
struct Args { float *out, *parts; int what; };

// Each block adds up what all others have written. Right for 0, else a fault.
void sum_blocks(const Args a) {
  wait_for_prerequisites();
  if (threadIdx.x == 5) a.parts[blockIdx.x] = blockIdx.x + 1;
  if (a.what == 2 && blockIdx.x == 3) return;
  if (a.what != 1) sync_grid();
  float sum = 0.0f;
  for (unsigned k = 0; k < gridDim.x; ++k) sum += a.parts[k];
  if (a.what != 3) sync_grid();
  if (threadIdx.x == 7) a.parts[blockIdx.x] = -1.0f;
  if (threadIdx.x == 9) a.out[blockIdx.x] = sum;
}

int main(int, char** given) {
  const int what = given[1][0] - '0';
  for (int launches = 0; launches < 2; ++launches) {
    float out[5], parts[5] = {};
    if (what == 4) launch(sum_blocks, dim3(5), 64, Stream{}, Args{out, parts, what});
    if (launch_resident(sum_blocks, 64, Stream{}, Args{out, parts, what}, 0)) return 2;
    for (float sum : out)
      if (sum != 15.0f) return 3;
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def grid_program(tmp_path_factory) -> Path:
    return cuda_emulator.build_program(GRID_PROGRAM, tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize(("what", "code", "said"), [
    (0, 0, ""), (1, 3, ""), (2, -6, "a block has ended and others wait for it"), (3, 3, ""),
    (4, -6, "a launch that is not resident waits for its grid"),
], ids=("right", "reads early", "ends", "overwrites", "not resident"))  # fmt: skip
def test_blocks_of_a_resident_launch_wait_for_each_other(grid_program, what, code, said) -> None:
    done = subprocess.run([grid_program, str(what)], capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr


@pytest.fixture(scope="module")
def bulk_program(tmp_path_factory) -> Path:
    return cuda_emulator.build_program(BULK_PROGRAM, tmp_path_factory.mktemp("bulk"))


@pytest.mark.parametrize(("what", "code", "said"), [
    (0, 0, ""), (1, -6, "more arrivals than a barrier expects"), (2, -6, "threads wait for each other"),
    (3, -6, "a bulk copy off its alignment"), (4, -6, "bulk copies were not waited for"),
    (5, -6, "threads wait for each other"), (6, 3, ""),
], ids=("right", "overwrites", "too many bytes", "not aligned", "no wait", "no release", "reads early"))  # fmt: skip
def test_bulk_copies_are_made_when_their_barrier_is_waited_for(bulk_program, what, code, said) -> None:
    done = subprocess.run([bulk_program, str(what)], capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr


def test_threads_change_stacks_under_a_compiler_that_fortifies(tmp_path: Path) -> None:
    """As g++ of Ubuntu does: its checked longjmp takes another thread's stack for a broken one."""
    program, fortifying = tmp_path / "sum.cpp", tmp_path / "bin" / "g++"
    program.write_text(PROGRAM)
    fortifying.parent.mkdir()
    fortifying.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -D_FORTIFY_SOURCE=2 "$@"\n')
    fortifying.chmod(0o755)
    path = os.pathsep.join([str(fortifying.parent), os.environ["PATH"]])
    subprocess.run(
        [*cuda_emulator.COMMAND, program, "-o", tmp_path / "sum"], env=os.environ | {"PATH": path}, check=True
    )  # fmt: skip
    assert subprocess.run([tmp_path / "sum"]).returncode == 0


def test_nothing_of_it_is_shared_with_a_gpus_library() -> None:
    """Symbols of one process for all libraries: what both have would be the first one's."""
    library = cuda_emulator.emulator()._library._name
    symbols = subprocess.run(["nm", "-D", "-C", library], capture_output=True, text=True, check=True).stdout
    assert " u " not in symbols
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "SYMBOLIC" in dynamic
