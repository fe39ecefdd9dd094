"""Shapes, strides and offsets that follow the number of tokens: random graphs of views, cats and slices as plans.

Values have the tokens at any dimension, several times and with a constant added: x[:, 1:], cat([x, x[:, :2]], -2).
Every graph is compared bit by bit with eager torch, for each number of tokens that torch itself can compute.
"""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Callable

import pytest
import torch
from lowering_cases import CONFIG, VOCAB, D
from pass_cases import DTYPES
from torch import Tensor, fx

from fuseline.compile.backends.cpu_plan.lowering import Lowered, Lowering
from fuseline.compile.backends.cpu_plan.plan import PlanExecutable, RegionKernel, limits_of, meta_inputs
from fuseline.compile.backends.inductor.job import make_job
from fuseline.compile.backends.inductor.worker import rebuild
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph.region import Region
from fuseline.compile.passes.cut_regions import cut_regions

aten = torch.ops.aten
SEEDS = pytest.mark.parametrize("seed", range(24))
EXAMPLE = 1000
"""Tokens with which shapes are told while a graph grows."""
TOKENS = (*range(1, 10), 2, 7)
MAX_NUMEL = 60 * EXAMPLE


class Shapes:
    """Grows a graph; `values` are nodes with meta["val"] of EXAMPLE tokens."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.weights = {"table": torch.randn(VOCAB, D).to(dtype), "rows": torch.randn(3, D).to(dtype)}
        self.graph = fx.Graph()
        self.ids = self._node("placeholder", "token_ids", torch.empty(1, EXAMPLE, dtype=torch.int64, device="meta"))
        table, rows = (self._node("get_attr", name, weight.to("meta")) for name, weight in self.weights.items())
        self.num_tokens = self.call(aten.sym_size.int, self.ids, 1)
        x = self.call(aten.embedding.default, table, self.ids)
        heads = self.call(aten.view.default, x, [1, self.num_tokens, 3, D // 3])
        self.values = [x, rows, heads, self.call(aten.transpose.int, heads, 1, 2), self.call(aten.relu.default, x)]

    def call(self, target: Callable, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node

    def grown(self, num_nodes: int = 24) -> fx.GraphModule:
        made = 0
        while made < num_nodes:
            value = self.rng.choice(OPS)(self, self.rng.choice(self.values))
            if value is not None and 0 < value.meta["val"].numel() <= MAX_NUMEL and value.meta["val"].ndim <= 5:
                self.values.append(value)
                made += 1
        chosen = self.rng.sample(self.values, 8)
        flat = [self.call(aten.reshape.default, value, [-1]) for value in chosen]
        self.graph.output(self.call(aten.unsqueeze.default, self.call(aten.cat.default, flat), 0))
        return fx.GraphModule(self.weights, self.graph)

    def dim(self, value: fx.Node) -> int:
        """Any dimension, counted from the front or from the end."""
        return self.rng.randrange(-value.meta["val"].ndim, value.meta["val"].ndim)

    def size(self, value: fx.Node, dim: int) -> fx.Node | int:
        size = value.meta["val"].shape[dim]
        return self.call(aten.sym_size.int, value, dim) if size >= EXAMPLE // 2 else size

    def part(self, getter: fx.Node, count: int) -> fx.Node:
        return self.call(operator.getitem, getter, self.rng.randrange(count))

    def _node(self, op: str, name: str, value: Tensor) -> fx.Node:
        node = self.graph.create_node(op, name)
        node.meta = {"val": value, "fqn": name}
        return node


def _compute(g: Shapes, x: fx.Node) -> fx.Node:
    alike = [y for y in g.values if y.meta["val"].shape == x.meta["val"].shape]
    return g.call(g.rng.choice((aten.sub.Tensor, aten.add.Tensor)), x, g.rng.choice(alike))


def _torch(g: Shapes, x: fx.Node) -> fx.Node:
    """No kernel of ours."""
    return g.call(aten.flip.default, x, [g.dim(x)])


def _scaled_by_tokens(g: Shapes, x: fx.Node) -> fx.Node:
    """An op that has a number of tokens for an argument, linear or not."""
    count = g.call(g.rng.choice((operator.add, operator.mul, operator.floordiv)), g.num_tokens, 2)
    return g.call(aten.mul.Tensor, x, count)


def _transpose(g: Shapes, x: fx.Node) -> fx.Node:
    return g.call(aten.transpose.int, x, g.dim(x), g.dim(x))


def _cat(g: Shapes, x: fx.Node) -> fx.Node:
    dim = g.dim(x)
    parts = [x] + [y for y in g.rng.sample(g.values, len(g.values)) if _fits(x, y, dim)][: g.rng.randrange(1, 3)]
    g.rng.shuffle(parts)
    return g.call(aten.cat.default, parts, dim)


def _fits(x: fx.Node, y: fx.Node, dim: int) -> bool:
    a, b = list(x.meta["val"].shape), list(y.meta["val"].shape)
    if len(a) != len(b):
        return False
    a[dim] = b[dim]
    return a == b


def _stack(g: Shapes, x: fx.Node) -> fx.Node:
    return g.call(aten.stack.default, [x, g.call(aten.neg.default, x)], g.dim(x))


def _slice(g: Shapes, x: fx.Node) -> fx.Node:
    """Bounds from the front, from the end, and such as follow the number of tokens."""
    dim = g.dim(x)
    size = g.size(x, dim)
    if isinstance(size, int):
        begin = g.rng.randrange(size)
        return g.call(aten.slice.Tensor, x, dim, begin, g.rng.randrange(begin + 1, size + 1))
    bounds = [(0, 1), (1, 1 << 62), (0, -1), (-1, 1 << 62), (-3, 1 << 62), (2, 5), (0, g.num_tokens)]
    if x.meta["val"].shape[dim] > EXAMPLE:
        bounds += [(g.num_tokens, 1 << 62), (g.call(operator.sub, g.num_tokens, 1), g.num_tokens)]
    return g.call(aten.slice.Tensor, x, dim, *g.rng.choice(bounds))


def _select(g: Shapes, x: fx.Node) -> fx.Node | None:
    if x.meta["val"].ndim < 2:
        return None
    dim = g.dim(x)
    size = x.meta["val"].shape[dim]
    return g.call(aten.select.int, x, dim, g.rng.choice((0, -1, 1, -2) if size > 1 else (0, -1)))


def _narrow(g: Shapes, x: fx.Node) -> fx.Node:
    dim = g.dim(x)
    size = g.size(x, dim)
    if isinstance(size, int):
        return g.call(aten.narrow.default, x, dim, size - 1, 1)
    return g.call(aten.narrow.default, x, dim, 1, g.call(operator.sub, size, 1))


def _split(g: Shapes, x: fx.Node) -> fx.Node | None:
    dim = g.dim(x)
    size = g.size(x, dim)
    if size == 1:
        return None
    sizes = [1, size - 1] if isinstance(size, int) else [1, g.call(operator.sub, size, 1)]
    g.rng.shuffle(sizes)
    return g.part(g.call(aten.split_with_sizes.default, x, sizes, dim), 2)


def _unbind(g: Shapes, x: fx.Node) -> fx.Node | None:
    dim = g.dim(x)
    size = g.size(x, dim)
    if not isinstance(size, int) or x.meta["val"].ndim < 2:
        return None
    return g.part(g.call(aten.unbind.int, x, dim), size)


def _merge(g: Shapes, x: fx.Node) -> fx.Node:
    """Two dimensions as one, as a view or a copy."""
    sizes = [g.size(x, dim) for dim in range(x.meta["val"].ndim)]
    if len(sizes) < 2 or sum(not isinstance(size, int) for size in sizes) > 1:
        return g.call(aten.unsqueeze.default, x, g.dim(x))
    at = g.rng.randrange(len(sizes) - 1)
    return g.call(aten.reshape.default, x, [*sizes[:at], -1, *sizes[at + 2 :]])


def _expand(g: Shapes, x: fx.Node) -> fx.Node:
    sizes = [g.size(x, dim) for dim in range(x.meta["val"].ndim)]
    return g.call(aten.expand.default, x, [2, *sizes])


OPS = (
    _compute, _compute, _torch, _scaled_by_tokens, _transpose, _cat, _cat, _cat, _stack, _slice, _slice, _select,
    _narrow, _split, _split, _unbind, _merge, _expand,
)  # fmt: skip


def lowered(graph: fx.GraphModule, marks: frozenset[int] = frozenset()) -> Lowered:
    return Lowering(graph, meta_inputs(graph, CONFIG.block_size), limits_of(CONFIG), marks).run()


def assert_same_bits(plan: PlanExecutable, graph: fx.GraphModule) -> int:
    """Returns for how many numbers of tokens torch computes the graph."""
    num_compared = 0
    for num_tokens in TOKENS:
        token_ids = torch.randint(VOCAB, (1, num_tokens))
        try:
            expected = graph(token_ids)
        except (RuntimeError, IndexError, ValueError):
            continue
        values = {
            "token_ids": token_ids, "seq_lens": torch.ones(2), "logits_rows": torch.ones(1),
            "block_table_0": torch.ones(2, 1), "k_cache_0": torch.ones(1),
        }  # fmt: skip
        assert torch.equal(plan.run(values), expected), f"{num_tokens} tokens"
        num_compared += 1
    return num_compared


@SEEDS
@DTYPES
def test_a_plan_has_the_shapes_of_eager_torch(seed: int, dtype: torch.dtype) -> None:
    grown = Shapes(seed, dtype)
    graph = grown.grown()
    made = lowered(graph)
    plan = PlanExecutable(made, grown.weights)
    assert plan._plan.num_calls > 0 and made.min_tokens <= 6
    assert assert_same_bits(plan, graph) >= 3


@SEEDS
def test_regions_have_the_shapes_of_eager_torch(seed: int) -> None:
    """The text that is compiled, computed by torch in the compiled region's place."""
    grown = Shapes(seed, torch.float32)
    graph = grown.grown()
    marks = frozenset(range(cut_regions(graph, PassContext(CONFIG, None, 0, 0)).matches))
    made = lowered(graph, marks)
    regions = [step for step in made.steps if isinstance(step, Region) and step.mark is not None]
    marked = [region.mark for region in regions]
    kernels = {}
    for region in regions:
        job = make_job(region, made.values) if marked.count(region.mark) == 1 else None
        if job is not None:
            compiled, _ = rebuild(json.loads(job.text))
            kernels[region.mark] = RegionKernel(lambda args, run=compiled: run(*args), job.args)
    assert assert_same_bits(PlanExecutable(made, grown.weights, kernels), graph) >= 3


