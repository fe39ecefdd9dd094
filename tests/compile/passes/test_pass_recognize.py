"""Recognition: Transformers' spellings become ops with the same numbers; what only looks alike stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pass_cases import DTYPES, ROWS, Case, case
from torch import Tensor, nn

from fuseline.compile.ops import codes
from fuseline.compile.passes.clean import canonicalize, merge_equal, remove_noops
from fuseline.compile.passes.find_cat import find_cat
from fuseline.compile.passes.find_moe import find_moe
from fuseline.compile.passes.find_norm import find_norm
from fuseline.compile.passes.find_rope import find_rope
from fuseline.compile.passes.fuse_act_mul import fuse_act_mul
from fuseline.compile.passes.real_pairs import real_pairs

EPS = 1e-5
X = torch.randn(1, 5, 16)


def same_numbers(found: Case, before: object, **more: Tensor) -> None:
    after = found.run(**more)
    if isinstance(before, Tensor):
        before, after = (before,), (after,)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# norms


def normed(x: Tensor, dim: int = -1) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + EPS)


def llama(weight: Tensor, x: Tensor) -> Tensor:
    return weight * normed(x).to(x.dtype)


def olmo2(weight: Tensor, x: Tensor) -> Tensor:
    return (weight.float() * normed(x)).to(x.dtype)


def gemma(weight: Tensor, x: Tensor) -> Tensor:
    return (normed(x) * (1.0 + weight.float())).to(x.dtype)


class Weighted(nn.Module):
    def __init__(self, function: Callable, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.function = function

    def forward(self, x):
        return self.function(self.weight, x)


@DTYPES
@pytest.mark.parametrize(
    "function, mode",
    [(llama, codes.NORM_CAST_THEN_SCALE), (olmo2, codes.NORM_SCALE_THEN_CAST), (gemma, codes.NORM_ONE_PLUS)],
)
def test_each_order_of_casts_is_its_own_norm(function: Callable, mode: int, dtype: torch.dtype) -> None:
    found = case(Weighted(function), dtype, x=X)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_norm) == 1
    (norm,) = (n for n in found.graph.graph.nodes if n.op == "call_function")
    assert norm.target is torch.ops.fuseline.rms_norm.default and norm.args[2] == EPS
    # In fp32 casting before or after the product is the same; the code is the first that fits.
    assert dtype == torch.float32 or norm.args[3] == mode
    same_numbers(found, before)


def centered(weight: Tensor, x: Tensor) -> Tensor:
    wide = x.float()
    middle = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(middle.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight.float() * (middle * scale)).to(x.dtype)


@DTYPES
def test_a_norm_around_the_mean_is_a_layer_norm(dtype: torch.dtype) -> None:
    """Cohere's; torch's own sums in another order."""
    found = case(Weighted(centered), dtype, x=X)
    before, rounding = found.run(), 2 * torch.finfo(dtype).eps
    assert found.apply(remove_noops, canonicalize, merge_equal, find_norm) == 1
    assert found.ops() == {"layer_norm": 1}
    torch.testing.assert_close(found.run(), before, rtol=rounding, atol=rounding)


@DTYPES
def test_norms_without_weights_and_layer_norms(dtype: torch.dtype) -> None:
    def module(x):
        return normed(x).to(x.dtype) - F.layer_norm(x, (16,))

    found = case(module, dtype, x=X)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_norm) == 2
    assert found.ops()["rms_norm"] == 1 and found.ops()["layer_norm"] == 1
    same_numbers(found, before)


def over_tokens(weight: Tensor, x: Tensor) -> Tensor:
    return weight * normed(x, dim=1).to(x.dtype)


def with_fourth_powers(weight: Tensor, x: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def with_late_eps(weight: Tensor, x: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + EPS)).to(x.dtype)


def of_another_tensor(weight: Tensor, x: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide.sin() * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def two_plus(weight: Tensor, x: Tensor) -> Tensor:
    return (normed(x) * (2.0 + weight.float())).to(x.dtype)


def over_two_dims(weight: Tensor, x: Tensor) -> Tensor:
    return F.layer_norm(x, (5, 16)) + weight


@DTYPES
@pytest.mark.parametrize(
    "function", [over_tokens, with_fourth_powers, with_late_eps, of_another_tensor, two_plus, over_two_dims]
)
def test_what_is_nearly_a_norm_is_none(function: Callable, dtype: torch.dtype) -> None:
    found = case(Weighted(function), dtype, x=X)
    before = found.run()
    found.apply(remove_noops, canonicalize, find_norm)
    weighted = [n for n in found.graph.graph.nodes if "norm" in str(n.target) and n.args[1] is not None]
    assert not [n for n in weighted if "fuseline" in str(n.target)]
    same_numbers(found, before)


# rope

HEADS, TOKENS, DIM = 2, 5, 8
HEAD = torch.randn(1, HEADS, TOKENS, DIM)
POSITIONS = torch.tensor([[3, 4, 5, 20, 63]])
TOKEN_IDS = torch.tensor([[7, 1, 3, 3, 9]])


class Rope(nn.Module):
    """cos and sin of positions, then `turn(x, cos, sin)`."""

    def __init__(self, turn: Callable, columns: int = DIM // 2, repeats: int = 2, by_token: bool = False) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(columns))
        self.turn, self.repeats, self.by_token = turn, repeats, by_token

    def forward(self, x, positions, token_ids):
        at = token_ids if self.by_token else positions
        angles = at[:, :, None].float() * self.inv_freq.float()
        angles = torch.cat([angles] * self.repeats, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return self.turn(x, cos.unsqueeze(1), sin.unsqueeze(1)), (token_ids + 1)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def turn_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def turn_two_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turn_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((turn_half(x[..., :4], cos, sin), x[..., 4:]), dim=-1)


def rope_case(module: Rope, dtype: torch.dtype) -> Case:
    return case(module, dtype, x=HEAD, positions=POSITIONS, token_ids=TOKEN_IDS)


@DTYPES
@pytest.mark.parametrize(
    "turn, columns, repeats, rotary", [(turn_half, 4, 2, 8), (turn_two_halves, 4, 1, 8), (turn_part, 2, 2, 4)]
)
def test_rotations_become_lookups(turn: Callable, columns: int, repeats: int, rotary: int, dtype: torch.dtype) -> None:
    found = rope_case(Rope(turn, columns, repeats), dtype)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_rope) == 1
    (rope,) = (n for n in found.graph.graph.nodes if n.target is torch.ops.fuseline.rope.default)
    assert rope.args[4:] == (rotary, codes.ROPE_HALF)
    assert "aten.cos" not in found.ops()
    tables = found.results[-1].constants.values()
    assert [tuple(t.shape) for t in tables] == [(ROWS, columns * repeats)] * 2 and all(t.dtype == dtype for t in tables)
    same_numbers(found, before, rope_rows=POSITIONS[0])


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Cohere's, of tables as wide as the heads."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def turn_repeated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GLM-4's, which rotates a part and repeats half a line."""
    rotary = cos.shape[-1]
    cos, sin = (line[..., : rotary // 2].repeat_interleave(2, dim=-1) for line in (cos, sin))
    return torch.cat((turn_pairs(x[..., :rotary], cos, sin), x[..., rotary:]), dim=-1)


def turn_pairs_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek-V3's."""
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def turn_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek-V2's; float32."""
    half = cos.shape[-1] // 2
    turns = torch.polar(torch.ones_like(cos[..., :half]), torch.atan2(sin[..., :half], cos[..., :half]))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def turn_tokens_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Before tokens and heads change places, as Llama 4 does it."""
    cos, sin = (line.squeeze(1)[:, :, None, :] for line in (cos, sin))
    return turn_pairs(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)


@pytest.mark.parametrize(
    "turn, columns, rotary, layout, dtypes",
    [
        (turn_repeated_pairs, 2, 4, codes.ROPE_INTERLEAVED, "fp32 bf16"),
        (turn_pairs_to_halves, 4, 8, codes.ROPE_SPLIT, "fp32 bf16"),
        (turn_complex, 4, 8, codes.ROPE_INTERLEAVED, "fp32"),
    ],
)
def test_rotations_of_neighbours(turn: Callable, columns: int, rotary: int, layout: int, dtypes: str) -> None:
    for dtype in [d for d, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")) if name in dtypes]:
        found = rope_case(Rope(turn, columns), dtype)
        before = found.run()
        assert found.apply(remove_noops, real_pairs, canonicalize, merge_equal, find_rope) == 1
        (rope,) = (n for n in found.graph.graph.nodes if n.target is torch.ops.fuseline.rope.default)
        assert rope.args[4:] == (rotary, layout) and "aten.cos" not in found.ops()
        torch.testing.assert_close(found.run(rope_rows=POSITIONS[0]), before, rtol=0, atol=1e-6)


def turn_neighbours_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((x[..., 1::2], -x[..., ::2]), dim=-1).flatten(-2) * sin


def turn_pairs_of_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x.exp()[..., 1::2]
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


@DTYPES
@pytest.mark.parametrize("turn", [turn_neighbours_backwards, turn_pairs_of_two])
def test_what_is_nearly_a_rotation_of_neighbours_is_none(turn: Callable, dtype: torch.dtype) -> None:
    found = rope_case(Rope(turn), dtype)
    before = found.run()
    assert found.apply(remove_noops, real_pairs, canonicalize, merge_equal, find_rope) == 0
    same_numbers(found, before)


def turn_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def turn_unevenly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), dim=-1) * sin


def turn_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x.exp()) * sin


def turn_minus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - rotate_half(x) * sin


@DTYPES
@pytest.mark.parametrize("turn", [turn_backwards, turn_unevenly, turn_another, turn_minus])
def test_what_is_nearly_a_rotation_is_none(turn: Callable, dtype: torch.dtype) -> None:
    found = rope_case(Rope(turn), dtype)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_rope) == 0
    same_numbers(found, before)


@DTYPES
def test_angles_of_anything_but_positions_are_no_table(dtype: torch.dtype) -> None:
    found = rope_case(Rope(turn_half, by_token=True), dtype)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_rope) == 0
    same_numbers(found, before)


# concatenations and complex numbers


def filled(x: Tensor, y: Tensor, end: int, is_read_early: bool = False) -> Tensor:
    whole = x.new_empty(*x.shape[:-1], 24)
    whole[..., :16].copy_(x)
    early = whole.sum() if is_read_early else 0.0
    whole[..., 16:end].copy_(y[..., : end - 16])
    return whole[..., :end] * 2 + early


@DTYPES
def test_a_tensor_that_copies_fill_is_a_concatenation(dtype: torch.dtype) -> None:
    found = case(lambda x: filled(x, x[..., :8].exp(), 24), dtype, x=X)
    before = found.run()
    assert found.apply(remove_noops, find_cat) == 1
    assert found.ops()["aten.cat"] == 1 and not {"aten.new_empty", "aten.copy_"} & set(found.ops())
    same_numbers(found, before)


@pytest.mark.parametrize("options", [{"end": 20}, {"end": 24, "is_read_early": True}], ids=["a gap", "read early"])
def test_what_copies_fill_in_part_stays(options: dict) -> None:
    found = case(lambda x: filled(x, x[..., :8].exp(), **options)[..., :16], torch.float32, x=X)
    assert found.apply(remove_noops, find_cat) == 0 and found.ops()["aten.copy_"] == 2


def test_complex_numbers_that_pairs_cannot_express_stay() -> None:
    found = case(lambda x: torch.view_as_complex(x.reshape(5, 8, 2)).abs(), torch.float32, x=X)
    before = found.run()
    assert found.apply(remove_noops, real_pairs) == 0
    same_numbers(found, before)


# routers

LOGITS = torch.randn(6, 8)


def softmax_first(x: Tensor, is_normed: bool) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), 2, dim=-1)
    if is_normed:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * 1.5, ids


def softmax_last(x: Tensor) -> tuple[Tensor, Tensor]:
    top, ids = torch.topk(x, 2, dim=-1)
    return F.softmax(top, dim=1), ids


@DTYPES
@pytest.mark.parametrize(
    "function, args",
    [
        (lambda x: softmax_first(x, True), (codes.ROUTE_SOFTMAX_TOPK, 1)),
        (lambda x: softmax_first(x, False), (codes.ROUTE_SOFTMAX_TOPK, 0)),
        (softmax_last, (codes.ROUTE_TOPK_SOFTMAX, 0)),
    ],
    ids=["softmax_normed", "softmax", "topk_first"],
)
def test_routers(function: Callable, args: tuple[int, int], dtype: torch.dtype) -> None:
    found = case(function, dtype, x=LOGITS)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_moe) == 1
    (route,) = (n for n in found.graph.graph.nodes if n.target is torch.ops.fuseline.route_topk.default)
    assert route.args[1:4] == (2, *args)
    same_numbers(found, before)


def over_experts_first(x: Tensor) -> tuple[Tensor, Tensor]:
    top, ids = torch.topk(x, 2, dim=0)
    return F.softmax(top, dim=0), ids


def smallest(x: Tensor) -> tuple[Tensor, Tensor]:
    top, ids = torch.topk(x, 2, dim=-1, largest=False)
    return F.softmax(top, dim=1), ids


def probabilities_used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    p = F.softmax(x, dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(p, 2, dim=-1)
    return weights, ids + p.sum().long()


def normed_by_another_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(x, dim=-1, dtype=torch.float32), 2, dim=-1)
    total = weights.sum(-1, keepdim=True)
    return weights / (total * 2.0), ids


class Grouped(nn.Module):
    """DeepSeek-V3's router of 8 experts in 4 groups; `change` is a near miss."""

    def __init__(self, change: str = "", num_groups: int = 4) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(8))
        self.change, self.num_groups = change, num_groups

    def forward(self, x):
        scores = x.sigmoid() if self.change != "tanh" else x.tanh()
        choice = scores + self.bias
        if self.num_groups > 1:
            choice = choice.masked_fill(~self.mask(choice, x), -1.0 if self.change == "other mask" else float("-inf"))
        ids = torch.topk(choice, k=2, dim=-1, sorted=False)[1]
        weights = (choice if self.change == "weighed by choice" else scores).gather(1, ids)
        weights /= weights.sum(-1, keepdim=True) + 1e-20
        return weights * 2.5, ids

    def mask(self, choice: Tensor, x: Tensor) -> Tensor:
        grouped = (x if self.change == "groups by logit" else choice).view(-1, self.num_groups, 8 // self.num_groups)
        best = torch.topk(grouped.topk(2, dim=-1)[0].sum(-1), k=2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(grouped.topk(2, dim=-1)[0].sum(-1))
        mask.scatter_(1, best, 1)
        return mask.unsqueeze(-1).expand(-1, *grouped.shape[1:]).reshape(-1, 8).bool()


def limited_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's: the best expert of a group, masked by 0, weights as the top-k gives them."""
    scores = x.softmax(dim=-1, dtype=torch.float32)
    best = scores.view(-1, 4, 2).max(dim=-1).values
    mask = torch.zeros_like(best)
    mask.scatter_(1, torch.topk(best, k=2, dim=-1, sorted=False)[1], 1)
    outside = ~mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8).bool()
    weights, ids = torch.topk(scores.masked_fill(outside, 0.0), k=2, dim=-1, sorted=False)
    return weights * 3.0, ids


@pytest.mark.parametrize(
    "module, args",
    [
        (Grouped(), (codes.ROUTE_SIGMOID, 4, 2, 2, 1, 1e-20, 2.5)),
        (Grouped(num_groups=1), (codes.ROUTE_SIGMOID, 1, 1, 1, 1, 1e-20, 2.5)),
        (limited_softmax, (codes.ROUTE_SOFTMAX, 4, 2, 1, 0, 0.0, 3.0)),
    ],
    ids=["deepseek_v3", "one_group", "deepseek_v2"],
)
def test_routers_of_groups(module: nn.Module | Callable, args: tuple) -> None:
    found = case(module, torch.float32, x=LOGITS)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, merge_equal, find_moe) == 1
    (route,) = (n for n in found.graph.graph.nodes if n.target is torch.ops.fuseline.route_groups.default)
    assert route.args[2:-1] == (2, *args)
    assert set(found.ops()) == {"route_groups", "getitem"}, "nothing of the mask is left"
    same_numbers(found, before)


@pytest.mark.parametrize("change", ["tanh", "other mask", "weighed by choice", "groups by logit"])
def test_what_is_nearly_a_router_of_groups_is_none(change: str) -> None:
    found = case(Grouped(change), torch.float32, x=LOGITS)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, merge_equal, find_moe) == 0
    same_numbers(found, before)


