"""Attention of Transformers' classes that do not call its attention interface, or hand a mask of their own to it.

While a model is exported these methods and functions stand for those of the modeling files that have their names; each
computes the same by one `attention` op. What a cache or a mask would need is ignored: capture uses neither.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fuseline.compile.capture import hf_experts
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.hf_model import SLOPES, attention_forward
from fuseline.compile.capture.kept_buffers import keep_buffers

SPREAD = "fuseline_spread"
"""Buffer [] of an MLP: the inverse of the normal distribution where its share of sparse gates lies."""
ROUNDED_SLOPES = "fuseline_rounded_slopes"
"""Buffer [H] of a module that adds a bias by key, not by distance: attention_forward does not see it."""


def bloom(self: nn.Module, hidden_states: Tensor, residual: Tensor, *unused: object, **more: object) -> tuple:
    heads = self._reshape(self.query_key_value(hidden_states))
    out, _ = attention_forward(self, *heads, None, self.inv_norm_factor)
    return self.dense(out.flatten(2)) + residual, None


def mpt(self: nn.Module, hidden_states: Tensor, *unused: object, **more: object) -> tuple:
    joined = self.Wqkv(hidden_states)
    if self.clip_qkv:
        joined = joined.clamp(-self.clip_qkv, self.clip_qkv)
    heads = [part.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for part in joined.chunk(3, 2)]
    out, _ = attention_forward(self, *heads, None, self.softmax_scale)
    return self.out_proj(out.flatten(2)), None


def falcon(
    self: nn.Module, hidden_states: Tensor, alibi: Tensor | None = None, position_embeddings: tuple | None = None,
    position_ids: Tensor | None = None, **unused: object,
) -> tuple:  # fmt: skip
    q, k, v = (part.transpose(1, 2) for part in _falcon_heads(self, self.query_key_value(hidden_states)))
    if alibi is None:
        q, k = _functions(self).apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        q, k = with_key_bias(q, k, _rounded_alibi(self, position_ids, hidden_states.dtype), 1.0)
    out, _ = attention_forward(self, q, k, v, None, self.inv_norm_factor)
    return self.dense(out.flatten(2)), None


def falcon_linear(self: nn.Module, input: Tensor) -> Tensor:
    """The product is rounded before the bias is added."""
    out = nn.functional.linear(input, self.weight)
    return out if self.bias is None else out + self.bias


def _falcon_heads(self: nn.Module, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T, H or K, D] each."""
    if self.new_decoder_architecture:
        groups = joined.unflatten(2, (self.num_kv_heads, -1, self.head_dim))
        return groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
    if self.multi_query:
        heads = joined.unflatten(2, (-1, self.head_dim))
        return heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, -1:]
    return joined.unflatten(2, (self.num_heads, 3, self.head_dim)).unbind(3)


def _rounded_alibi(self: nn.Module, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, T]: Falcon rounds slopes and biases to bf16, so that they are not those of distances."""
    slopes = getattr(self, ROUNDED_SLOPES).bfloat16()
    return (positions[..., None] * slopes).to(dtype).transpose(1, 2)


def with_key_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k with eight more numbers, by which bias[1, K, T] over `scale` is added to the product with a key."""
    tail = q.new_zeros(1, 1, 1, 7)
    ones = torch.full_like(q[..., :1], 1 / scale)
    q = torch.cat((q, ones, tail.expand(*q.shape[:-1], 7)), -1)
    return q, torch.cat((k, bias[..., None].to(k.dtype), tail.expand(*k.shape[:-1], 7)), -1)


def diffllama(
    self: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **unused: object
) -> tuple:
    """The two halves of the values side by side, so that each softmax is computed once."""
    q, k, v = _projected(self, hidden_states)
    q, k = _functions(self).apply_rotary_pos_emb(q, k, *position_embeddings)
    v = torch.cat(v.chunk(2, 1), -1).repeat(1, 2, 1, 1)
    out, _ = attention_forward(self, q, k, v, None, self.scaling)
    first, second = out.chunk(2, 2)
    one, other = (
        torch.exp((a * b).sum(-1, dtype=torch.float32)).to(q.dtype)
        for a, b in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
    )
    out = (1 - self.lambda_init) * self.groupnorm(first - (one - other + self.lambda_init) * second)
    return self.o_proj(out.flatten(2)), None


