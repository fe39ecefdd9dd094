"""Products by cuBLASLt, on a stand-in that multiplies what the descriptions say, by columns as the library does."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
import torch

from fuseline.compile.kernels.external import cublaslt
from fuseline.compile.kernels.external.cublaslt import CublasLt, linear

NUMPY = {14: torch.bfloat16, 2: torch.float16}


@dataclass
class FakeLibrary:
    """The functions of cublasLt.h that are called, over memory of the host. It has `count` algorithms, the second of
    which wants a workspace."""

    count: int = 2
    made: list[object] = field(default_factory=list)
    used: list[tuple[int, int]] = field(default_factory=list)
    """(algorithm, bytes of workspace) of each product."""
    asked: dict[int, int] = field(default_factory=dict)

    def _make(self, out, value) -> int:
        self.made.append(value)
        out._obj.value = len(self.made)
        return 0

    def cublasLtCreate(self, out) -> int:
        return self._make(out, "handle")

    def cublasLtMatmulDescCreate(self, out, compute, scale) -> int:
        assert (compute.value, scale.value) == (68, 0)
        return self._make(out, {})

    def cublasLtMatmulDescSetAttribute(self, desc, attribute, value, size) -> int:
        assert size.value == 4
        self.made[desc.value - 1][attribute.value] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, out, dtype, rows, columns, ld) -> int:
        return self._make(out, (NUMPY[dtype.value], rows.value, columns.value, ld.value))

    def cublasLtMatmulPreferenceCreate(self, out) -> int:
        return self._make(out, "preference")

    def cublasLtMatmulPreferenceSetAttribute(self, preference, attribute, value, size) -> int:
        assert size.value == (8 if attribute.value == 1 else 4)
        self.asked[attribute.value] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference) -> int:
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, preference, most, results, count) -> int:
        count._obj.value = min(self.count, most.value)
        for k in range(count._obj.value):
            results[k].algorithm[0], results[k].workspace = k, 4096 * k
        return 0

    def cublasLtMatmul(
        self, handle, desc, one, a, a_layout, b, b_layout, zero, c, c_layout, d, d_layout, algorithm, workspace, size,
        stream,
    ) -> int:  # fmt: skip
        assert (one._obj.value, zero._obj.value, c.value, c_layout.value) == (1.0, 0.0, d.value, d_layout.value)
        left, right, out = (self._matrix(*at) for at in ((a, a_layout), (b, b_layout), (d, d_layout)))
        left = left.T if self.made[desc.value - 1].get(3) == 1 else left
        out.copy_((left.float() @ right.float()).to(out.dtype))
        self.used.append((algorithm[0], size.value))
        assert bool(workspace.value) == bool(size.value)
        return 0

    def _matrix(self, address, layout) -> torch.Tensor:
        dtype, rows, columns, ld = self.made[layout.value - 1]
        count = (columns - 1) * ld + rows
        numbers = torch.frombuffer((ctypes.c_uint16 * count).from_address(address.value), dtype=dtype)
        return numbers.as_strided((rows, columns), (1, ld))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lead", "strides"), [((5,), (48, 40)), ((2, 3), (40, 40)), ((1,), (40, 56))])
def test_a_product_is_that_of_linear(dtype, lead, strides):
    """Rows of x and of the weight may be further apart than they are long."""
    (x_stride, weight_stride), num_out = strides, 24
    x = torch.randn(*lead, x_stride, dtype=dtype)[..., :40]
    weight = torch.randn(num_out, weight_stride, dtype=dtype)[:, :40]
    library = FakeLibrary()
    torch.testing.assert_close(linear(CublasLt(library), x, weight), torch.nn.functional.linear(x, weight))
    assert library.used == [(0, 0)]


def test_a_tuning_is_a_place_among_the_guesses_and_they_are_asked_for_once():
    library = FakeLibrary(count=2)
    products, x, weight = CublasLt(library), torch.randn(3, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    for algorithm in (1, 0, 5):
        linear(products, x, weight, algorithm=algorithm)
    assert library.used == [(1, 4096), (0, 0), (1, 4096)]
    assert library.made.count("preference") == 1
    linear(products, x[:2], weight)
    assert library.made.count("preference") == 2, "guesses are those of a size"
    assert library.asked == {1: 32 << 20, 5: 16, 6: 16, 7: 16, 8: 16}


def test_what_it_does_not_take_goes_to_torch():
    library = FakeLibrary()
    products, weight = CublasLt(library), torch.randn(8, 16).bfloat16()
    columns = torch.randn(16, 4).bfloat16().T
    odd = torch.randn(4 * 16 + 1).bfloat16()[1:].view(4, 16)
    for x in (columns, odd, columns[:0]):
        assert torch.equal(linear(products, x, weight), torch.nn.functional.linear(x, weight))
    assert library.used == []
    supports = cublaslt.IMPLEMENTATIONS[0].supports
    assert supports(odd, weight) and supports(odd, weight, None)
    assert not supports(odd, weight, weight[0]) and not supports(odd.float(), weight.float())


def test_an_error_names_the_function():
    library = FakeLibrary(count=0)
    with pytest.raises(RuntimeError, match="no algorithm for"):
        linear(CublasLt(library), torch.randn(3, 16).bfloat16(), torch.randn(8, 16).bfloat16())
    library.cublasLtCreate = lambda out: 1
    with pytest.raises(RuntimeError, match="cublasLtCreate: status 1"):
        CublasLt(library)
