"""Experts of Transformers' classes as ops of ours.

Where the op `experts` knows how a class gates its hidden states, a layer's experts are one op. Else each of their two
products is one (`expert_linear`), and what lies between and behind them is the class's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fuseline.compile.ops import codes

OPS = torch.ops.fuseline
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
               "ReLU": "relu"}  # fmt: skip


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """ExpertsInterface: x[T, D], ids and weights[T, K] -> [T, D]."""
    act = _gate_of(self)
    if act is None:
        return _by_products(self, hidden_states, top_k_index, top_k_weights)
    return OPS.experts(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj,
        self.gate_up_proj_bias if self.has_bias else None, self.down_proj_bias if self.has_bias else None,
        codes.EXPERT_ACTS[act], bool(self.is_transposed),
        float(getattr(self, "alpha", 0.0)), float(getattr(self, "limit", 0.0)),
    )  # fmt: skip


def _gate_of(experts: nn.Module) -> str | None:
    """The name of how experts gate their hidden states; None for a way that the op does not have."""
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        return None
    gate = type(experts)._apply_gate.__qualname__
    if gate == "_default_apply_gate":
        return ACTIVATIONS.get(type(experts.act_fn).__name__)
    return "glu_oss" if gate == "GptOssExperts._apply_gate" else None


def _by_products(self: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    first = "gate_up_proj" if self.has_gate else "up_proj"
    matrices = [(getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None)
                for name in (first, "down_proj")]  # fmt: skip
    gate = self._apply_gate if self.has_gate else self.act_fn
    out = _products(x, ids, matrices, gate, bool(self.is_transposed))
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    return _weighted(out, weights).to(x.dtype)


def _products(
    x: Tensor, ids: Tensor, matrices: Sequence[tuple[Tensor, Tensor | None]], gate: Callable[[Tensor], Tensor],
    is_transposed: bool = False,
) -> Tensor:  # fmt: skip
    """What each of a token's experts gives, [T * K, D]; zeros for ids of no expert."""
    (up, up_bias), (down, down_bias) = matrices
    hidden = gate(OPS.expert_linear(x, ids, up, up_bias, is_transposed).flatten(0, 1))
    return OPS.expert_linear(hidden, ids.reshape(-1, 1), down, down_bias, is_transposed)[:, 0]


def _weighted(out: Tensor, weights: Tensor) -> Tensor:
    """The sum [T, D] of out[T * K, D] times weights[T, K]."""
    return _sum_of_choices((out * weights.reshape(-1, 1)).unflatten(0, weights.shape))


def _sum_of_choices(out: Tensor) -> Tensor:
    """[T, K, D] -> [T, D], in the order of the choices: a row's bits depend on no other."""
    first, *others = out.unbind(1)
    return sum(others, first)


def longcat(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts behind the routed ones hand on what they get."""
    matrices = [(self.gate_up_proj, None), (self.down_proj, None)]
    out = _products(hidden_states, top_k_index, matrices, lambda hidden: _gated(hidden, self.act_fn))
    is_identity = (top_k_index >= self.num_routed_experts).to(top_k_weights.dtype)
    handed_on = hidden_states * (top_k_weights * is_identity).sum(-1, keepdim=True)
    return (_weighted(out, top_k_weights) + handed_on).to(hidden_states.dtype)


def dbrx(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The matrices of all experts are one below the other."""
    shape = -1, self.ffn_hidden_size, self.hidden_size
    w1, v1, w2 = (matrix.view(shape) for matrix in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    x, ids = hidden_states.reshape(-1, self.hidden_size), top_k_index
    first, second = (OPS.expert_linear(x, ids, matrix, None, False) for matrix in (w1, v1))
    hidden = (self.mlp.activation_fn(first) * second).flatten(0, 1)
    out = OPS.expert_linear(hidden, ids.reshape(-1, 1), w2, None, True)[:, 0]
    return _weighted(out, top_k_weights).view(hidden_states.shape)


def jetmoe(self: nn.Module, layer_input: Tensor) -> Tensor:
    weights, ids = _jetmoe_choice(self.router, layer_input)
    matrices = [(self.input_linear.weight, None), (self.output_linear.weight, None)]
    out = _products(layer_input.flatten(0, 1), ids, matrices, lambda hidden: _gated(hidden, self.activation))
    return _weighted(out, weights).view(layer_input.shape) + self.bias


def jetmoe_queries(self: nn.Module, layer_input: Tensor) -> tuple[Tensor, None, tuple[Tensor, Tensor]]:
    """The queries of each chosen expert, [1, T, K, D], and the choice, by which `jetmoe_outputs` goes."""
    weights, ids = _jetmoe_choice(self.router, layer_input)
    queries = OPS.expert_linear(layer_input.flatten(0, 1), ids, self.input_linear.weight, None, False)
    return queries[None], None, (weights, ids)


def jetmoe_outputs(self: nn.Module, layer_input: Tensor, choice: tuple[Tensor, Tensor]) -> Tensor:
    weights, ids = choice
    rows, matrix = layer_input.flatten(0, 2), self.output_linear.weight
    out = OPS.expert_linear(rows, ids.reshape(-1, 1), matrix, None, False)[:, 0]
    return _weighted(out, weights)[None] + self.bias


def _jetmoe_choice(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """weights and ids [T, K]."""
    best, ids = router.layer(x.flatten(0, 1)).float().topk(router.top_k, dim=1)
    return best.softmax(1).type_as(x), ids


def inkling_shared(self: nn.Module, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """Experts that every token is sent to, each with a weight."""
    x, gammas = hidden_states.flatten(0, 1), gammas.reshape(-1, self.n_shared_experts)
    ids = torch.arange(self.n_shared_experts, device=x.device).expand(gammas.shape)
    gate, up = (OPS.expert_linear(x, ids, matrix, None, False) for matrix in (self.gate_proj, self.up_proj))
    hidden = (self.act_fn(gate) * up * gammas[..., None]).flatten(0, 1)
    out = OPS.expert_linear(hidden, ids.reshape(-1, 1), self.down_proj, None, False).float()
    return _sum_of_choices(out.view(*gammas.shape, -1)).to(x.dtype).view(hidden_states.shape)


def _gated(hidden: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return act(gate) * up


def llama4_moe(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, None]:
    """Scores multiply what goes into an expert, not what comes out."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    logits, chosen = torch.topk(nn.functional.linear(x, self.router.weight), self.top_k, dim=1)
    out = self.shared_expert(x)
    for score, ids in zip(logits.float().sigmoid().to(x.dtype).split(1, 1), chosen.split(1, 1), strict=True):
        weights = self.experts.gate_up_proj, self.experts.down_proj, None, None
        settings = codes.EXPERT_ACTS["silu"], True, 0.0, 0.0
        out = out + OPS.experts(x * score, ids, torch.ones_like(score), *weights, *settings)
    return out, None


METHODS: dict[str, Callable] = {
    "dbrx.DbrxExperts.forward": dbrx,
    "inkling.InklingSharedExperts.forward": inkling_shared,
    "jetmoe.JetMoeMoE.forward": jetmoe,
    "jetmoe.JetMoeMoA.map": jetmoe_queries,
    "jetmoe.JetMoeMoA.reduce": jetmoe_outputs,
    "llama4.Llama4TextMoe.forward": llama4_moe,
    "longcat_flash.LongcatFlashExperts.forward": longcat,
}
"""By folder of Transformers, class and method."""
