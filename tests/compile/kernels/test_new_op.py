"""A new op with three kernels is four new files and no change to another: it is tested, chosen, tuned and timed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator

import pytest
import torch
import triton_interpreter
from bench_kernels_cases import small
from fake_gpu import GPU
from native_fixtures import FLOATS, with_threads
from ops_cases import assert_agrees, assert_fake_agrees, assert_kernels_agree, assert_lies_as_fake, cases
from tune_gpu_cases import Clock

from fuseline.api.cli import main
from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.plan_call import meta_value, plan_call
from fuseline.compile.kernels.registry import ANY, OpCall, implementations
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.registry import registry
from fuseline.compile.tuning.kernels import tune_kernels

__all__ = ["small", "triton_interpreter"]
OP = '''
import torch
from torch import Tensor

from fuseline.compile.ops.library import Workload, op


def scale_inputs(make):
    yield make.normal(1, 5, 37), make.normal(37)
    yield make.normal(1, 3, 96)[..., :48], make.normal(48)


def scale_workloads(make, shape):
    for tokens in make.tokens:
        yield Workload(f"{tokens} rows", (make.fill(1, tokens, shape.hidden_size), make.fill(shape.hidden_size)))


@op(
    fake=lambda x, weight: torch.empty_like(x, memory_format=torch.contiguous_format),
    inputs=scale_inputs,
    tolerance=0.0,
    workloads=scale_workloads,
    weights=("weight",),
    sums=False,
)
def scale_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x[..., D] * weight[D]."""
    return (x * weight).contiguous()
'''
CPU = '''
from fuseline.compile.kernels.registry import Implementation, PlanCall
from fuseline.compile.ops import codes


def call(node):
    return PlanCall("binary", node.args, (codes.BINARY["mul"],), (1.0,))


IMPLEMENTATIONS = (Implementation("scale_rows", "binary", "cpu", call=call),)
'''
CUDA = '''
import torch

from fuseline.compile.kernels.registry import NATIVE, Implementation


def scale_rows(x, weight):
    return (x * weight).contiguous()


def is_half(x, weight):
    return x.dtype == weight.dtype and x.dtype.itemsize == 2


IMPLEMENTATIONS = (
    Implementation("scale_rows", "cuda.scale_rows", "cuda", scale_rows, supports=is_half, order=NATIVE, max_rows=16),
)
'''
TRITON = '''
import triton
import triton.language as tl

from fuseline.compile.kernels.registry import Implementation, tunings


def scale_rows(x, weight, *, block=64):
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(x.shape)
    grid = (rows.shape[0], triton.cdiv(x.shape[-1], block))
    scale_kernel[grid](out, rows, weight, rows.stride(0), D=x.shape[-1], BLOCK=block)
    return out


@triton.jit
def scale_kernel(out, x, weight, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < D).to(tl.float32)
    y = tl.load(x + row * stride + column, mask=column < D).to(tl.float32) * scale
    tl.store(out + row * D + column, y.to(out.dtype.element_ty), mask=column < D)


