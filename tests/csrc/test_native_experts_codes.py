"""experts_codes on every instruction set: a token's bits depend on the token alone, and only its experts are read."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import any_isa, ops, with_threads

from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.experts_codes import random_experts
from fuseline.compile.ops.library import Make

__all__ = ["any_isa"]
DIM, HIDDEN, NUM, TOP_K = 600, 530, 4, 2
GLU_OSS = 4
LAYOUTS = [
    (("e2m1", 32, False), ("e2m1", 32, False)), (("int4", 128, True), ("int8", 64, True)),
    (("fp8", 128, False), ("fp8", 0, False)), (("int5", 32, False), ("uint5", 32, True)),
]  # fmt: skip


class Layer:
    def __init__(self, first: tuple, second: tuple) -> None:
        make = Make(torch.float16, torch.Generator().manual_seed(3))
        self.gate_up = random_experts(make, *first[:2], 2 * HIDDEN, DIM, first[2])
        self.down = random_experts(make, *second[:2], DIM, HIDDEN, second[2])
        self.biases = make.normal(NUM, 2 * HIDDEN), make.normal(NUM, DIM)
        self.numbers = first[1], KINDS[first[0]], second[1], KINDS[second[0]]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, float("nan"))
        ops.experts_codes(out, x, ids, weights, *self.gate_up, *self.down, *self.biases, GLU_OSS, HIDDEN,
                          *self.numbers, 1.702, 7.0)  # fmt: skip
        return out


def tokens(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, DIM, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(NUM, generator=generator)[:TOP_K] for _ in range(count)])
    return x, ids, torch.rand(count, TOP_K, generator=generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("first", "second"), LAYOUTS)
def test_a_token_does_not_depend_on_its_batch_or_on_threads(any_isa, first, second, dtype):
    layer, (x, ids, weights) = Layer(first, second), tokens(160, dtype)
    whole = layer.run(x, ids, weights)
    assert whole.isfinite().all()
    assert torch.equal(whole, with_threads(2, lambda: layer.run(x, ids, weights)))
    for begin, end in [(0, 1), (159, 160), (5, 8), (20, 60)]:
        part = with_threads(1 + begin % 2, lambda b=begin, e=end: layer.run(x[b:e], ids[b:e], weights[b:e]))
        assert torch.equal(part, whole[begin:end]), (begin, end)


def test_ids_that_are_no_expert_add_nothing_and_only_touched_experts_are_read(any_isa):
    layer, (x, _, weights) = Layer(*LAYOUTS[1]), tokens(4, torch.float32)
    want = layer.run(x, torch.tensor([[0, 2]] * 4), torch.cat((weights[:, :1], weights[:, 1:] * 0), 1))
    layer.gate_up[1][1:] = layer.down[1][1:] = float("nan")
    assert torch.equal(layer.run(x, torch.tensor([[0, NUM], [0, -1]] * 2), weights), want)
