"""The emulation of CUDA on a CPU, whatever the machine's compiler does by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_emulator

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
