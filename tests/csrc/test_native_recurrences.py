"""Recurrences: the bits of a sequence do not depend on how it is cut into steps, on its slot, or on other sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from native_fixtures import isa, with_threads
from ops_cases import run_native
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.registry import registry

__all__ = ["isa"]
TOKENS, SLOTS = 37, 4
NAN = float("nan")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def conv(width: int, bias: bool) -> tuple[list[Tensor], list[object]]:
    x, channels = normal(1, TOKENS, 75).mT, 75
    return [x], [normal(channels, width), normal(channels) if bias else None, codes.UNARY["silu"]]


def delta(by_row: bool) -> tuple[list[Tensor], list[object]]:
    heads = normal(1, TOKENS, 2, 24), normal(1, TOKENS, 2, 24) + 1, normal(1, TOKENS, 4, 40)
    decay = -normal(1, TOKENS, 4, *([24] if by_row else []), dtype=torch.float32).abs()
    return [*heads, decay, normal(1, TOKENS, 4).sigmoid()], [True]


def ssd() -> tuple[list[Tensor], list[object]]:
    b, c, rate = normal(1, TOKENS, 2, 20), normal(1, TOKENS, 2, 20) + 1, -normal(4, dtype=torch.float32).abs()
    return [normal(1, TOKENS, 4, 40), normal(1, TOKENS, 4).abs(), b, c], [rate, normal(4)]


def scan() -> tuple[list[Tensor], list[object]]:
    x, dt, b, c = normal(1, TOKENS, 40).mT, normal(1, TOKENS, 40).mT.abs(), normal(1, 5, TOKENS), normal(1, 5, TOKENS)
    return [x, dt, b, c], [-normal(40, 5, dtype=torch.float32).abs(), normal(40)]


CASES: dict[str, tuple[str, Callable]] = {
    "conv": ("causal_conv", lambda: conv(4, False)),
    "short conv": ("causal_conv", lambda: conv(3, True)),
    "delta": ("gated_delta", lambda: delta(False)),
    "delta by row": ("gated_delta", lambda: delta(True)),
    "ssd": ("ssd_scan", ssd),
    "scan": ("selective_scan", scan),
}
TOKEN_DIM = {"causal_conv": 2, "selective_scan": 2, "gated_delta": 1, "ssd_scan": 1}


class Layer:
    """A recurrence with its inputs, one sequence of TOKENS tokens, and dirty slots."""

    def __init__(self, case: str) -> None:
        name, make = CASES[case]
        self.dense, self.op = registry()[name], registry()[f"{name}_slots"]
        self.by_token, self.fixed = make()
        self.dim = TOKEN_DIM[name]
        shape, dtype = self.dense.state(*self.arguments(self.by_token))
        self.state = torch.full((SLOTS, *shape), NAN, dtype=dtype)

    def arguments(self, by_token: Sequence[Tensor]) -> list[object]:
        """In the order of the dense op."""
        by_token, fixed = list(by_token), list(self.fixed)
        if self.dense.name in ("ssd_scan", "selective_scan"):
            return [*by_token[:2], fixed[0], *by_token[2:], fixed[1]]
        return [*by_token, *fixed]

    def run(self, parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """One step: (slot, first token, end) of each of its sequences -> the outputs of each."""
        pieces = [[x.narrow(self.dim, begin, end - begin) for _, begin, end in parts] for x in self.by_token]
        given = dict(zip(self.dense.arguments, self.arguments([torch.cat(p, self.dim) for p in pieces]), strict=True))
        counts = [end - begin for _, begin, end in parts]
        given |= {
            "state": self.state,
            "slots": torch.tensor([slot for slot, _, _ in parts]),
            "seq_lens": torch.tensor([end for _, _, end in parts], dtype=torch.int32),
            "query_start": torch.tensor([0, *counts]).cumsum(0).int(),
        }
        args = tuple(given[name] for name in self.op.arguments)
        like = self.op.fake(*args)
        return list(run_native(self.op, args, [torch.empty_like(like)])[0].split(counts, self.dim))


@pytest.mark.parametrize("case", CASES)
def test_any_cut_and_any_neighbors_give_the_same_bits(isa: str, case: str) -> None:
    whole = Layer(case)
    (expected,) = whole.run([(1, 0, TOKENS)])
    assert bool(expected.isfinite().all()) and expected.float().std() > 0.01
    for cuts in ([1] * TOKENS, [2, 1, 20, 14], [3, 34]):
        layer, at, found = Layer(case), 0, []
        for count in cuts:
            others = [(0, 0, 5), (3, 0, 1)] if at % 2 else []
            *_, mine = with_threads(2, lambda a=at, n=count, o=others, one=layer: one.run([*o, (2, a, a + n)]))
            found.append(mine)
            at += count
        assert torch.equal(torch.cat(found, layer.dim), expected)
        assert torch.equal(layer.state[2], whole.state[1])


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_without_tokens_changes_nothing(isa: str, case: str) -> None:
    """Also one whose slot is not there."""
    layer = Layer(case)
    (expected,) = layer.run([(1, 0, 9)])
    kept = layer.state[1].clone()
    layer.run([(1, 9, 9), (SLOTS, 0, 2), (-1, 0, 2), (2, 0, 9)])
    assert torch.equal(layer.state[1], kept) and torch.equal(layer.state[2], kept)
