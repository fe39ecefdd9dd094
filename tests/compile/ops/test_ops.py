"""Every op of the vocabulary: its native kernel against its reference, generated from the registry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_fixtures import FLOATS, isa
from ops_cases import assert_fake_agrees, assert_kernels_agree

from fuseline.compile.kernels.registry import implementations
from fuseline.compile.ops import codes
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.library import Op
from fuseline.compile.ops.registry import registry

__all__ = ["isa"]
# As captured; passes replace them before a kernel is chosen.
DENSE = {"attention", "causal_conv", "gated_delta", "ssd_scan", "selective_scan"}
# For a CPU passes replace the first two and head_linear, and make none of the others.
CUDA_ONLY = {
    "linear", "experts", "linear_act_mul", "linear_invariant", "experts_invariant", "paged_attention_invariant",
    "linear_code_rows", "linear_code_rows_invariant", "embedding_code_rows", "quantize_fp8", "rms_norm_fp8",
    "add_rms_norm_fp8", "linear_fp8", "linear_fp8_invariant", "head_linear", "paged_latent_attention_invariant",
    "expert_linear",
}  # fmt: skip
NATIVE = [op for name, op in sorted(registry().items()) if name in implementations("cpu")]


def name_of(op: Op) -> str:
    return op.name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", NATIVE, ids=name_of)
def test_kernels_agree_with_their_reference(isa, op, dtype):
    assert_kernels_agree(op, dtype)


@pytest.mark.parametrize("op", [op for op in registry().values() if op.inputs], ids=lambda op: op.name)
def test_fakes_agree_with_their_reference(op):
    assert_fake_agrees(op)


def test_every_op_is_tested_or_dense():
    assert {op.name for op in registry().values() if op.state} == DENSE - {"attention"}
    assert {op.name for op in registry().values() if op.inputs is None} == DENSE
    assert len(registry()) > 10
    assert set(registry()) - {op.name for op in NATIVE} == DENSE | CUDA_ONLY


def test_codes_are_those_of_the_kernels():
    """The same names in the same enums with the same values, whatever the spelling."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header().read_text(), flags=re.DOTALL)
    enums = {
        name: {plain(key): int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum (\w+) \{(.*?)\}", text, flags=re.DOTALL)
    }
    constants = {plain(key): value for key, value in vars(codes).items() if key.isupper() and isinstance(value, int)}
    assert enums["Unary"] == {plain(key): value for key, value in codes.UNARY.items()}
    assert enums["Binary"] == {plain(key): value for key, value in codes.BINARY.items()}
    experts = {plain(key): value for key, value in codes.EXPERT_ACTS.items()}
    assert {key.removeprefix("expert"): value for key, value in enums["ExpertAct"].items()} == experts
    assert {key.removeprefix("code"): value for key, value in enums["CodeKind"].items()} == KINDS
    caches = {"int8": "int8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
    found = {caches[key.removeprefix("cache")]: value for key, value in enums["CacheCode"].items()}
    assert found == codes.CACHES
    modes = enums["NormMode"] | enums["RopeLayout"]
    assert {key: constants[key] for key in modes} == modes
    assert (codes.ROUTE_SOFTMAX_TOPK, codes.ROUTE_TOPK_SOFTMAX) == tuple(enums["RouteOrder"].values())
    assert {key: constants[key] for key in enums["RouteScore"]} == enums["RouteScore"]


def plain(name: str) -> str:
    return name.replace("_", "").lower()


def header() -> Path:
    return Path(__file__).resolve().parents[3] / "csrc" / "include" / "fuseline" / "codes.h"