@DTYPES
@pytest.mark.parametrize("function", [over_experts_first, smallest, probabilities_used_twice, normed_by_another_sum])
def test_what_is_nearly_a_router_is_none(function: Callable, dtype: torch.dtype) -> None:
    found = case(function, dtype, x=LOGITS)
    before = found.run()
    assert found.apply(remove_noops, canonicalize, find_moe) == 0
    same_numbers(found, before)


# gated products


@DTYPES
@pytest.mark.parametrize(
    "activation, code",
    [
        (F.silu, "silu"), (F.gelu, "gelu"), (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"), (F.relu, "relu"),
    ],
)  # fmt: skip
def test_gated_products(activation: Callable, code: str, dtype: torch.dtype) -> None:
    found = case(lambda gate, up: up * activation(gate), dtype, gate=X, up=X + 1)
    before = found.run()
    assert found.apply(fuse_act_mul) == 1
    (product,) = (n for n in found.graph.graph.nodes if n.op == "call_function")
    assert [str(a) for a in product.args[:2]] == ["gate", "up"] and product.args[2] == codes.UNARY[code]
    same_numbers(found, before)


def used_twice(gate: Tensor, up: Tensor) -> Tensor:
    active = F.silu(gate)
    return active * up + active


@DTYPES
@pytest.mark.parametrize(
    "function",
    [used_twice, lambda gate, up: F.silu(gate) * up[:, :1], lambda gate, up: torch.sigmoid(gate) * up,
     lambda gate, up: F.silu(gate) * 2.0 + up],
)  # fmt: skip
def test_what_is_nearly_a_gated_product_is_none(function: Callable, dtype: torch.dtype) -> None:
    found = case(function, dtype, gate=X, up=X + 1)
    before = found.run()
    assert found.apply(fuse_act_mul) == 0
    same_numbers(found, before)
