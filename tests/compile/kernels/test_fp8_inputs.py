"""fp8 by fp8 on a GPU: one pass for a norm and its quantization, torch's product, and the passes that bring them in."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import triton_interpreter
import zoo
from cuda_target_cases import count_kernels, decode_step
from fake_gpu import GPU
from native_fixtures import FLOATS
from ops_cases import as_bytes, assert_close, cases
from torch import fx

from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.external import scaled_mm
from fuseline.compile.kernels.registry import OpCall
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.kernels.triton import fp8, norm
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.registry import registry
from fuseline.compile.passes.fuse_norm_quant import fuse_norm_quant
from fuseline.compile.target import CPU, Target

__all__ = ["triton_interpreter"]
OPS = torch.ops.fuseline


def assert_same(found: tuple, want: tuple) -> None:
    for one, other in zip(found, want, strict=True):
        assert torch.equal(as_bytes(one), as_bytes(other))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_norm_and_its_quantization_are_those_of_two_kernels(dtype: torch.dtype) -> None:
    for x, weight, eps, mode in cases(registry()["rms_norm_fp8"], dtype):
        assert_same(fp8.rms_norm_fp8(x, weight, eps, mode), fp8.quantize_fp8(norm.rms_norm(x, weight, eps, mode)))
        y, total = norm.add_rms_norm(x, x.flip(-1), weight, eps, mode)
        assert_same(fp8.add_rms_norm_fp8(x, x.flip(-1), weight, eps, mode), (*fp8.quantize_fp8(y), total))


def test_codes_are_the_nearest_and_a_row_of_zeros_stays() -> None:
    x = torch.cat((torch.randn(4, 300, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 300)))
    assert_same(fp8.quantize_fp8(x), registry()["quantize_fp8"].reference(x))
    assert_same([part[:1] for part in fp8.quantize_fp8(x)], fp8.quantize_fp8(x[:1]))


def test_torchs_product_is_ours() -> None:
    found = [args for args in cases(registry()["linear_fp8"], torch.bfloat16) if scaled_mm._multiplies(*args)]
    assert found
    for args in found:
        assert_close(scaled_mm.linear_fp8(torch._scaled_mm, *args), registry()["linear_fp8"].reference(*args), 1.0)
    call = OpCall(OPS.linear_fp8.default, tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg
                                                for arg in found[0]), GPU)  # fmt: skip
    for product, is_taken in ((torch._scaled_mm, True), (lambda a, b, **named: a[:, :1] @ b[:1], False)):
        labels = [one.label for one in Kernels(GPU, {"torch._scaled_mm": product}).candidates(call)]
        assert ("torch._scaled_mm" in labels) == is_taken, "one that gives other results fails its trial"


def test_a_row_does_not_depend_on_the_others() -> None:
    *_, (x, x_scales, *rest) = cases(registry()["linear_fp8"], torch.bfloat16)
    whole = fp8.linear_fp8_invariant(x, x_scales, *rest)
    assert torch.equal(fp8.linear_fp8_invariant(x[:, 3:5], x_scales[:, 3:5], *rest), whole[:, 3:5])


def kernels_of(folder: Path, target: Target, **settings: object) -> dict[str, int]:
    config = CompileConfig(str(zoo.checkpoint("llama", "bfloat16")), cache_dir=str(folder), skip_model_check=True,
                           quantization="fp8", **settings)  # fmt: skip
    return count_kernels(optimize(config, target)[0].graph)


def test_inputs_are_quantized_where_they_are_asked_to(tmp_path: Path) -> None:
    """But the logits', whose norm stays a norm. GPUs without products of fp8 keep plain inputs."""
    found = kernels_of(tmp_path, GPU, activation_dtype="fp8")
    wanted = {"triton.rms_norm_fp8": 1, "triton.add_rms_norm_fp8": 5, "triton.add_rms_norm": 1,
              "triton.quantize_fp8": 6, "triton.linear_fp8": 12}  # fmt: skip
    assert {label: found[label] for label in wanted} == wanted
    assert sum(count for label, count in found.items() if "linear_code_rows" in label) == 1
    for target, settings in ((GPU, {}), (Target("cuda", "sm_80", 1, tensors="cpu"), {"activation_dtype": "fp8"})):
        assert not any("_fp8" in label for label in kernels_of(tmp_path, target, **settings))


def test_logits_are_near_those_of_plain_inputs(tmp_path: Path) -> None:
    step, found = decode_step([3, 20, 1]), []
    for activations in ("fp8", "auto"):
        config = CompileConfig(str(zoo.checkpoint("llama", "bfloat16")), cache_dir=str(tmp_path), quantization="fp8",
                               skip_model_check=True, activation_dtype=activations)  # fmt: skip
        model = compile_model(config, GPU)
        model.allocate_caches([16])
        found.append(model.run(step).logits.float())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert 0 < error < 0.15, "three bits of a fraction, twelve times"


@pytest.mark.parametrize(("target", "level"), [(CPU, 1), (GPU, 0)])
def test_where_inputs_cannot_be_quantized_it_is_refused(target: Target, level: int) -> None:
    config = CompileConfig(str(zoo.checkpoint("llama")), skip_model_check=True, activation_dtype="fp8", level=level)
    with pytest.raises(CaptureError, match="--activation-dtype fp8 is for a GPU, from -O1 on"):
        optimize(config, target)


@pytest.mark.parametrize("read_elsewhere", (False, True))
@pytest.mark.parametrize("has_residual", (False, True))
def test_a_norm_that_something_else_reads_stays(has_residual: bool, read_elsewhere: bool) -> None:
    """As a router of experts does."""
    x = Make(torch.float32, torch.Generator().manual_seed(0)).normal(1, 3, 32)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x.to("meta")

    def call(target: object, *args: object) -> fx.Node:
        made = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
        made.meta["val"] = target(*values)
        return made

    if has_residual:
        both = call(OPS.add_rms_norm.default, node, node, None, 1e-5, 0)
        y, rest = call(operator.getitem, both, 0), [call(operator.getitem, both, 1)]
    else:
        y, rest = call(OPS.rms_norm.default, node, None, 1e-5, 0), []
    whole = call(OPS.quantize_fp8.default, y)
    parts = (call(operator.getitem, whole, k) for k in range(2))
    graph.output((*parts, *rest, *((y,) if read_elsewhere else ())))
    module = fx.GraphModule({}, graph)
    want = module(x)
    result = fuse_norm_quant(module, None)
    module.recompile()
    assert result.matches == (not read_elsewhere)
    assert_same(module(x), want)
