"""Every call of a Triton launcher that makes another kernel of it: what may be None, dtypes, flags, sizes of one.

A case builds all arguments of a launcher, tensors on meta, by name. Its parameters are axes whose values are named
beside it; each parameter of the launcher that may be a tensor or None is an axis by itself, so that one which is added
there is tried here. Whatever may be None is tried in the whole product with all flags, over a few types; types and
sizes meet every other value in pairs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from triton.runtime import jit

from fuseline.compile.graph_inputs import padding
from fuseline.compile.kernels import triton as kernels
from fuseline.compile.kernels.triton import (
    activation,
    attention,
    batch,
    blocks,
    code_linear,
    experts,
    fp8,
    head_linear,
    latent_attention,
    linear,
    matmul,
    norm,
    rope,
    route,
    route_groups,
    rows,
    sampling,
)
from fuseline.compile.ops import codes
from fuseline.compile.ops.activation import ACTIVATIONS
from fuseline.compile.ops.code_rows import row_words
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.linear_codes import EIGHT_BITS

FLOATS = (torch.bfloat16, torch.float32, torch.float16)
INTS = (torch.int32, torch.int64)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIZES = ("some", "ones")


@dataclass(frozen=True)
class Case:
    launch: Callable
    arguments: Callable[..., dict[str, object]]
    axes: dict[str, Sequence]
    least: int = 80
    """First arch that has its types."""

    @property
    def optional(self) -> list[str]:
        """Parameters of the launcher that may be a tensor or None."""
        parameters = inspect.signature(self.launch).parameters.values()
        return [p.name for p in parameters if {part.strip() for part in str(p.annotation).split("|")} >= OPTIONAL]

    def choices(self, arch: int) -> dict[str, Sequence]:
        axes = self.axes | {name: (True, False) for name in self.optional}
        if arch < 89 and "cache" in axes:
            axes["cache"] = [dtype for dtype in axes["cache"] if dtype != E4M3]
        return axes

    def whole(self, arch: int) -> Iterator[dict[str, object]]:
        """All combinations of what may be None, of flags, and of the kinds of caches."""
        axes = self.choices(arch)
        if arch < self.least:
            return
        for name in NUMBERS:
            axes |= {name: axes[name][:1]} if name in axes else {}
        if "cache" in axes:
            axes["cache"] = [dtype for dtype in axes["cache"] if dtype.itemsize == 1 or dtype in axes["dtype"]]
        yield from products(axes)

    def pairs(self, arch: int) -> Iterator[dict[str, object]]:
        """Choices in which every two values of two axes occur together, few of the product of all axes."""

        def of(choice: dict[str, object]) -> set[tuple]:
            return set(itertools.combinations(choice.items(), 2)) or set(choice.items())

        all_of_them = list(products(self.choices(arch)))
        left = set().union(*map(of, all_of_them))
        while left:
            best = max(all_of_them, key=lambda choice: len(of(choice) & left))
            left -= of(best)
            yield best

    def run(self, choice: dict[str, object]) -> None:
        found = self.arguments(**{name: choice[name] for name in self.axes})
        self.launch(**found | {name: None for name in self.optional if not choice[name]})


OPTIONAL = {"Tensor", "None"}
NUMBERS = ("dtype", "ints", "sizes", "to", "table")
"""Axes that change types and numbers: of one value in the whole product."""
CASES: list[Case] = []


def case(launch: Callable, least: int = 80, **axes: Sequence) -> Callable:
    def add(arguments: Callable[..., dict[str, object]]) -> Callable:
        CASES.append(Case(launch, arguments, axes, least))
        return arguments

    return add


def products(axes: dict[str, Sequence]) -> Iterator[dict[str, object]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def modules() -> list[ModuleType]:
    """Modules of the package of kernels."""
    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    return [importlib.import_module(info.name) for info in found]


def launched_kernels() -> set[str]:
    """Names of all that the package of kernels launches: what is written `kernel[grid](...)` there."""
    found = set()
    for module in modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                value = getattr(module, getattr(node.func.value, "id", ""), None)
                found |= {value.__name__} if isinstance(value, jit.KernelInterface) else set()
    return found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lines(dtype: torch.dtype, sizes: str) -> Tensor:
    return meta(3, 5, 48, dtype=dtype)[..., :40] if sizes == "some" else meta(1, 1, 1, dtype=dtype)


@case(norm.rms_norm, dtype=FLOATS, mode=(0, 1, 2), sizes=SIZES)
def rms_norm(dtype: torch.dtype, mode: int, sizes: str) -> dict[str, object]:
    x = lines(dtype, sizes)
    return {"x": x, "weight": meta(x.shape[-1], dtype=dtype), "eps": 1e-5, "mode": mode}


@case(norm.add_rms_norm, dtype=FLOATS, mode=(0, 1, 2), sizes=SIZES)
def add_rms_norm(dtype: torch.dtype, mode: int, sizes: str) -> dict[str, object]:
    return {**rms_norm(dtype, mode, sizes), "residual": lines(dtype, sizes)}


@case(norm.layer_norm, dtype=FLOATS, sizes=SIZES)
def layer_norm(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    x = lines(dtype, sizes)
    return {"x": x, "eps": 1e-5, **{name: meta(x.shape[-1], dtype=dtype) for name in ("weight", "bias")}}


@case(norm.add_layer_norm, dtype=FLOATS, sizes=SIZES)
def add_layer_norm(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    return {**layer_norm(dtype, sizes), "residual": lines(dtype, sizes)}


@case(activation.act_mul, dtype=FLOATS, act=tuple(ACTIVATIONS), sizes=SIZES)
def act_mul(dtype: torch.dtype, act: int, sizes: str) -> dict[str, object]:
    return {"gate": lines(dtype, sizes), "up": lines(dtype, sizes), "act": act}


@case(rows.gather_rows, dtype=FLOATS, ints=INTS, sizes=SIZES)
def gather_rows(dtype: torch.dtype, ints: torch.dtype, sizes: str) -> dict[str, object]:
    shape = (7, 40) if sizes == "some" else (1, 1)
    return {"x": meta(*shape, dtype=dtype), "rows": meta(shape[0], dtype=ints)}


@case(
    route.route_topk, dtype=FLOATS, order=(0, 1), renormalize=(False, True), to=(torch.bfloat16, torch.float32),
    sizes=SIZES,
)  # fmt: skip
def route_topk(dtype: torch.dtype, order: int, renormalize: bool, to: torch.dtype, sizes: str) -> dict[str, object]:
    tokens, num_experts, k = (5, 6, 3) if sizes == "some" else (1, 1, 1)
    logits = meta(tokens, num_experts, dtype=dtype)
    return {"logits": logits, "k": k, "order": order, "renormalize": int(renormalize), "dtype": to}


@case(
    route_groups.route_groups, dtype=FLOATS, score=(0, 1), groups=((1, 1, 1), (3, 2, 2)), renormalize=(False, True),
    to=(torch.bfloat16, torch.float32), sizes=SIZES,
)  # fmt: skip
def among_groups(
    dtype: torch.dtype, score: int, groups: tuple[int, int, int], renormalize: bool, to: torch.dtype, sizes: str
) -> dict[str, object]:
    tokens, num_experts, k = (5, 6, 3) if sizes == "some" else (1, 1, 1)
    count, kept, best = groups if sizes == "some" else (1, 1, 1)
    return {
        "logits": meta(tokens, num_experts, dtype=dtype), "bias": meta(num_experts, dtype=torch.float32), "k": k,
        "score": score, "num_groups": count, "top_groups": kept, "group_best": best, "renormalize": int(renormalize),
        "epsilon": 1e-20, "scale": 2.5, "dtype": to,
    }  # fmt: skip


@case(head_linear.head_linear, dtype=FLOATS, sizes=SIZES)
def of_heads(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    heads, tokens, num_out, num_in = (3, 5, 40, 24) if sizes == "some" else (1, 1, 1, 1)
    return {
        "x": meta(1, tokens, heads, num_in, dtype=dtype).transpose(1, 2),
        "weight": meta(heads, num_out, num_in, dtype=dtype),
    }  # fmt: skip


@case(linear.linear, dtype=FLOATS, sizes=SIZES)
def few_rows(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    num_rows, num_out, num_in = (3, 40, 24) if sizes == "some" else (1, 1, 1)
    return {
        "x": meta(num_rows, num_in, dtype=dtype), "weight": meta(num_out, num_in, dtype=dtype),
        "bias": meta(num_out, dtype=dtype),
    }  # fmt: skip


@case(matmul.matmul, dtype=FLOATS, sizes=SIZES)
def product(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    return few_rows(dtype, sizes)


CODES = {"kind": tuple(KINDS[name] for name in ("int8", "fp8", "int4"))}


def coded(dtype: torch.dtype, kind: int, group: int, sizes: str) -> dict[str, object]:
    """A weight of codes."""
    num_out, num_in = (40, 200) if sizes == "some" else (1, 1)
    scales = meta(-(-num_in // group) if group else 1, 48, dtype=dtype)
    words = meta(num_out, row_words(num_in, 8 if kind in EIGHT_BITS else 4), dtype=torch.int32)
    return {"codes": words, "scales": scales, "zeros": scales, "table": meta(16), "group": group, "kind": kind}


@case(code_linear.linear_code_rows, dtype=FLOATS, sizes=SIZES, group=(0, 32, 128), **CODES)
def code_rows(dtype: torch.dtype, sizes: str, group: int, kind: int) -> dict[str, object]:
    weight = coded(dtype, kind, group, sizes)
    num_out, num_in = (40, 200) if sizes == "some" else (1, 1)
    x, order = meta(20 if sizes == "some" else 1, num_in, dtype=dtype), meta(num_in, dtype=torch.int64)
    return weight | {"x": x, "order": order, "bias": meta(num_out, dtype=dtype)}


@case(code_linear.embedding_code_rows, dtype=FLOATS, sizes=SIZES, group=(0, 32), **CODES)
def embedding(dtype: torch.dtype, sizes: str, group: int, kind: int) -> dict[str, object]:
    ids = meta(3 if sizes == "some" else 1, dtype=torch.int64)
    return coded(dtype, kind, group, sizes) | {"ids": ids, "num_in": 200 if sizes == "some" else 1}


@case(code_linear.decode, dtype=FLOATS, sizes=SIZES, group=(0, 32), **CODES)
def decoded(dtype: torch.dtype, sizes: str, group: int, kind: int) -> dict[str, object]:
    out = meta(*((8, 200) if sizes == "some" else (1, 1)), dtype=dtype)
    return coded(dtype, kind, group, sizes) | {"out": out, "begin": 0}


@case(fp8.linear_fp8, least=89, group=(0, 128), to=(torch.bfloat16, torch.float32), sizes=SIZES)
def by_fp8(group: int, to: torch.dtype, sizes: str) -> dict[str, object]:
    rows, num_out, num_in = (20, 40, 208) if sizes == "some" else (1, 1, 16)
    return {
        "x": meta(rows, num_in, dtype=E4M3), "x_scales": meta(rows, 1), "bias": meta(num_out, dtype=to),
        "codes": meta(num_out, num_in // 4, dtype=torch.int32), "scales": meta(2 if group else 1, 48), "group": group,
        "dtype": to,
    }  # fmt: skip


@case(fp8.quantize_fp8, dtype=FLOATS, sizes=SIZES)
def quantize(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    return {"x": lines(dtype, sizes)}


@case(fp8.rms_norm_fp8, dtype=FLOATS, mode=(0, 1, 2), sizes=SIZES)
def rms_norm_fp8(dtype: torch.dtype, mode: int, sizes: str) -> dict[str, object]:
    return rms_norm(dtype, mode, sizes)


@case(fp8.add_rms_norm_fp8, dtype=FLOATS, mode=(0, 1, 2), sizes=SIZES)
def add_rms_norm_fp8(dtype: torch.dtype, mode: int, sizes: str) -> dict[str, object]:
    return add_rms_norm(dtype, mode, sizes)


@case(linear.linear_act_mul, dtype=FLOATS, act=tuple(ACTIVATIONS), sizes=SIZES)
def linear_act_mul(dtype: torch.dtype, act: int, sizes: str) -> dict[str, object]:
    x = few_rows(dtype, sizes)["x"]
    num_out = 40 if sizes == "some" else 2
    return {"x": x, "weight": meta(num_out, x.shape[1], dtype=dtype), "bias": meta(num_out, dtype=dtype), "act": act}


@case(
    experts.experts, dtype=FLOATS, act=tuple(codes.EXPERT_ACTS.values()), transposed=(False, True), ints=INTS,
    sizes=("some", "many", "ones"),
)  # fmt: skip
def mix(dtype: torch.dtype, act: int, transposed: bool, ints: torch.dtype, sizes: str) -> dict[str, object]:
    tokens, k, num_experts, dim, hidden = {
        "some": (5, 2, 4, 40, 24), "many": (70, 1, 2, 40, 24), "ones": (1, 1, 1, 1, 1),
    }[sizes]  # fmt: skip
    first, second = (dim, 2 * hidden), (hidden, dim)
    if not transposed:
        first, second = first[::-1], second[::-1]
    return {
        "x": meta(tokens, dim, dtype=dtype), "ids": meta(tokens, k, dtype=ints),
        "weights": meta(tokens, k, dtype=dtype),
        "gate_up": meta(num_experts, *first, dtype=dtype), "down": meta(num_experts, *second, dtype=dtype),
        "gate_up_bias": meta(num_experts, 2 * hidden, dtype=dtype), "down_bias": meta(num_experts, dim, dtype=dtype),
        "act": act, "transposed": transposed, "alpha": 1.702, "limit": 7.0,
    }  # fmt: skip


CACHED = (torch.bfloat16, torch.float32, torch.float16, E5M2, E4M3, torch.uint8)
"""Dtypes of caches; before sm_89 the launchers give e4m3 to kernels as bytes."""
HEADS = {
    "some": (4, 2, 16, 16, 16), "rest": (6, 2, 40, 24, 16), "wide": (4, 2, 16, 136, 16), "ones": (1, 1, 1, 1, 1)
}  # fmt: skip
"""Query heads, kv heads, key dim, value dim, keys a block."""


@case(
    attention.paged_attention, dtype=FLOATS, cache=CACHED, window=(0, 5), softcap=(0.0, 3.0),
    step=("decode", "long", "mixed", "invariant"), sizes=tuple(HEADS),
)  # fmt: skip
def attend(
    dtype: torch.dtype, cache: torch.dtype, window: int, softcap: float, step: str, sizes: str
) -> dict[str, object]:
    heads, kv_heads, key_dim, value_dim, block = HEADS[sizes]
    tokens, seqs = (1, 1) if sizes == "ones" else (4, 4) if step in ("decode", "long") else (9, 2)
    columns = 1 if sizes == "ones" else -(-1024 // block) if step == "long" else 3
    one = meta(1)
    return {
        "out": meta(1, tokens, heads, value_dim, dtype=dtype),
        "q": meta(1, tokens, heads, key_dim, dtype=dtype).transpose(1, 2),
        "k_cache": meta(64, kv_heads, block, key_dim, dtype=cache),
        "v_cache": meta(64, kv_heads, block, value_dim, dtype=cache),
        "block_table": meta(seqs, columns, dtype=torch.int32), "seq_lens": meta(seqs, dtype=torch.int32),
        "query_start": meta(seqs + 1, dtype=torch.int32), "sinks": meta(heads, dtype=dtype), "window": window,
        "scale": 0.3, "softcap": softcap, "k_scale": one, "v_scale": one, "slopes": meta(heads),
        "chunk": window if dtype == torch.float16 else 0,
        "prefill_from": int(step == "invariant"),
    }  # fmt: skip


ROPE_SIZES = {"some": (4, 2, 16, 16), "rest": (3, 1, 24, 12), "ones": (1, 1, 2, 2)}
"""Query heads, kv heads, dim, of which are rotated."""


@case(rope.rope, dtype=FLOATS, table=(None, torch.float32), layout=(0, 1, 2), half=(False, True), ints=INTS,
      sizes=tuple(ROPE_SIZES))  # fmt: skip
def rotate(
    dtype: torch.dtype, table: torch.dtype | None, layout: int, half: bool, ints: torch.dtype, sizes: str
) -> dict[str, object]:
    heads, _, dim, rotary = ROPE_SIZES[sizes]
    tokens = 1 if sizes == "ones" else 5
    lines = meta(64, rotary // 2 if half else rotary, dtype=table or dtype)
    return {
        "x": meta(1, tokens, heads, dim, dtype=dtype).transpose(1, 2), "cos": lines, "sin": lines,
        "rows": meta(tokens, dtype=ints), "rotary_dim": rotary, "layout": layout,
    }  # fmt: skip


@case(latent_attention.rope_latent, dtype=FLOATS, cache=CACHED, table=(None, torch.float32), layout=(0, 1, 2),
      half=(False, True), sizes=SIZES)  # fmt: skip
def rotate_and_write_latent(
    dtype: torch.dtype, cache: torch.dtype, table: torch.dtype | None, layout: int, half: bool, sizes: str
) -> dict[str, object]:
    heads, rank, dim, tokens = (4, 24, 8, 5) if sizes == "some" else (1, 1, 2, 1)
    tables = {name: meta(40, dim // 2 if half else dim, dtype=table or dtype) for name in ("cos", "sin")}
    new = {
        "q_nope": meta(1, tokens, heads, rank, dtype=dtype).transpose(1, 2),
        "q_pe": meta(1, tokens, heads, dim, dtype=dtype).transpose(1, 2),
        "latent": meta(1, 1, tokens, rank, dtype=dtype), "k_pe": meta(1, 1, tokens, dim, dtype=dtype),
    }  # fmt: skip
    places = {name: meta(tokens, dtype=torch.int64) for name in ("rows", "slots")}
    kept = {"latent_cache": meta(6, 1, 16, rank + dim, dtype=cache)}
    return kept | new | tables | places | {"rotary_dim": dim, "layout": layout, "latent_scale": meta(1)}


@case(rope.write_cache, dtype=FLOATS, cache=CACHED, ints=INTS, sizes=tuple(ROPE_SIZES))
def write(dtype: torch.dtype, cache: torch.dtype, ints: torch.dtype, sizes: str) -> dict[str, object]:
    _, heads, dim, _ = ROPE_SIZES[sizes]
    tokens, block = (1, 1) if sizes == "ones" else (5, 16)
    caches = {name: meta(8, heads, block, dim, dtype=cache) for name in ("k_cache", "v_cache")}
    new = {name: meta(1, tokens, heads, dim, dtype=dtype).transpose(1, 2) for name in "kv"}
    return caches | new | {"slots": meta(tokens, dtype=ints), "k_scale": meta(1), "v_scale": meta(1)}


@case(rope.store, dtype=FLOATS, cache=CACHED, ints=INTS, sizes=tuple(ROPE_SIZES))
def write_one(dtype: torch.dtype, cache: torch.dtype, ints: torch.dtype, sizes: str) -> dict[str, object]:
    both = write(dtype, cache, ints, sizes)
    return {"cache": both["k_cache"], "new": both["k"], "slots": both["slots"], "scale": meta(1)}


@case(rope.rope_cache, dtype=FLOATS, cache=CACHED, table=(None, torch.float32), layout=(0, 1, 2), half=(False, True),
      sizes=tuple(ROPE_SIZES))  # fmt: skip
def rotate_and_write(
    dtype: torch.dtype, cache: torch.dtype, table: torch.dtype | None, layout: int, half: bool, sizes: str
) -> dict[str, object]:
    rotated = rotate(dtype, table, layout, half, torch.int64, sizes)
    return {**write(dtype, cache, torch.int64, sizes), "q": rotated.pop("x"), **rotated}


@case(batch.feed_tokens, ints=INTS, sizes=SIZES)
def feed(ints: torch.dtype, sizes: str) -> dict[str, object]:
    tokens = 5 if sizes == "some" else 1
    longs = meta(tokens, dtype=torch.int64)
    return {"token_ids": longs, "sources": meta(tokens, dtype=ints), "sampled": longs}


def step_inputs(rows: int, groups: int, columns: int, is_decode: bool) -> dict[str, Tensor]:
    """Fields of StepInputs that padding kernels take: of steps that decode, or of tokens alone."""
    sizes = {"T": rows, "S": rows, "M": columns} if is_decode else {"T": rows}
    return {name: meta(*field.shape, dtype=field.dtype) for name, field in padding(sizes, groups, "meta").items()}


@case(batch.pad_decode, groups=(1, 2), sizes=SIZES)
def pad_decode(groups: int, sizes: str) -> dict[str, object]:
    rows, columns = (3, 5) if sizes == "some" else (1, 1)
    return {
        "padded": step_inputs(8, groups, 16, True), "step": step_inputs(rows, groups, columns, True), "num_padded": 8
    }  # fmt: skip


@case(batch.pad_tokens, groups=(1, 2), sizes=SIZES)
def pad_tokens(groups: int, sizes: str) -> dict[str, object]:
    tokens = 3 if sizes == "some" else 1
    return {"padded": step_inputs(8, groups, 0, False), "step": step_inputs(tokens, groups, 0, False), "num_padded": 8}


@case(batch.pad_sequences, groups=(1, 2), sizes=SIZES)
def pad_sequences(groups: int, sizes: str) -> dict[str, object]:
    def fields(seqs: int, rows: int, columns: int) -> dict[str, Tensor]:
        found = padding({"S": seqs, "S1": seqs + 1, "R": rows, "M": columns}, groups, "meta")
        return {name: meta(*field.shape, dtype=field.dtype) for name, field in found.items()}

    step = fields(3, 2, 5) if sizes == "some" else fields(1, 1, 1)
    return {"padded": fields(8, 8, 16), "step": step, "num_padded": 8}


@case(blocks.copy_blocks, dtype=CACHED, sizes=SIZES)
def copy(dtype: torch.dtype, sizes: str) -> dict[str, object]:
    shape, count = ((8, 2, 16, 24), 3) if sizes == "some" else ((1, 1, 8, 1), 1)
    caches = {name: meta(*shape, dtype=dtype) for name in ("target", "source")}
    return caches | {name: meta(count, dtype=torch.int64) for name in ("to", "blocks")}


@case(
    sampling.sample, dtype=FLOATS, history=(0, 9), bias=(0, 2), banned=(0, 2), allowed=(0, 2), ints=INTS, spans=(1, 2),
    logprobs_mode=(0, 1, 2, 3), sizes=SIZES,
)  # fmt: skip
def sample(
    dtype: torch.dtype, history: int, bias: int, banned: int, allowed: int, ints: torch.dtype, spans: int,
    logprobs_mode: int, sizes: str,
) -> dict[str, object]:
    """Lists of so many items; begins of the history alone, or begins and ends."""
    count, vocab, num_top = (3, 300, 4) if sizes == "some" else (1, 1, 0)
    longs, floats, numbers = (meta(count, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.int32))
    starts = meta(count + 1, dtype=torch.int64)
    ids = {f"{name}_ids": meta(n, dtype=torch.int64) for name, n in
           (("bias", bias), ("banned", banned), ("allowed", allowed))}  # fmt: skip
    return ids | {
        "tokens": longs, "logprobs": floats, "ranks": longs, "top_ids": meta(count, num_top, dtype=torch.int64),
        "top_logprobs": meta(count, num_top), "ok": meta(count, dtype=torch.bool),
        "logits": meta(count, vocab, dtype=dtype),
        "temperature": floats, "top_k": numbers, "top_p": floats, "min_p": floats, "repetition": floats,
        "frequency": floats, "presence": floats, "seed": longs, "counter": longs, "num_logprobs": numbers,
        "history_start": starts if spans == 1 else meta(2, count, dtype=torch.int64),
        "history": meta(history, dtype=ints), "prompt_len": numbers, "bias_start": starts, "bias_values": meta(bias),
        "banned_start": starts, "allowed_start": starts,
        "bitmask": meta(count, -(-vocab // 32), dtype=torch.int32), "logprobs_mode": logprobs_mode,
    }  # fmt: skip


@case(sampling.row_logprobs, dtype=FLOATS, num_top=(0, 3), sizes=SIZES)
def score(dtype: torch.dtype, num_top: int, sizes: str) -> dict[str, object]:
    count, vocab = (3, 300) if sizes == "some" else (1, 1)
    num_top = min(num_top, vocab)
    longs = meta(count, dtype=torch.int64)
    return {
        "logprobs": meta(count), "ranks": longs, "top_ids": meta(count, num_top, dtype=torch.int64),
        "top_logprobs": meta(count, num_top), "logits": meta(count, vocab, dtype=dtype), "targets": longs,
    }  # fmt: skip