# one of each, by hand


def plan_of(build: Callable[[Shapes, fx.Node], fx.Node]) -> tuple[Lowered, PlanExecutable, fx.GraphModule]:
    """`build` gets heads [1, 3, T, 4]."""
    grown = Shapes(0, torch.float32)
    grown.graph.output(build(grown, grown.values[3]))
    graph = fx.GraphModule(grown.weights, grown.graph)
    graph.graph.eliminate_dead_code()
    made = lowered(graph)
    return made, PlanExecutable(made, grown.weights), graph


@pytest.mark.parametrize("dim", [1, -3])
def test_a_cat_before_the_tokens_is_only_copies(dim: int) -> None:
    """As StableLM joins its heads after a norm of each: the place of a part is a multiple of the tokens."""

    def build(g: Shapes, heads: fx.Node) -> fx.Node:
        split = g.call(aten.split_with_sizes.default, heads, [1, 1, 1], 1)
        return g.call(aten.cat.default, [g.call(operator.getitem, split, k) for k in (2, 0, 1)], dim)

    made, plan, graph = plan_of(build)
    assert [step.native.kernel for step in made.steps] == ["embedding"] + 3 * ["copy"] and made.min_tokens == 1
    assert assert_same_bits(plan, graph) == len(TOKENS)


def sliced(*bounds: int) -> Callable[[Shapes, fx.Node], fx.Node]:
    return lambda g, heads: g.call(aten.neg.default, g.call(aten.slice.Tensor, heads, 2, *bounds))


def test_steps_too_small_for_the_shapes_are_left_to_torch() -> None:
    made, plan, graph = plan_of(sliced(-3, 1 << 62))
    assert made.min_tokens == 3 and plan._plan.num_calls == 2
    assert assert_same_bits(plan, graph) == len(TOKENS)


def test_shapes_that_are_not_linear_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    made, plan, graph = plan_of(sliced(0, 1 << 62, 2))
    assert plan._plan.num_calls == 0 and "not linear in one size" in caplog.text
    assert assert_same_bits(plan, graph) == len(TOKENS)
