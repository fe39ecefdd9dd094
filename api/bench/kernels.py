"""`fuseline bench kernels`: each native kernel at the sizes of real models, against what the machine can do.

    fuseline bench kernels --shapes 135m,0.5b --ops linear_panels,paged_attention

Made from the registry of ops: an op brings its workloads. The share is the time that the bytes take at the measured
bandwidth, or the arithmetic at the measured rate, whichever is longer, over the time it took. Small data lie in the
caches of the CPU, as in a model: there more than 100 % of the bandwidth can be seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from fuseline.api.bench.files import save_json
from fuseline.api.config import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
SHAPES: dict[str, tuple[int, ...]] = {
    "135m": (576, 1536, 9, 3, 64, 49152),  # SmolLM2-135M
    "0.5b": (896, 4864, 14, 2, 64, 151936),  # Qwen2.5-0.5B
}
"""The fields of ModelShape."""
MAX_REPEATS = 10_000


@dataclass(frozen=True)
class Machine:
    """What was measured of it. `flops`: of the dtype's products, per second."""

    isa: str
    num_threads: int
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Timing:
    op: str
    kernel: str
    shape: str
    label: str
    seconds: float
    num_bytes: int
    flops: int
    share: float
    bound: str
    """memory or arithmetic: what the share is of."""


def run_kernels(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    shapes, ops = _checked(options)
    machine = measure_machine(options.dtype, options.cpu_threads)
    show = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    show(head(machine, options.dtype))
    timings = []
    for timing in time_kernels(machine, shapes, ops, options):
        timings.append(timing)
        show(line(timing))
    values = {"dtype": options.dtype, "machine": asdict(machine), "kernels": [asdict(timing) for timing in timings]}
    if options.json:
        print(json.dumps(values, indent=2))
    if options.save_result:
        save_json(options.save_result, values)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuseline bench kernels", description="Times the native kernels at the sizes of real models.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="NAME,NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ops", default="", metavar="NAME,NAME", help="default: all that have a kernel")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--cpu-threads", type=int, default=0, help="0 takes the cores this process may use")
    parser.add_argument("--repeats", type=int, default=100, help="the median of so many is shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save-result", default="", metavar="FILE", help="write JSON")
    return parser


def _checked(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of shapes and of ops. Raises ConfigError."""
    from fuseline.compile.kernels.registry import implementations
    from fuseline.compile.ops.registry import registry

    if not 1 <= options.repeats <= MAX_REPEATS:
        raise ConfigError(f"--repeats must be 1 to {MAX_REPEATS}")
    if options.cpu_threads < 0:
        raise ConfigError("--cpu-threads must be 0 or more")
    known = sorted(op.name for op in registry().values() if op.workloads and op.name in implementations("cpu"))
    shapes, ops = options.shapes.split(","), options.ops.split(",") if options.ops else known
    for flag, given, possible in (("shapes", shapes, sorted(SHAPES)), ("ops", ops, known)):
        if unknown := sorted(set(given) - set(possible)):
            raise ConfigError(f"--{flag}: there is no {unknown[0]!r} (choose from {', '.join(possible)})")
    return shapes, ops


def measure_machine(dtype: str, cpu_threads: int) -> Machine:
    """Also sets the threads that kernels run on."""
    import torch

    from fuseline import _C
    from fuseline.compile.target import detect_target
    from fuseline.compile.tuning.clock import HostClock
    from fuseline.compile.tuning.limits import measure_limits

    threads = detect_target(cpu_threads).num_threads
    _C.set_num_threads(threads)
    torch.set_num_threads(threads)
    limits = measure_limits(HostClock(), "cpu", getattr(torch, dtype))
    return Machine(_C.cpu_isa(), threads, limits.bandwidth, limits.matrix_rate)


def time_kernels(
    machine: Machine, shapes: Sequence[str], ops: Sequence[str], options: argparse.Namespace
) -> Iterator[Timing]:
    import torch

    from fuseline.compile.backends.cpu_plan.single import single_call, time_call
    from fuseline.compile.ops.library import Make, ModelShape
    from fuseline.compile.ops.registry import registry

    make = Make(getattr(torch, options.dtype), torch.Generator().manual_seed(0))
    for op in (registry()[name] for name in ops):
        for shape in shapes:
            for work in op.workloads(make, ModelShape(*SHAPES[shape])):
                call = single_call(op, work.args)
                seconds, num_bytes = time_call(call, options.repeats), work.num_bytes or call.num_bytes
                limits = {"memory": num_bytes / machine.bandwidth, "arithmetic": work.flops / machine.flops}
                bound = max(limits, key=limits.__getitem__)
                yield Timing(
                    op.name, call.native.kernel, shape, work.label, seconds, num_bytes, work.flops,
                    limits[bound] / seconds, bound,
                )  # fmt: skip


def head(machine: Machine, dtype: str) -> str:
    can = f"reads {machine.bandwidth / 1e9:.1f} GB/s, products of {dtype} {machine.flops / 1e9:.0f} GFLOP/s"
    columns = f"{'op':<18}{'shape':<6}{'work':<30}{'us':>10}{'GB/s':>8}{'GFLOP/s':>9}{'share':>7}  of"
    return f"{machine.isa}, {machine.num_threads} threads: {can}\n\n{columns}"


def line(timing: Timing) -> str:
    rates = f"{timing.num_bytes / timing.seconds / 1e9:>8.1f}{timing.flops / timing.seconds / 1e9:>9.1f}"
    name = f"{timing.op:<18}{timing.shape:<6}{timing.label:<30}"
    return f"{name}{1e6 * timing.seconds:>10.1f}{rates}{timing.share:>7.0%}  {timing.bound}"
