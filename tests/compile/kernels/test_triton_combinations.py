"""Every Triton kernel compiles for all that its launchers can give it.

An interpreter takes a branch when a run does, the compiler takes both: an argument that is None must be neither read
nor computed with in any.
"""

from __future__ import annotations

import inspect

import pytest
import triton_cases
import triton_faulty_cases
import triton_interpreter
from triton_combinations import compile_combinations

from fuseline.compile.kernels.triton import attention, code_linear, fp8, latent_attention, linear

__all__ = ["triton_interpreter"]
BY_PRODUCTS = {"decode_kernel", "prefill_kernel"}
"""Their sums are of what a matrix product gives, which lies in one way."""


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return compile_combinations("triton_cases", 80, 90)


@pytest.mark.slow
def test_every_combination_compiles(entries):
    failed = [f"{e['kernel']} sm_{e['arch']} without {e['none']}: {e['error'][-300:]}" for e in entries if "error" in e]
    assert not failed, "\n".join(failed[:5])
    for stage in ("ttir", "llir"):
        assert {e["kernel"] for e in entries if e["stage"] == stage} == triton_cases.launched_kernels()


@pytest.mark.slow
def test_no_sum_has_an_order_of_its_launch(entries):
    """Sums of float32 are of two numbers at a time, and no product is fused with them."""
    adding = [e for e in entries if e.get("sums") and e["kernel"] not in BY_PRODUCTS]
    assert {e["kernel"] for e in adding} >= {"norm_kernel", "scan_kernel", "sample_kernel"}
    assert not [e for e in adding if e["sums"] != [2] or e["fused"]]


OVER_LAUNCHERS = (
    attention.attention, linear.linear_then_act_mul, code_linear.linear_code_rows_invariant, code_linear.linear_decoded,
    fp8.linear_fp8_invariant, latent_attention.latent_attention, latent_attention.write_latent,
)  # fmt: skip
"""Kernels of an op that call launchers and launch nothing themselves."""


def test_a_branch_that_only_a_run_decides_is_compiled():
    """Arguments that the launcher can leave out are found by its signature; one of four combinations is at fault."""
    entries = compile_combinations("triton_faulty_cases", 90)
    of_code = [e for e in entries if e["stage"] == "ttir"]
    assert sorted(e["none"] for e in of_code) == [[], ["by"], ["by", "only"], ["only"]]
    assert [e["none"] for e in of_code if "error" in e] == [["by"]]
    assert all("NoneType" in e["error"] or "has no attribute" in e["error"] for e in of_code if "error" in e)


def test_every_launcher_that_may_get_none_has_a_case():
    """By the signatures of the package's functions."""
    assert triton_faulty_cases.CASES[0].optional == ["by", "only"]
    cases = {case.launch for case in triton_cases.CASES}
    for module in triton_cases.modules():
        for function in vars(module).values():
            is_own = inspect.isfunction(function) and function.__module__ == module.__name__
            if is_own and function.__name__[0] != "_" and function not in OVER_LAUNCHERS:
                assert function in cases or not triton_cases.Case(function, dict, {}).optional, function
