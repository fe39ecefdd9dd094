"""The process that compiles regions with inductor, so that neither its time nor its failures are the server's.

    python -P -m fuseline.compile.backends.inductor.worker
    stdin   one line of JSON: {"folder", "num_threads", "jobs": [[name, text], ...]}; it ends when the parent does
    stdout  two lines of JSON a job: {"begins": name}, then {"name", "seconds", "error", "fault"}

`error`: compilation failed. `fault`: the compiled region was rejected (check.py). Otherwise the artifact is
<folder>/<name>.so.

An artifact is one shared library with AOTInductor's C interface: loading it takes milliseconds and neither imports
inductor (2.3-3 s) nor unpickles anything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, evaluate, from_json
from fuseline.compile.backends.inductor.check import find_fault
from fuseline.compile.backends.inductor.library import load_library, seal
from fuseline.compile.graph.graph_json import decode

NICENESS = 19
HINT = 67
"""Example value of an unknown size: a prime that no other size is a multiple of."""
OPTIONS = {
    "emulate_precision_casts": True,  # round where eager torch rounds
    "cpp.threads": 1,  # one order of summation for every batch and every number of threads
    "size_asserts": False,  # lowering guarantees sizes and strides
    "aot_inductor.compile_wrapper_opt_level": "O0",  # a few calls of the kernels: half the time of g++
}


def main() -> None:
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps compilers' output out of the answers
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=die_with_parent, args=(sys.stdin,), daemon=True).start()
    torch.set_num_threads(1)
    from torch._inductor.utils import fresh_cache

    with fresh_cache():  # inductor's own cache unpickles its files
        for name, text in order["jobs"]:
            answers.write(json.dumps({"begins": name}) + "\n")
            told = answer(name, text, Path(order["folder"]), order["num_threads"])
            answers.write(json.dumps(told) + "\n")


def answer(name: str, text: str, folder: Path, num_threads: int) -> dict[str, object]:
    begin, error, fault = time.perf_counter(), "", ""
    try:
        fault = compile_region(text, folder / f"{name}.so", num_threads)
    except Exception as raised:  # on any inductor error the region stays in eager torch
        error = (" ".join(str(raised).split()) or type(raised).__name__)[:300]
    return {"name": name, "seconds": round(time.perf_counter() - begin, 2), "error": error, "fault": fault}


def die_with_parent(stdin: TextIO) -> None:
    """Exits, with g++, when the parent closes the pipe."""
    stdin.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def compile_region(text: str, path: Path, num_threads: int) -> str:
    """Compiles, checks and stores the region; returns the reason if it is rejected.

    Propagates errors of inductor and the compiler; raises OSError if the cache is not writable.
    """
    values = json.loads(text)
    graph, examples = rebuild(values)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        library = make_library(graph, examples, Path(scratch) / "region.so")
        compiled = load_library(library)
        fault = find_fault(compiled, lambda args: graph(*args), values["inputs"], values["num_outputs"], num_threads)
        if not fault:
            seal(path, library.read_bytes())
    return fault


def make_library(graph: fx.GraphModule, examples: list[Tensor], path: Path) -> Path:
    from torch._inductor import aot_compile

    library = shutil.copy(aot_compile(graph, examples, options=OPTIONS), path)
    if strip := shutil.which("strip"):
        subprocess.run([strip, "--strip-unneeded", library], check=False, timeout=60)
    return path


def rebuild(values: dict) -> tuple[fx.GraphModule, list[Tensor]]:
    """The region's graph and fake tensors for compiling it."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [_unknown_size(mode, k) for k in range(len(SYMBOLS))]

    def size(number: int | list[int]) -> int | SymInt:
        return evaluate(from_json(number), sizes)

    examples = []
    with mode:
        for made in values["inputs"]:
            shape, strides = ([size(n) for n in made[key]] for key in ("sizes", "strides"))
            examples.append(torch.empty_strided(shape, strides, dtype=getattr(torch, made["dtype"])))
    graph = decode(values["graph"], 2, 1 << 20, HINT)
    for node, example in zip(graph.find_nodes(op="placeholder"), examples, strict=True):
        node.meta["val"] = example
    return fx.GraphModule(nn.Module(), graph), examples


def _unknown_size(mode: FakeTensorMode, index: int) -> SymInt:
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(HINT + 2 * index, device="meta"), symbolic_context=context).shape[0]


if __name__ == "__main__":
    main()