def doge(self: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **unused: object) -> tuple:
    """Of more than keep_window_size keys a query would see those of the largest biases; there are no more."""
    q, k, v = _projected(self, hidden_states)
    q, k = _functions(self).apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings)
    steps = nn.functional.softplus(self.dt_proj(v.transpose(1, 2).flatten(2)))
    q, k = with_key_bias(q, k, torch.exp(self.A * steps).transpose(1, 2), self.scaling)
    out, _ = attention_forward(self, q, k, v, None, self.scaling)
    return self.o_proj(out.flatten(2)), None


def _projected(self: nn.Module, hidden_states: Tensor) -> Iterator[Tensor]:
    """Queries, keys and values [1, H or K, T, D]."""
    shape = *hidden_states.shape[:-1], -1, self.head_dim
    return (one(hidden_states).view(shape).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj))


def gpt_neo(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None) -> tuple:
    window = self.config.window_size if self.attention_type == "local" else 0
    return _heads_first(self, query, key, value, 1.0, window), None


def gpt_neox_japanese(self: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None) -> tuple:
    return _heads_first(self, query, key, value, 1 / self.norm_factor), None


def openai_gpt(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, *unused: object) -> list[Tensor]:
    scale = 1 / math.sqrt(v.size(-1)) if self.scale else 1.0
    return [_heads_first(self, q, k.transpose(2, 3), v, scale)]