IMPLEMENTATIONS = (
    Implementation("scale_rows", "triton.scale_rows", "cuda", scale_rows, tunings=tunings("block", (32, 128), "b")),
)
'''
FILES = {"ops": OP, "kernels/cpu": CPU, "kernels/cuda": CUDA, "kernels/triton": TRITON}
"""Source by folder of compile/."""


@pytest.fixture(scope="module", autouse=True)
def scale(tmp_path_factory) -> Iterator[None]:
    """The four files lie in the folders of compile/ while these tests run."""
    packages = [importlib.import_module(f"fuseline.compile.{folder.replace('/', '.')}") for folder in FILES]
    root = tmp_path_factory.mktemp("compile")
    for folder, package in zip(FILES, packages, strict=True):
        path = root / folder / "scale.py"
        path.parent.mkdir(parents=True)
        path.write_text(FILES[folder])
        package.__path__.append(str(path.parent))
    forget()
    yield
    for package in packages:
        package.__path__.pop()
        sys.modules.pop(f"{package.__name__}.scale", None)
        vars(package).pop("scale", None)
    forget()


def forget() -> None:
    registry.cache_clear()
    implementations.cache_clear()


def graph(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.fx.GraphModule, torch.fx.Node]:
    """One call of the op; its weight is a constant."""
    made = torch.fx.Graph()
    x, weight = made.placeholder("x"), made.get_attr("weight")
    node = made.call_function(registry()["scale_rows"].target, (x, weight))
    made.output(node)
    for each, shape in ((x, (1, 3, 48)), (weight, (48,)), (node, (1, 3, 48))):
        each.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    return torch.fx.GraphModule({"weight": torch.ones(48, dtype=dtype)}, made), node


def test_it_is_four_files() -> None:
    assert len(FILES) == 4 and "scale_rows" in registry()
    assert all("scale_rows" in implementations(device) for device in ("cpu", "cuda"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kernel_agrees_with_the_reference(dtype: torch.dtype) -> None:
    """By the tests that all ops have."""
    op = registry()["scale_rows"]
    assert_kernels_agree(op, dtype)
    assert_fake_agrees(op)
    labels = []
    for kernel in implementations("cuda")["scale_rows"]:
        for args in (args for args in cases(op, dtype) if kernel.supports(*args)):
            for one in (kernel, *kernel.with_tunings(args)):
                assert_agrees(op, args, one.run)
                assert_lies_as_fake(op, args, one.run)
                labels.append(one.label)
    assert ("cuda.scale_rows" in labels) == (dtype != torch.float32)
    assert {"triton.scale_rows", "triton.scale_rows 32b", "triton.scale_rows 128b"} <= set(labels)


def test_it_is_chosen_on_both_targets() -> None:
    module, node = graph()
    assert plan_call(node, meta_value).kernel == "binary"
    call = OpCall.of(node, GPU)
    found = [one.label for one in Kernels(GPU, {}).candidates(call)]
    assert found == ["cuda.scale_rows", "triton.scale_rows", "triton.scale_rows 32b", "triton.scale_rows 128b"]
    executable = CudaExecutable(module, {"weight": torch.full((48,), 3.0).bfloat16()}, GPU)
    assert [kernel.label for kernel in executable.kernels.values()] == ["cuda.scale_rows | triton.scale_rows"]
    for rows in (2, 20):
        x = torch.randn(1, rows, 48).bfloat16()
        assert torch.equal(executable.run({"x": x}), x * 3)
    module, node = graph(torch.float32)
    assert Kernels(GPU, {}).find(node).label == "triton.scale_rows"


@pytest.mark.parametrize("is_invariant", (False, True))
def test_it_is_tuned(tmp_path, is_invariant: bool) -> None:
    """Its rows do not depend on each other, so that a choice is allowed where results must not depend on the batch."""
    module, node = graph()
    config = CompileConfig(
        model="none", level=3, cache_dir=str(tmp_path), max_num_seqs=20, max_num_batched_tokens=300,
        batch_invariant=is_invariant,
    )  # fmt: skip
    clock = Clock(lambda label, rows: 0.5 if label == "triton.scale_rows 128b" and rows > 8 else None)
    weights = {"weight": torch.ones(48).bfloat16()}
    tune_kernels(module, weights, config, GPU, lambda *_: None, clock, Kernels(GPU, {}))
    assert node.meta["choices"] == {"rows": [[8, "cuda.scale_rows"], [ANY, "triton.scale_rows 128b"]]}


def test_it_is_timed(small, capsys) -> None:
    arguments = ["bench", "kernels", "--shapes", "135m", "--ops", "scale_rows", "--repeats", "2", "--json"]
    assert with_threads(1, lambda: main(arguments)) == 0
    rows = json.loads(capsys.readouterr().out)["kernels"]
    assert [(row["op"], row["kernel"], row["label"]) for row in rows] == [
        ("scale_rows", "binary", f"{tokens} rows") for tokens in (1, 16, 256)
    ]  # fmt: skip
