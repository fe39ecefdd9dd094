"""Loading a model: seconds of each phase, and peak resident memory relative to the size of its weights.

    python -P benchmarks/load.py 135m --level 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

ALLOWED_OVERHEAD = 300 * 2**20


def measure(model: str, level: int) -> dict[str, float]:
    """Runs in a separate process, since peak memory is per process."""
    started = time.perf_counter()
    from fuseline.compile.compiler import compile_model
    from fuseline.compile.config import CompileConfig
    from fuseline.compile.target import detect_target

    imported = time.perf_counter()
    first_seen: dict[str, float] = {}
    compiled = compile_model(
        CompileConfig(model=model, level=level, max_model_len=2048),
        detect_target(),
        lambda phase, done, total: first_seen.setdefault(phase, time.perf_counter() - imported),
    )
    finished = time.perf_counter()
    return {
        "import_s": imported - started,
        "compile_s": finished - imported,
        "weight_bytes": compiled.info.weight_bytes,
        "peak_rss": peak_rss(),
        **{f"{phase}_from_s": seconds for phase, seconds in first_seen.items()},
    }


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.model, args.level)))
        return
    command = [sys.executable, "-P", __file__, args.model, "--level", str(args.level), "--child"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for key, value in result.items():
        print(f"{key:20} {value / 2**20:10.1f} MiB" if key.endswith(("bytes", "rss")) else f"{key:20} {value:10.2f} s")
    allowed = 1.15 * result["weight_bytes"] + ALLOWED_OVERHEAD
    print(f"{'allowed':20} {allowed / 2**20:10.1f} MiB   peak / allowed = {result['peak_rss'] / allowed:.2f}")


if __name__ == "__main__":
    main()
