"""Passes around recurrences: each gets a state, and what Mamba writes otherwise becomes ops that read rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pass_cases import DTYPES, case
from torch import Tensor, nn

from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.fuse_act_mul import fuse_act_mul
from fuseline.compile.passes.page_state import page_state
from fuseline.compile.specs import StateSpec
from fuseline.compile.target import Target

OPS = torch.ops.fuseline
TOKENS, SLOT = 9, 1
X = torch.randn(1, 24, TOKENS)


class Convolved(nn.Module):
    """Two convolutions, then a state space of heads over what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(24, 4)), nn.Parameter(torch.empty(24, 3))
        self.rate = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor) -> Tensor:
        x = OPS.causal_conv(OPS.causal_conv(x, self.first, None, 1), self.second, None, -1).mT
        x = x.unflatten(-1, (2, 12))
        return OPS.ssd_scan(x, x[..., 0].abs(), -self.rate.abs(), x[:, :, :1], x[:, :, 1:], None)


def metadata(states: list[Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {f"recurrent_state_{k}": state for k, state in enumerate(states)} | {
        "state_slots": torch.tensor([SLOT]),
        "seq_lens": torch.tensor([end], dtype=torch.int32),
        "query_start": torch.tensor([0, end - begin], dtype=torch.int32),
    }


@DTYPES
def test_each_recurrence_keeps_a_state_between_steps(dtype: torch.dtype) -> None:
    found = case(Convolved(), dtype, x=X)
    before = found.run()
    assert found.apply(page_state) == 3
    assert {"causal_conv_slots": 2, "ssd_scan_slots": 1}.items() <= found.ops().items()
    assert not {"causal_conv", "ssd_scan"} & set(found.ops())
    name = str(dtype).removeprefix("torch.")
    assert found.results[-1].specs == (
        StateSpec(0, (3, 24), name), StateSpec(1, (2, 24), name), StateSpec(2, (2, 1, 12, 16), "float32"),
    )  # fmt: skip
    states = [torch.full((3, *s.shape), 7.0, dtype=getattr(torch, s.dtype)) for s in found.results[-1].specs]
    whole, parts = found.inputs["x"], []
    for begin, end in ((0, 4), (4, 5), (5, TOKENS)):
        found.inputs["x"] = whole[..., begin:end]
        parts.append(found.run(**metadata(states, begin, end)))
    torch.testing.assert_close(torch.cat(parts, 1), before)
    assert all(bool((state[[0, 2]] == 7).all()) for state in states)


def test_a_gpu_has_none_yet() -> None:
    found = case(Convolved(), torch.float32, x=X)
    found.ctx = replace(found.ctx, target=Target("cuda", "", 1))
    with pytest.raises(ValueError, match="served on a CPU only"):
        found.apply(page_state)


class Left(nn.Module):
    """A weight on the left of its product, as Mamba's time steps have it."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(torch.empty(40, 16)), turned

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ (x.transpose(1, 2) if self.turned else x.flip(1))


@DTYPES
@pytest.mark.parametrize("turned", [True, False])
def test_a_product_from_the_left_is_a_linear(turned: bool, dtype: torch.dtype) -> None:
    x = torch.randn(1, TOKENS, 16) if turned else torch.randn(1, 16, TOKENS)
    found = case(Left(turned), dtype, x=x)
    before = found.run()
    assert found.apply(find_linear) == turned
    assert ("linear" in found.ops()) == turned
    after = found.run()
    assert after.shape == before.shape
    torch.testing.assert_close(after, before)


@DTYPES
def test_a_gate_that_lies_across_is_not_fused(dtype: torch.dtype) -> None:
    """The kernel reads rows."""
    for turned, matches in ((True, 0), (False, 1)):
        found = case(lambda gate, up: F.silu(gate) * up, dtype, gate=X, up=X + 1)
        for node in found.graph.graph.find_nodes(op="placeholder") if turned else ():
            node.meta["val"] = node.meta["val"].mT.contiguous().mT
        assert found.apply(fuse_act_mul) == matches
