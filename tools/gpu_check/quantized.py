"""Steps of the 8B model with quantized weights: one stream, many sequences, a prompt, an offline batch.

python quantized.py TABLE.md MARKS
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from fuseline.compile.backends.cuda.graph_api import GraphApi
from fuseline.compile.config import GraphConfig
from fuseline.compile.target import detect_target
from fuseline.compile.tuning import limits as machine
from fuseline.compile.tuning.clock import DeviceClock
from fuseline.compile.tuning.limits import Limits
from fuseline.engine.run.cuda_device import CudaDevice
from gpu_check.kernels import Sizes
from gpu_check.llama import Load, Runner
from gpu_check.serving import Batch, measure_serving
from gpu_check.table import Table, run_part, share_of

SETTINGS = {
    "int4": {"quantization": "int4"}, "fp8": {"quantization": "fp8"},
    "fp8 by fp8": {"quantization": "fp8", "activation_dtype": "fp8"}, "int8": {"quantization": "int8"},
}  # fmt: skip
GOALS = {("int4", 1): "2.5 x bf16", ("fp8", 1): "1.7 x bf16"}


def main(out: Path, marks: Path) -> int:
    sizes, table = Sizes(), Table.resumed(out)
    target = detect_target(device="cuda")
    limits = machine.measure_limits(DeviceClock(), "cuda", torch.bfloat16, sizes.copied, sizes.square)
    load = Load((1, 16, 256), prompts=(2048,), graphs=GraphConfig((1, 16, 256), mixed_sizes=()))

    def measure(name: str, folder: Path) -> None:
        runner = Runner(folder, target, load, **SETTINGS[name])
        measure_steps(runner, name, load, limits, table)
        measure_serving(runner, CudaDevice(target), Batch(max_tokens=max(load.prompts)), table, f"{name}: ")
        runner.model.stop_capture()

    done = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SETTINGS:
            done.append(run_part(f"{name} weights", partial(measure, name, Path(folder)), table, marks))
            torch.cuda.empty_cache()
    return 0 if all(done) else 1


def measure_steps(
    runner: Runner, name: str, load: Load, limits: Limits, table: Table, api: GraphApi | None = None
) -> None:
    """Rows of decode steps and of prompts."""
    runner.capture(api)
    for num_seqs in load.batches:
        step, _ = runner.decode(num_seqs, load.context, load.steps)
        moved = runner.weight_bytes + num_seqs * load.context * runner.bytes_per_token
        share = f"{share_of(limits.bandwidth, moved, step)} of bandwidth"
        value = f"{step * 1e3:.2f} ms a step, {num_seqs / step:.0f} token/s"
        table.add(f"{name}: decode {num_seqs} x {load.context}", value, share, GOALS.get((name, num_seqs), ""))
    for length in load.prompts:
        table.add(f"{name}: first token of {length}", f"{runner.first_token(length) * 1e3:.0f} ms")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
