"""Every pass on random graphs in random orders of definition: the graph stays valid and gives the same numbers.

Graphs are made of the spellings that passes match, with weights that are computed, sums and norms that several read,
memory written in place, and unrelated users. Before each pass the calls are put into another order that the data allow.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pass_cases import DTYPES, ROWS, Case
from torch import Tensor, fx

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.edit import insert_call
from fuseline.compile.graph.graph_pass import GraphPass, PassContext
from fuseline.compile.graph.match import cast
from fuseline.compile.passes.clean import canonicalize, merge_equal, remove_noops
from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.find_moe import find_moe
from fuseline.compile.passes.find_norm import find_norm
from fuseline.compile.passes.find_rope import find_rope
from fuseline.compile.passes.fuse_act_mul import fuse_act_mul
from fuseline.compile.passes.fuse_add_norm import fuse_add_norm
from fuseline.compile.passes.fuse_linear_act import fuse_linear_act
from fuseline.compile.passes.fuse_rope_cache import fuse_rope_cache
from fuseline.compile.passes.join_linears import join_linears
from fuseline.compile.passes.keep_last_logits import keep_last_logits
from fuseline.compile.passes.make_batch_invariant import make_batch_invariant
from fuseline.compile.passes.pack_weights import pack_weights
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.passes.widen_logits import widen_logits

aten = torch.ops.aten
OPS = torch.ops.fuseline
T, HEADS, DIM, VOCAB, EXPERTS = 6, 2, 8, 24, 4
HIDDEN = HEADS * DIM
END = 1 << 62
NUM_GRAPHS = 14
SHARED = (
    remove_noops, canonicalize, merge_equal, find_linear, find_norm, find_rope, find_moe, fuse_act_mul, join_linears,
    fuse_add_norm, page_attention, keep_last_logits, fuse_rope_cache,
)  # fmt: skip
PIPELINES: dict[str, tuple[GraphPass, ...]] = {
    "cpu": (*SHARED, pack_weights, widen_logits),
    "cuda": (*SHARED, fuse_linear_act),
    "invariant": (*SHARED, make_batch_invariant),
}
SUMS_DIFFERENTLY = (join_linears, pack_weights, keep_last_logits, fuse_linear_act, make_batch_invariant)
"""A product of joined weights, of fewer rows, or of another kernel: other roundings."""
VIEWS = (aten.view.default, aten.transpose.int, aten.slice.Tensor, operator.getitem)
IN_PLACE = (aten.mul_.Tensor, aten.div_.Tensor)
WRITES = (OPS.write_cache.default, OPS.rope_cache.default)


class Patterns:
    """Grows a decoder out of what passes look for. Hidden states are [1, T, HIDDEN]."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.rng = random.Random(seed)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.graph = fx.Graph()
        self.values: dict[str, Tensor] = {"inv_freq": torch.rand(DIM // 2, generator=self.generator)}
        self.num_layers = 0
        self.ids, self.positions = (self._input(name) for name in ("token_ids", "positions"))
        self.hidden = [self.call(aten.embedding.default, self.weight(VOCAB, HIDDEN), self.ids)]

    def call(self, target: Callable, *args: object, **kwargs: object) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        real, named = (fx.node.map_arg(part, lambda n: n.meta["val"]) for part in (args, kwargs))
        node.meta["val"] = target(*real, **named)
        return node

    def case(self) -> Case:
        for _ in range(self.rng.randrange(4, 8)):
            self.hidden.append(self.rng.choice(BLOCKS)(self, self.pick()))
        last = self.call(aten.add.Tensor, self.hidden[-1], self.pick())
        self.graph.output(self.call(aten.linear.default, norm(self, last), self.weight(VOCAB, HIDDEN)))
        attributes = {node.target: node.meta["val"] for node in self.graph.nodes if node.op == "get_attr"}
        inputs = {"token_ids": torch.arange(T)[None] * 3 % VOCAB, "positions": torch.arange(T)[None]}
        ctx = PassContext(CompileConfig(""), None, ROWS, ROWS, {"inv_freq": self.values["inv_freq"]})
        return Case(fx.GraphModule(attributes, self.graph), inputs, self.values, ctx)

    def pick(self) -> fx.Node:
        """Recent values more often, as in a residual stream."""
        return self.rng.choice(self.hidden[-2:] + self.hidden)

    def weight(self, *shape: int) -> fx.Node:
        name = f"w{len(self.values)}"
        self.values[name] = (torch.randn(*shape, generator=self.generator) / 2).to(self.dtype)
        return self.attribute(name)

    def attribute(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name)
        node.meta = {"val": self.values[name].to("meta"), "fqn": name}
        return node

    def maybe_computed(self, *shape: int) -> fx.Node:
        """A weight as it is, or plus one, as in Nemotron's norms."""
        weight = self.weight(*shape)
        return self.call(aten.add.Tensor, weight, 1) if self.rng.random() < 0.5 else weight

    def linear(self, x: fx.Node, num_out: int) -> fx.Node:
        bias = [self.weight(num_out)] if self.rng.random() < 0.3 else []
        return self.call(aten.linear.default, x, self.weight(num_out, x.meta["val"].shape[-1]), *bias)

    def _input(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(1, T, dtype=torch.int64, device="meta")
        return node


def norm(g: Patterns, x: fx.Node) -> fx.Node:
    kind = g.rng.randrange(4)
    if kind == 0:
        return g.call(aten.layer_norm.default, x, [HIDDEN], g.maybe_computed(HIDDEN), g.maybe_computed(HIDDEN), 1e-5)
    if kind == 1:
        return g.call(OPS.rms_norm.default, x, g.maybe_computed(HIDDEN), 1e-6, 0)
    if kind == 2:
        return g.call(OPS.layer_norm.default, x, g.maybe_computed(HIDDEN), None, 1e-5)
    wide = g.call(cast, x, torch.float32)
    mean = g.call(aten.mean.dim, g.call(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    scale = g.call(aten.rsqrt.default, g.call(aten.add.Tensor, mean, 1e-6))
    return g.call(aten.mul.Tensor, g.call(cast, g.call(aten.mul.Tensor, wide, scale), g.dtype), g.weight(HIDDEN))


def add_and_norm(g: Patterns, x: fx.Node) -> fx.Node:
    """The sum is often read by others too."""
    total = g.call(aten.add.Tensor, x, g.pick())
    g.hidden.append(total)
    return norm(g, total)


def gated(g: Patterns, x: fx.Node) -> fx.Node:
    x = g.call(g.rng.choice((aten.contiguous.default, aten.neg.default)), norm(g, x))
    gate, up = g.linear(x, 12), g.linear(x, 12)
    act = g.call(g.rng.choice((aten.silu.default, aten.relu.default)), gate)
    product = g.call(aten.mul.Tensor, *g.rng.sample([act, up], 2))
    return g.call(aten.add.Tensor, x, g.linear(product, HIDDEN))


def routed(g: Patterns, x: fx.Node) -> fx.Node:
    flat = g.call(aten.view.default, x, [T, HIDDEN])
    logits = g.linear(flat, EXPERTS)
    is_first = g.rng.random() < 0.5
    scores = g.call(aten.softmax.int, g.call(cast, logits, torch.float32), -1) if is_first else logits
    top = g.call(aten.topk.default, scores, 2)
    weights, ids = (g.call(operator.getitem, top, k) for k in g.rng.sample((0, 1), 2))
    weights, ids = (weights, ids) if weights.args[1] == 0 else (ids, weights)
    if not is_first:
        weights = g.call(aten.softmax.int, weights, -1)
    elif g.rng.random() < 0.7:
        divide = g.rng.choice((aten.div.Tensor, aten.div_.Tensor))
        weights = g.call(divide, weights, g.call(aten.sum.dim_IntList, weights, [-1], True))
    args = (g.weight(EXPERTS, 2 * DIM, HIDDEN), g.weight(EXPERTS, HIDDEN, DIM), None, None, 1, False, 1.0, 0.0)
    done = g.call(OPS.experts.default, flat, ids, g.call(cast, weights, g.dtype), *args)
    return g.call(aten.add.Tensor, x, g.call(aten.view.default, done, [1, T, HIDDEN]))


def turns(g: Patterns) -> list[fx.Node]:
    """cos and sin of the positions, computed anew or as before."""
    wide = g.call(cast, g.call(aten.unsqueeze.default, g.positions, -1), torch.float32)
    half = g.call(aten.mul.Tensor, wide, g.attribute("inv_freq"))
    whole = g.call(aten.cat.default, [half, half], -1)
    return [g.call(cast, g.call(f, whole), g.dtype) for f in (aten.cos.default, aten.sin.default)]


def rotated(g: Patterns, x: fx.Node, tables: list[fx.Node]) -> fx.Node:
    cos, sin = (g.call(aten.unsqueeze.default, table, 1) for table in tables)
    low, high = g.call(aten.slice.Tensor, x, 3, 0, DIM // 2), g.call(aten.slice.Tensor, x, 3, DIM // 2, END)
    turned = g.call(aten.cat.default, [g.call(aten.neg.default, high), low], -1)
    return g.call(aten.add.Tensor, g.call(aten.mul.Tensor, x, cos), g.call(aten.mul.Tensor, turned, sin))


def looked_up(g: Patterns, x: fx.Node, tables: list[fx.Node]) -> fx.Node:
    """A rotation by tables that are computed, not constants."""
    rows = g.call(aten.view.default, g.positions, [T])
    cos, sin = (g.call(aten.view.default, table, [T, DIM]) for table in tables)
    return g.call(OPS.rope.default, x, g.call(aten.add.Tensor, cos, 0.5), sin, rows, DIM, 0)


def attention(g: Patterns, x: fx.Node) -> fx.Node:
    x = norm(g, x)
    heads = [g.call(aten.view.default, g.linear(x, HIDDEN), [1, T, HEADS, DIM]) for _ in "qkv"]
    q, k, v = (g.call(aten.transpose.int, part, 1, 2) for part in heads)
    turn, tables = g.rng.choice((rotated, looked_up)), turns(g)
    q, k = turn(g, q, tables), turn(g, k, turns(g) if g.rng.random() < 0.3 else tables)
    if g.rng.random() < 0.3:
        v = g.call(aten.mul.Tensor, v, 0.5)
    out = g.call(OPS.attention.default, q, k, v, None, g.num_layers, DIM**-0.5, 0, 0.0, True)
    g.num_layers += 1
    flat = g.call(aten.reshape.default, g.call(aten.transpose.int, out, 1, 2), [1, T, HIDDEN])
    return g.call(aten.add.Tensor, x, g.linear(flat, HIDDEN))


def in_place(g: Patterns, x: fx.Node) -> fx.Node:
    """Memory that is read, written, and read again."""
    own = g.call(g.rng.choice((aten.clone.default, aten.neg.default)), x)
    before = norm(g, g.call(aten.add.Tensor, own, g.pick()))
    g.call(aten.mul_.Tensor, g.call(aten.view.default, own, [T, HIDDEN]), 0.5)
    after = norm(g, g.call(aten.add.Tensor, own, before))
    return g.call(aten.add.Tensor, before, after)


BLOCKS = (add_and_norm, add_and_norm, gated, routed, attention, attention, in_place)


def shuffle(graph: fx.Graph, rng: random.Random) -> None:
    """Another order of the calls that data and writes allow."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    before: dict[fx.Node, set[fx.Node]] = {node: set(node.all_input_nodes) & set(calls) for node in calls}
    for node in calls:
        num_written = 2 if node.target in WRITES else 1 if node.target in IN_PLACE else 0
        for other in (other for memory in node.args[:num_written] for other in sharing(memory)):
            first, second = sorted((node, other))
            if first is not second and other in before:
                before[second].add(first)
    output = graph.output_node()
    while before:
        free = [node for node, needed in before.items() if not needed & before.keys()]
        node = rng.choice(free)
        del before[node]
        output.prepend(node)


def sharing(node: fx.Node) -> set[fx.Node]:
    """Nodes that may read or write the memory of a node."""
    while node.target in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    found, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user not in found and user.target in (*VIEWS, *IN_PLACE):
                pending.append(user)
            found.add(user)
    return found


def metadata(num_layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs that passes add: one sequence of T tokens in block 1, all of whose logits are wanted."""
    caches = {f"{n}_cache_{i}": torch.zeros(3, HEADS, 16, DIM, dtype=dtype) for n in "kv" for i in range(num_layers)}
    return caches | {
        "slots_0": torch.arange(16, 16 + T), "block_table_0": torch.tensor([[1]], dtype=torch.int32),
        "seq_lens": torch.tensor([T], dtype=torch.int32), "query_start": torch.tensor([0, T], dtype=torch.int32),
        "rope_rows": torch.arange(T), "logits_rows": torch.arange(T),
    }  # fmt: skip


def run_passes(seed: int, dtype: torch.dtype, pipeline: str) -> Counter[str]:
    """Matches by pass; asserts after each pass that the graph gives what it gave before."""
    made = Patterns(seed, dtype)
    found, matches = made.case(), Counter()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for graph_pass in PIPELINES[pipeline]:
        more = metadata(made.num_layers, dtype)
        before = found.run(**{name: value.clone() for name, value in more.items()})
        shuffle(found.graph.graph, made.rng)
        found.graph.recompile()
        assert torch.equal(found.run(**{name: value.clone() for name, value in more.items()}), before), "shuffled"
        matches[graph_pass.__name__] += found.apply(graph_pass)
        after = found.run(**more)
        if graph_pass in SUMS_DIFFERENTLY:
            torch.testing.assert_close(after.float(), before.float(), rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(after, before.to(after.dtype)), f"{graph_pass.__name__} of graph {seed}"
    return matches


@pytest.mark.parametrize("pipeline", PIPELINES)
@DTYPES
def test_passes_keep_the_graph_valid_and_its_numbers(dtype: torch.dtype, pipeline: str) -> None:
    matches = sum((run_passes(seed, dtype, pipeline) for seed in range(NUM_GRAPHS)), Counter())
    without = {"canonicalize"} | ({"widen_logits"} if dtype == torch.float32 else set())
    assert {graph_pass.__name__ for graph_pass in PIPELINES[pipeline]} - without <= set(+matches)


# places by hand


def built(build: Callable[[Patterns], fx.Node]) -> Case:
    made = Patterns(0, torch.float32)
    made.graph.output(build(made))
    attributes = {node.target: node.meta["val"] for node in made.graph.nodes if node.op == "get_attr"}
    inputs = {"token_ids": torch.arange(T)[None], "positions": torch.arange(T)[None]}
    ctx = PassContext(CompileConfig(""), None, ROWS, ROWS)
    return Case(fx.GraphModule(attributes, made.graph), inputs, made.values, ctx)


def sum_of_two(g: Patterns) -> tuple[fx.Node, fx.Node]:
    """A value of its own memory, and its sum with another."""
    x = g.call(aten.mul.Tensor, g.hidden[0], 2.0)
    return x, g.call(aten.add.Tensor, x, g.hidden[0])


def late_weight(g: Patterns) -> fx.Node:
    """The sum is read before the weight of its norm is computed."""
    _, total = sum_of_two(g)
    early = g.call(aten.relu.default, total)
    weight = g.call(aten.add.Tensor, g.weight(HIDDEN), 1)
    return g.call(aten.add.Tensor, early, g.call(OPS.rms_norm.default, total, weight, 1e-6, 0))


def weight_of_the_sum(g: Patterns) -> fx.Node:
    """The weight is computed from the sum: both cannot be one op."""
    _, total = sum_of_two(g)
    weight = g.call(aten.mean.dim, g.call(aten.relu.default, total), [0, 1])
    return g.call(OPS.rms_norm.default, total, weight, 1e-6, 0)


def written_between(g: Patterns) -> fx.Node:
    """Behind the weight a part of the sum has another value."""
    x, total = sum_of_two(g)
    g.call(aten.mul_.Tensor, x, 0.5)
    weight = g.call(aten.add.Tensor, g.weight(HIDDEN), 1)
    return g.call(aten.add.Tensor, x, g.call(OPS.rms_norm.default, total, weight, 1e-6, 0))


def weight_written(g: Patterns) -> fx.Node:
    """The weight cannot go up: it is written behind the sum's first reader."""
    _, total = sum_of_two(g)
    memory = g.call(aten.add.Tensor, g.weight(HIDDEN), 1)
    early = g.call(aten.relu.default, total)
    g.call(aten.mul_.Tensor, memory, 0.5)
    weight = g.call(aten.add.Tensor, memory, 1)
    return g.call(aten.add.Tensor, early, g.call(OPS.rms_norm.default, total, weight, 1e-6, 0))


@pytest.mark.parametrize(
    "build, matches", [(late_weight, 1), (weight_of_the_sum, 0), (written_between, 0), (weight_written, 0)]
)
def test_a_sum_and_its_norm_are_one_where_there_is_a_place(build: Callable, matches: int) -> None:
    found = built(build)
    before = found.run()
    assert found.apply(fuse_add_norm) == matches
    assert torch.equal(found.run(), before)


def copied_and_written(g: Patterns) -> fx.Node:
    x, _ = sum_of_two(g)
    own = g.call(aten.clone.default, x)
    g.call(aten.mul_.Tensor, own, 0.5)
    return g.call(aten.add.Tensor, x, own)


def silu_of_what_is_read_later(g: Patterns) -> fx.Node:
    x, _ = sum_of_two(g)
    return g.call(aten.add.Tensor, g.call(aten.silu_.default, x), g.call(aten.neg.default, x))


def equal_but_for_a_write(g: Patterns) -> fx.Node:
    x, _ = sum_of_two(g)
    before = g.call(aten.neg.default, x)
    g.call(aten.mul_.Tensor, x, 0.5)
    return g.call(aten.add.Tensor, before, g.call(aten.neg.default, x))


def silu_of_a_part(later: Callable) -> Callable[[Patterns], fx.Node]:
    def build(g: Patterns) -> fx.Node:
        x = g.call(aten.mul.Tensor, g.hidden[0], 2.0)
        parts = g.call(aten.chunk.default, x, 2, -1)
        left, right = (g.call(operator.getitem, parts, k) for k in range(2))
        return g.call(aten.add.Tensor, g.call(aten.silu_.default, left), later(g, x, right))

    return build


@pytest.mark.parametrize(
    "later, is_plain",
    [
        (lambda g, x, right: right, True),
        (lambda g, x, right: g.call(aten.slice.Tensor, x, -1, 0, HIDDEN // 2), False),
    ],
)
def test_an_activation_in_place_is_a_plain_one_where_nothing_tells(later: Callable, is_plain: bool) -> None:
    found = built(silu_of_a_part(later))
    before = found.run()
    found.apply(canonicalize)
    assert ("aten.silu" in found.ops()) == is_plain
    assert torch.equal(found.run(), before)


@pytest.mark.parametrize("build", [copied_and_written, silu_of_what_is_read_later, equal_but_for_a_write])
def test_what_is_written_is_neither_forwarded_nor_merged(build: Callable) -> None:
    found = built(build)
    before = found.run()
    found.apply(remove_noops, canonicalize, merge_equal)
    assert torch.equal(found.run(), before)


def test_a_call_before_its_operands_is_an_error() -> None:
    found = built(lambda g: sum_of_two(g)[1])
    total = next(node for node in found.graph.graph.nodes if node.target is aten.add.Tensor)
    with pytest.raises(ValueError, match="would read add_tensor before it is defined"):
        insert_call(total.args[0], aten.neg.default, (total,), total, total.meta["val"])