def _heads_first(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    return attention_forward(self, q, k, v, None, scale, sliding_window=window)[0].transpose(1, 2)


def of_bert(self: nn.Module, hidden_states: Tensor, *unused: object, **more: object) -> tuple:
    shape = self.num_attention_heads, self.attention_head_size
    q, k, v = (one(hidden_states).unflatten(2, shape).transpose(1, 2) for one in (self.query, self.key, self.value))
    out, _ = attention_forward(self, q, k, v, None)
    return out.flatten(2), None


def xglm(self: nn.Module, hidden_states: Tensor, **unused: object) -> tuple:
    q, k, v = _projected(self, hidden_states)
    out, _ = attention_forward(self, q, k, v, None, self.scaling)
    return self.out_proj(out.flatten(2)), None


def xglm_positions(self: nn.Module, position_ids: Tensor, *unused: object) -> Tensor:
    """The table is not extended: it has a row for each position of the context."""
    return nn.functional.embedding(position_ids + self.offset, self.weights)


def llama4_tables(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines [1, T, D] for pairs of neighbors, in place of complex numbers, and the positions themselves."""
    angles = (position_ids[..., None].float() * self.inv_freq.float()).repeat_interleave(2, -1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling, position_ids


def llama4(self: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, ...], **unused: object) -> tuple:
    """Transformers counts the positions of layers without rope from the first token of a call."""
    q, k, v = _projected(self, hidden_states)
    cos, sin, positions = position_embeddings
    if self.use_rope:
        q, k = (_turned_pairs(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))
    if hasattr(self, "qk_norm"):
        q, k = self.qk_norm(q), self.qk_norm(k)
    if self.attn_temperature_tuning and not self.use_rope:
        steps = torch.floor((positions.float() + 1.0) / self.floor_scale)
        q = (q * (torch.log1p(steps) * self.attn_scale + 1.0)[:, None, :, None]).to(q.dtype)
    out, _ = attention_forward(self, q, k, v, None, self.scaling)
    return self.o_proj(out.flatten(2)), None


def inkling(self: nn.Module, hidden_states: Tensor, attention_mask: Tensor, **unused: object) -> tuple:
    """A query has a bias for each distance; `attention_mask` is the tokens' positions (FUNCTIONS)."""
    shape = *hidden_states.shape[:-1], -1, self.head_dim
    q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    k = self.k_norm(self.k_sconv(self.k_proj(hidden_states)).view(shape)).transpose(1, 2)
    v = self.v_sconv(self.v_proj(hidden_states)).view(shape).transpose(1, 2)
    states = self.r_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
    relative = nn.functional.linear(states, self.rel_logits_proj.proj.mT).transpose(1, 2)
    floor = None if self.is_sliding else self.config.log_scaling_n_floor
    if floor is not None:
        steps = ((attention_mask + 1).float() / floor).clamp(min=1.0)
        factor = (1.0 + self.config.log_scaling_alpha * torch.log(steps))[:, None, :, None]
        q, relative = (q.float() * factor).to(q.dtype), (relative.float() * factor).to(relative.dtype)
    more = {"sliding_window": self.sliding_window, "relative": relative.float()}
    out, _ = attention_forward(self, q, k, v, None, self.scaling, **more)
    return self.o_proj(out.flatten(2)), None


def qwen4_exp(
    self: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *unused: object, **more: object
) -> tuple:  # fmt: skip
    """Of more than indexer_budget keys a query would see blocks that it chooses; there are no more."""
    q, gate = self.q_proj(hidden_states).unflatten(2, (-1, 2 * self.head_dim)).chunk(2, -1)
    k, v = (one(hidden_states).unflatten(2, (-1, self.head_dim)) for one in (self.k_proj, self.v_proj))
    q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
    q, k = _functions(self).apply_rotary_pos_emb(q, k, *position_embeddings)
    out, _ = attention_forward(self, q, k, v, None, self.scaling)
    return self.o_proj(out.flatten(2) * torch.sigmoid(gate.flatten(2))), None


def ngrams(self: nn.Module, *unused: object, **more: object) -> None:
    raise CaptureError(
        f"{type(self).__name__} reads a token together with those before it, which may be of an earlier step: that is "
        "not supported"
    )


def _turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    partner = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (wide * cos + partner * sin).to(x.dtype)


def gemma3n_sparse(self: nn.Module, inputs: Tensor) -> Tensor:
    mean, deviation = inputs.mean(-1, keepdim=True), torch.std(inputs, dim=-1, keepdim=True, unbiased=False)
    return nn.functional.relu(inputs - (mean + deviation * getattr(self, SPREAD)))


METHODS: dict[str, Callable] = {
    "bloom.BloomAttention.forward": bloom,
    "mpt.MptAttention.forward": mpt,
    "falcon.FalconAttention.forward": falcon,
    "falcon.FalconLinear.forward": falcon_linear,
    "diffllama.DiffLlamaAttention.forward": diffllama,
    "doge.DogeAttention.forward": doge,
    "gemma3n.Gemma3nTextMLP._gaussian_topk": gemma3n_sparse,
    "gpt_neo.GPTNeoSelfAttention._attn": gpt_neo,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention._attn": gpt_neox_japanese,
    "git.GitSelfAttention.forward": of_bert,
    "inkling.InklingAttention.forward": inkling,
    "llama4.Llama4TextRotaryEmbedding.forward": llama4_tables,
    "llama4.Llama4TextAttention.forward": llama4,
    **hf_experts.METHODS,
    "openai.Attention._attn": openai_gpt,
    "qwen4_exp.Qwen4ExpTextAttention.forward": qwen4_exp,
    "qwen4_exp.Qwen4ExpTextNGramEmbedding.forward": ngrams,
    "xglm.XGLMAttention.forward": xglm,
    "xglm.XGLMSinusoidalPositionalEmbedding.forward": xglm_positions,
}
"""By folder of Transformers, class and method."""
FUNCTIONS: dict[str, Callable] = {
    "git.GitModel.create_causal_mask": lambda *unused, **more: None,
    "inkling.InklingTextModel.create_causal_mask": lambda *unused, position_ids, **more: position_ids,
    "inkling.InklingTextModel.create_sliding_window_causal_mask": lambda *unused, position_ids, **more: position_ids,
    "mpt.MptAttention.create_causal_mask": lambda *unused, **more: torch.empty(0, device="meta"),
}
"""By folder and class, and the name of a function that the class's file calls."""
WITHOUT_NUMBER = ("openai.Attention", "gpt_neo.GPTNeoSelfAttention")
ALIBI = {
    "bloom.BloomAttention": SLOPES, "mpt.MptAttention": SLOPES, "falcon.FalconAttention": ROUNDED_SLOPES,
}  # fmt: skip
"""The name of the buffer of slopes, by folder and class."""


def prepare_attention(model: nn.Module) -> None:
    """Gives modules the number, chunk and slopes that the methods here and attention_forward need."""
    text = model.config.get_text_config()
    types, chunk = getattr(text, "layer_types", None) or (), getattr(text, "attention_chunk_size", None) or 0
    for number, module in enumerate(m for m in model.modules() if _name(type(m)) in WITHOUT_NUMBER):
        module.layer_idx = number
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if chunk and layer is not None and types[layer] == "chunked_attention":
            module.fuseline_chunk = chunk
        if _name(type(module)) == "gemma3n.Gemma3nTextMLP" and module.activation_sparsity > 0.0:
            _add_spread(module)
    if text.model_type != "falcon" or text.alibi:
        _add_slopes([module for module in model.modules() if _name(type(module)) in ALIBI])


def _add_spread(module: nn.Module) -> None:
    """So many deviations above the mean lies what Gemma 3n's share of gates is below: a constant, not computed here."""
    dtype, share = module.gate_proj.weight.dtype, torch.tensor(module.activation_sparsity, dtype=torch.float32)
    value = torch.distributions.Normal(0, 1).icdf(share).to(dtype)
    keep_buffers(module, {SPREAD: value})


def has_key_bias(model: nn.Module) -> bool:
    """Whether keys have a bias beside them (with_key_bias)."""
    names = {_name(type(module)) for module in model.modules()}
    return "doge.DogeAttention" in names or ("falcon.FalconAttention" in names and model.config.alibi)


def _add_slopes(modules: list[nn.Module]) -> None:
    """One tensor for all, so that layers stay alike."""
    if modules:
        heads = getattr(modules[0], "num_heads", None) or modules[0].n_heads
        values = {ALIBI[_name(type(modules[0]))]: alibi_slopes(heads)}
    for module in modules:
        keep_buffers(module, values)


def alibi_slopes(num_heads: int) -> Tensor:
    """[H] float32: P from 2^(-8/P) to 2^-8, P the largest power of two up to H; the others lie between them."""
    whole = 2 ** int(math.log2(num_heads))
    powers = [8 * n / whole for n in range(1, whole + 1)]
    powers += [4 * n / whole for n in range(1, 2 * (num_heads - whole), 2)]
    return (2.0 ** -torch.tensor(powers, dtype=torch.float64)).float()


def _name(of: type) -> str:
    """folder.Class of Transformers' own classes."""
    parts = of.__module__.split(".")
    return f"{parts[2]}.{of.__name__}" if parts[:2] == ["transformers", "models"] else ""


def _functions(module: nn.Module) -> object:
    """The modeling file of a module."""
    return sys.modules[type(module).__module__]


@contextmanager
def attention_as_ops(model: nn.Module) -> Iterator[None]:
    """METHODS and FUNCTIONS in place of the model's own, inside."""
    classes = {type(module) for module in model.modules()}
    swaps = [*_swaps(classes), *_without_indexers(classes)]
    try:
        for owner, name, _, new in swaps:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, original, _ in swaps:
            setattr(owner, name, original)


def _swaps(classes: set[type]) -> list[tuple[object, str, object, Callable]]:
    """(class or file, name, original, replacement)."""
    found = [(cls, key, new) for cls in classes for key, new in METHODS.items() if key.startswith(f"{_name(cls)}.")]
    found += [
        (sys.modules[cls.__module__], key, new)
        for cls in classes for key, new in FUNCTIONS.items() if key.startswith(f"{_name(cls)}.")
    ]  # fmt: skip
    named = [(owner, key.split(".")[2], new) for owner, key, new in found]
    return [(owner, name, vars(owner)[name], new) for owner, name, new in named if name in vars(owner)]


class _NoTensor:
    """A mask of which only parts are taken, or the choice of an indexer, that layers without one hand on."""

    def __getitem__(self, part: object) -> _NoTensor:
        return self


def _without_indexers(classes: set[type]) -> list[tuple[object, str, object, Callable]]:
    """Indexers choose nothing: all keys of a sequence of up to index_topk are seen."""
    found = []
    for cls in classes:
        file = sys.modules[cls.__module__]
        if _name(cls) and cls.__name__.endswith("Indexer") and "create_causal_mask" in vars(file):
            found.append((cls, "forward", vars(cls)["forward"], lambda *unused, **more: _NoTensor()))
            found.append((file, "create_causal_mask", file.create_causal_mask, lambda *unused, **more: _NoTensor()))
    return found
