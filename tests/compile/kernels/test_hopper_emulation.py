"""The emulation of warp-group products: operands as PTX lays them out, and faults that it finds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_emulator
import pytest

PROGRAM = """
#include <cmath>
#include "cuda/hopper.h"
using namespace fuseline::cuda;

constexpr int kRows = 64, kColumns = 128, kDepth = 16, kThreads = 128;
enum Fault { kNone, kNoFence, kNoWait, kEarly, kApart, kNoCopyFence, kWrongStride };
struct Args { float* out; int swizzle, fault; bool is_across, in_registers; };

float a_at(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); }
float b_at(int k, int column) { return static_cast<float>((k * 5 + column * 9) % 13 - 6); }

// Bytes where a number of a matrix lies, k along its lines (or rows along them if `is_across`), by the canonical
// layouts: eight lines of `width` bytes, 16-byte units of which are exchanged by the line's number.
int place(int row, int k, int width, bool is_across, int num_rows) {
  if (!is_across && width == 16) return k / 8 * num_rows * 16 + row * 16 + k % 8 * 2;
  if (is_across && width == 16) return row / 8 * 256 + k * 16 + row % 8 * 2;
  const int line = is_across ? k : row, along = is_across ? row : k, per_line = width / 2;
  const int chunk = along / per_line, lines = is_across ? kDepth : num_rows, unit = along % per_line / 8;
  const int moved = width == 128 ? unit ^ line % 8 : width == 64 ? unit ^ line / 2 % 4 : unit ^ line / 4 % 2;
  return chunk * lines * width + line * width + moved * 16 + along % 8 * 2;
}

uint64_t describe(const char* at, int swizzle, int leading, int stride) {
  return shared_address(at) >> 4 | static_cast<uint64_t>(leading / 16) << 16 |
         static_cast<uint64_t>(stride / 16) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

void multiply(const Args args) {
  wait_for_prerequisites();
  const int thread = threadIdx.x, width = args.swizzle == 0 ? 16 : 256 >> args.swizzle;
  char *left = dynamic_shared(), *right = left + 16384;
  if (thread == 0) {
    for (int k = 0; k < kDepth; ++k) {
      for (int row = 0; row < kRows; ++row)
        reinterpret_cast<Bf16&>(left[place(row, k, width, false, kRows)]) = cast<Bf16>(a_at(row, k));
      for (int n = 0; n < kColumns; ++n)
        reinterpret_cast<Bf16&>(right[place(n, k, width, args.is_across, kColumns)]) = cast<Bf16>(b_at(k, n));
    }
  }
  static uint4 from, to[kThreads];
  if (args.fault == kNoCopyFence) copy_async(&to[thread], &from, true);
  close_group();
  wait_groups<0>();
  __syncthreads();
  uint32_t a[4];
  const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  for (int r = 0; r < 4; ++r) {
    const int at = row + r % 2 * 8, k = 2 * t + r / 2 * 8;
    a[r] = pack<Bf16>(a_at(at, k), a_at(at, k + 1));
  }
  float d[64] = {};
  const int wide = args.swizzle ? 8 * width : 128;
  uint64_t b = describe(right, args.swizzle, kColumns * 16, wide);
  if (args.is_across)
    b = args.swizzle ? describe(right, args.swizzle, kDepth * width, wide) : describe(right, 0, 128, 256);
  if (args.fault == kWrongStride) b += uint64_t{1} << 32;
  if (args.fault == kApart && thread == 77) b += 1;
  if (args.fault != kNoFence) begin_products();
  if (args.in_registers) product(d, a, b, false, Bf16{});
  else product(d, describe(left, args.swizzle, kRows * 16, wide), b, false, Bf16{});
  close_products();
  if (args.fault == kNoWait) return;
  if (args.fault != kEarly) wait_products<0>();
  settle(d);
  for (int k = 0; k < 64; ++k)
    args.out[(row + k / 2 % 2 * 8) * kColumns + k / 4 * 8 + 2 * t + k % 2] = d[k];
  if (args.fault == kEarly) wait_products<0>();
}

int main(int, char** given) {
  static float out[kRows * kColumns];
  const auto number = [&](int at) { return given[at][0] - '0'; };
  const Args args{out, number(1), number(2), number(3) == 1, number(3) == 1};
  if (launch(multiply, dim3(1), kThreads, Stream{}, args, Overlap::kHeads, 32768)) return 2;
  for (int row = 0; row < kRows; ++row)
    for (int n = 0; n < kColumns; ++n) {
      float want = 0.0f;
      for (int k = 0; k < kDepth; ++k) want += a_at(row, k) * b_at(k, n);
      if (out[row * kColumns + n] != want) return 3;
    }
  return 0;
}
"""
RIGHT, NUMBERS = (0, ""), (3, "")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return cuda_emulator.build_program(PROGRAM, tmp_path_factory.mktemp("products"))


@pytest.mark.parametrize("is_across", (0, 1), ids=("along", "across"))
@pytest.mark.parametrize("swizzle", (0, 1, 2, 3), ids=("none", "128", "64", "32"))
def test_operands_lie_as_their_descriptors_say(program, swizzle, is_across) -> None:
    """A from shared memory and B^T along k; then A from registers and B across."""
    assert subprocess.run([program, str(swizzle), "0", str(is_across)]).returncode == 0


@pytest.mark.parametrize(("fault", "code", "said"), [
    (1, -6, "a product without a fence of its registers"), (2, -6, "products were not waited for"), (3, 3, ""),
    (4, -6, "issue different products"), (5, -6, "copies that no fence orders before products"), (6, 3, ""),
], ids=("no fence", "no wait", "reads early", "apart", "no fence of copies", "wrong stride"))  # fmt: skip
def test_faults_are_found(program, fault, code, said) -> None:
    done = subprocess.run([program, "1", str(fault), "1"], capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr
