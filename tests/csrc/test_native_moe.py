"""route_topk and experts against Transformers' own routers and grouped_mm experts."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, isa, ops, pack, with_threads
from torch.nn import functional as F  # noqa: N812

__all__ = ["isa"]
SILU, GELU, GELU_TANH, RELU, GLU_OSS = range(5)
SOFTMAX_FIRST, TOPK_FIRST = 0, 1
ACTIVATIONS = {SILU: F.silu, GELU: F.gelu, GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), RELU: F.relu}


def route(logits, k, order, renormalize, dtype=None):
    weights = torch.full((len(logits), k), float("nan"), dtype=dtype or torch.float32)
    ids = torch.full((len(logits), k), -1)
    ops.route_topk(weights, ids, logits, order, int(renormalize))
    return weights, ids


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("renormalize", (False, True))
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2), (60, 4), (128, 8)])
def test_softmax_then_topk_is_mixtral_and_qwen3_moe(isa, dtype, renormalize, num_experts, k):
    logits = torch.randn(33, num_experts * 2).to(dtype)[:, :num_experts]
    weights, ids = route(logits, k, SOFTMAX_FIRST, renormalize)
    values, want = logits.float().softmax(-1).topk(k)
    if renormalize:
        values = values / values.sum(-1, keepdim=True)
    if dtype == torch.float32:
        assert torch.equal(ids, want)
    torch.testing.assert_close(weights, values, rtol=1e-6, atol=1e-7)
    rounded, _ = route(logits, k, SOFTMAX_FIRST, renormalize, dtype)
    assert torch.equal(rounded, weights.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_then_softmax_is_gpt_oss(isa, dtype):
    logits = torch.randn(20, 32).to(dtype)
    values = logits.topk(4).values.softmax(-1, dtype=dtype)
    weights, _ = route(logits, 4, TOPK_FIRST, False, dtype)
    torch.testing.assert_close(weights, values, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_ties_go_to_the_lowest_id(isa):
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, 1.0], [0.0] * 6])
    assert route(logits, 4, SOFTMAX_FIRST, True)[1].tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]


def gate(gate_up, act, alpha, limit):
    """The _apply_gate of Transformers: halves, or gpt-oss's clamped pairs."""
    if act != GLU_OSS:
        first, second = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[act](first) * second
    first, second = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (second + 1) * (first * torch.sigmoid(first * alpha))


def reference(x, ids, weights, gate_up, down, gate_up_bias, down_bias, act, alpha, limit):
    """integrations/moe.py grouped_mm_experts_forward, a pair at a time; products in double, then rounded."""
    pairs = torch.zeros(*ids.shape, x.shape[1], dtype=torch.promote_types(x.dtype, weights.dtype))
    for t, k in [(t, k) for t in range(len(x)) for k in range(ids.shape[1]) if ids[t, k] < len(gate_up)]:
        e = ids[t, k]
        hidden = (gate_up[e].double() @ x[t].double()).float().to(x.dtype)
        hidden = hidden if gate_up_bias is None else hidden + gate_up_bias[e]
        hidden = gate(hidden, act, alpha, limit)
        y = (down[e].double() @ hidden.double()).float().to(x.dtype)
        y = y if down_bias is None else y + down_bias[e]
        pairs[t, k] = y * weights[t, k, None]
    return pairs.sum(1).to(x.dtype)


class Layer:
    def __init__(self, num_experts=5, dim=70, hidden=45, dtype=torch.float32, bias=False, seed=0):
        gen = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=gen).to(dtype)

        self.dtype, self.hidden = dtype, hidden
        self.gate_up = randn(num_experts, 2 * hidden, dim) / dim**0.5 * 2
        self.down = randn(num_experts, dim, hidden) / hidden**0.5 * 2
        self.biases = (randn(num_experts, 2 * hidden), randn(num_experts, dim)) if bias else (None, None)
        self.panels = [torch.stack([pack(w) for w in weight]) for weight in (self.gate_up, self.down)]

    def inputs(self, num_tokens, k=2, weights_dtype=None):
        gen = torch.Generator().manual_seed(num_tokens)
        num_experts, _, dim = self.gate_up.shape
        x = torch.randn(num_tokens, dim, generator=gen).to(self.dtype)
        ids = torch.stack([torch.randperm(num_experts, generator=gen)[:k] for _ in range(num_tokens)])
        return x, ids, torch.rand(num_tokens, k, generator=gen).to(weights_dtype or self.dtype)

    def run(self, x, ids, weights, act=SILU, alpha=1.702, limit=1.5):
        out = torch.full_like(x, float("nan"))
        ops.experts(out, x, ids, weights, *self.panels, *self.biases, act, self.hidden, alpha, limit)
        return out

    def reference(self, x, ids, weights, act=SILU, alpha=1.702, limit=1.5):
        return reference(x, ids, weights, self.gate_up, self.down, *self.biases, act, alpha, limit)


@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("num_tokens", (1, 2, 40))
def test_fp32_experts(isa, act, bias, num_tokens):
    layer = Layer(bias=bias)
    inputs = layer.inputs(num_tokens)
    torch.testing.assert_close(layer.run(*inputs, act), layer.reference(*inputs, act), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", (SILU, GELU, GLU_OSS))
@pytest.mark.parametrize("weights_dtype", (torch.float32, torch.bfloat16))
def test_bf16_experts_round_where_transformers_does(isa, act, weights_dtype):
    layer = Layer(dtype=torch.bfloat16, bias=True)
    inputs = layer.inputs(30, 3, weights_dtype)
    ours, theirs = layer.run(*inputs, act), layer.reference(*inputs, act)
    # A sum of another order may cross a rounding border now and then; a rounding left out would move a tenth or more.
    assert (ours != theirs).float().mean() < 0.03
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_matches_transformers_grouped_mm(isa):
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = Layer(num_experts=4, dim=64, hidden=48, dtype=torch.bfloat16)
    config = MixtralConfig(hidden_size=64, intermediate_size=48, num_local_experts=4)
    theirs = MixtralExperts(config).to(torch.bfloat16)
    theirs.gate_up_proj.data, theirs.down_proj.data = layer.gate_up, layer.down
    inputs = layer.inputs(25, 2, torch.float32)
    with torch.no_grad():
        want = grouped_mm_experts_forward(theirs, *inputs)
    assert (layer.run(*inputs) != want).float().mean() < 0.03


def test_ids_that_are_no_expert_add_nothing(isa):
    layer = Layer()
    x, ids, weights = layer.inputs(6)
    ids[2, 1] = ids[4] = 5
    torch.testing.assert_close(layer.run(x, ids, weights), layer.reference(x, ids, weights), rtol=1e-5, atol=1e-5)


def test_only_touched_experts_are_read(isa):
    layer = Layer(num_experts=3)
    x, _, weights = layer.inputs(4)
    ids = torch.tensor([[0, 2]] * 4)
    want = layer.run(x, ids, weights)
    for panels in layer.panels:
        panels[1] = float("nan")
    assert torch.equal(layer.run(x, ids, weights), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_token_does_not_depend_on_its_batch_or_on_threads(isa, dtype):
    layer = Layer(num_experts=3, dim=600, hidden=530, dtype=dtype, bias=True)
    x, ids, weights = layer.inputs(400)
    whole = layer.run(x, ids, weights)
    assert torch.equal(whole, with_threads(2, lambda: layer.run(x, ids, weights)))
    for begin, end in [(0, 1), (399, 400), (5, 8), (100, 164), (250, 400)]:
        assert torch.equal(layer.run(x[begin:end], ids[begin:end], weights[begin:end]), whole[begin:end])


def test_more_tokens_than_fit_the_scratch(isa):
    layer = Layer(num_experts=2, dim=8000, hidden=20, dtype=torch.bfloat16)
    x, ids, weights = layer.inputs(700, 2)   # blocks hold 490 tokens
    whole = layer.run(x, ids, weights)
    assert torch.equal(layer.run(x[400:], ids[400:], weights[400:]), whole[400:])
