"""From a graph to a plan: where buffers lie, sizes known only at run time, what torch is left with.

Random graphs of exact ops (each element of a result is rounded once), so a plan has to give the bits that eager torch
gives. T tokens, D features.
"""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from lowering_cases import CONFIG, MAX_TOKENS, NUM_NODES, VOCAB, D
from pass_cases import DTYPES
from torch import fx
from zoo import checkpoint

from fuseline.compile.backends.cpu_plan.arena import ALIGNMENT, Buffer, place
from fuseline.compile.backends.cpu_plan.lowering import Call, Lowered, Lowering
from fuseline.compile.backends.cpu_plan.plan import PlanExecutable, limits_of, meta_inputs
from fuseline.compile.backends.cpu_plan.sizes import (
    FIRST,
    SECOND,
    SYMBOLS,
    Linear,
    SizeError,
    evaluate,
    from_json,
    read,
)
from fuseline.compile.backends.cpu_plan.symbolic import View, views_of
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.region import Region
from fuseline.compile.report import explain

aten = torch.ops.aten
SEEDS = pytest.mark.parametrize("seed", range(12))


# the arena


@SEEDS
def test_buffers_that_live_together_never_overlap(seed: int) -> None:
    rng = random.Random(seed)
    buffers = []
    for _ in range(60):
        first = rng.randrange(40)
        buffers.append(
            Buffer(rng.choice((1, 63, 64, 65, 4096, rng.randrange(1, 9000))), first, first + rng.randrange(8))
        )
    total = place(buffers)
    assert all(b.offset >= 0 and b.offset % ALIGNMENT == 0 and b.offset + b.num_bytes <= total for b in buffers)
    assert_apart([(b, b.first, b.last) for b in buffers])
    assert total >= max(sum(b.num_bytes for b in buffers if b.first <= t <= b.last) for t in range(48))


def test_memory_is_used_again() -> None:
    chain = [Buffer(1000, k, k + 1) for k in range(20)]
    assert place(chain) == 2 * 1024
    assert place([Buffer(1000, 0, 9) for _ in range(3)]) == 3 * 1024
    assert place([]) == 0


def assert_apart(lives: list[tuple[Buffer, int, int]]) -> None:
    """Whatever lives at the same time (both ends included) shares no byte."""
    for number, (a, first, last) in enumerate(lives):
        for b, begin, end in lives[:number]:
            if first <= end and begin <= last:
                assert a.offset + a.num_bytes <= b.offset or b.offset + b.num_bytes <= a.offset


# sizes


def test_sizes_are_read_back_from_two_interpretations() -> None:
    values = [3 + k for k in range(len(SYMBOLS))]
    for index, name in enumerate(SYMBOLS):
        for factor in (1, 2, 64, 4096 * 3, FIRST["T"], FIRST["R"]):
            for constant in (0, 1, -1, 128, FIRST["T"], SECOND["S"]):
                size = read(constant + factor * FIRST[name], constant + factor * SECOND[name])
                assert size == Linear(constant, factor, index) == from_json(json.loads(json.dumps(size)))
                assert evaluate(size, values) == constant + factor * values[index]
    for constant in (0, 1, 128, 151936, 1 << 40, FIRST["T"], SECOND["T"], 12 * FIRST["R"]):
        assert read(constant, constant) == constant == from_json(constant) == evaluate(constant, values)


@pytest.mark.parametrize(
    "function",
    [
        lambda size: size["T"] * size["T"], lambda size: 4 * size["T"] * size["S"], lambda size: size["T"] // 2,
        lambda size: size["T"] + size["R"], lambda size: 9 - size["T"], lambda size: size["T"] * size["T"] - size["T"],
    ],
)  # fmt: skip
def test_other_sizes_are_refused(function: Callable) -> None:
    with pytest.raises(SizeError, match="not linear in one size known only at run time"):
        read(function(FIRST), function(SECOND))


# random graphs


class Grower:
    """Grows a graph of values [T, D] by random ops; every value may be read again later."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.weights = {name: torch.randn(VOCAB, D).to(dtype) for name in ("left", "right")}
        self.graph = fx.Graph()
        self.ids = [self._input("token_ids"), self._input("positions")]
        weights = [self._weight(name) for name in self.weights]
        self.num_tokens = self.call(aten.sym_size.int, self.ids[0], 1)
        looked_up = [self.call(aten.embedding.default, w, ids) for w, ids in zip(weights, self.ids, strict=True)]
        self.values = [self.call(aten.view.default, x, [self.num_tokens, D]) for x in looked_up]

    def call(self, target: Callable, *args: object) -> fx.Node:
        return self.graph.call_function(target, args)

    def grown(self) -> fx.GraphModule:
        for _ in range(NUM_NODES):
            self.values.append(self.rng.choice(OPS)(self, self.pick(), self.pick()))
        total = self.values[-1]
        for value in self.rng.sample(self.values, 4):
            total = self.call(aten.add.Tensor, total, value)
        self.graph.output(self.call(aten.unsqueeze.default, total, 0))
        return fx.GraphModule(self.weights, self.graph)

    def pick(self) -> fx.Node:
        return self.rng.choice(self.values)

    def _input(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(1, 2, dtype=torch.int64, device="meta")
        return node

    def _weight(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name)
        node.meta = {"val": self.weights[name].to("meta"), "fqn": name}
        return node


def _scale(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, g.call(aten.neg.default, x), 0.5)


def _relu(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    return g.call(aten.relu.default, x)


def _subtract(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    return g.call(aten.sub.Tensor, x, y)


def _swap_halves(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    at = g.rng.randrange(1, D)
    parts = g.call(aten.slice.Tensor, x, 1, at, D), g.call(aten.slice.Tensor, y, 1, 0, at)
    return g.call(aten.cat.default, list(parts), -1)


def _turn_heads(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    """A reshape that must copy."""
    heads = g.call(aten.transpose.int, g.call(aten.view.default, x, [g.num_tokens, 3, D // 3]), 1, 2)
    return g.call(aten.reshape.default, heads, [g.num_tokens, D])


def _part(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    parts = g.call(aten.split_with_sizes.default, x, [D // 4, D // 4, D // 2], 1)
    small = g.call(aten.add.Tensor, g.call(operator.getitem, parts, 0), g.call(operator.getitem, parts, 1))
    return g.call(aten.cat.default, [small, g.call(operator.getitem, parts, 2), small], 1)


def _across(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    """Reads and writes columns: T is a stride."""
    turned = g.call(aten.relu.default, g.call(aten.transpose.int, x, 0, 1))
    return g.call(aten.transpose.int, turned, 0, 1)


def _flip(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    """No kernel of ours."""
    return g.call(aten.flip.default, x, [1])


def _sort(g: Grower, x: fx.Node, y: fx.Node) -> fx.Node:
    """No kernel of ours, two results."""
    return g.call(operator.getitem, g.call(aten.sort.default, g.call(aten.flip.default, x, [0]), 1), 0)


OPS = (_scale, _relu, _subtract, _subtract, _swap_halves, _turn_heads, _part, _across, _flip, _sort)


def lowered(graph: fx.GraphModule) -> Lowered:
    return Lowering(graph, meta_inputs(graph, CONFIG.block_size), limits_of(CONFIG)).run()


def used(steps: list[Call | Region], made: Lowered) -> Iterator[tuple[int, list[View]]]:
    """Tensors that each step reads or writes, told by the steps alone."""
    for number, step in enumerate(steps):
        if isinstance(step, Call):
            yield number, [t for t in step.tensors if t is not None]
        else:
            results = [views_of(made.values[node])[index or 0] for node, index in step.outputs]
            yield number, results + [view for node in step.inputs for view in views_of(made.values[node])]
    yield len(steps), views_of(made.values[made.output])


def lives(made: Lowered) -> list[tuple[Buffer, int, int]]:
    found: dict[int, tuple[Buffer, int, int]] = {}
    for number, tensors in used(made.steps, made):
        for tensor in tensors:
            buffer = made.places[tensor.storage].buffer
            if buffer is not None:
                first = found.get(id(buffer), (buffer, number, number))[1]
                found[id(buffer)] = (buffer, first, number)
    return list(found.values())


@SEEDS
@DTYPES
def test_a_plan_gives_the_bits_of_eager_torch(seed: int, dtype: torch.dtype) -> None:
    grower = Grower(seed, dtype)
    graph = grower.grown()
    made = lowered(graph)
    plan = PlanExecutable(made, grower.weights)
    assert plan._plan.num_calls > 0 and {type(step) for step in made.steps} == {Call, Region}
    found = lives(made)
    assert len(found) == len(made.buffers)
    assert_apart(found)
    assert max(b.offset + b.num_bytes for b, _, _ in found) <= plan.arena_bytes
    for num_tokens in (*range(1, MAX_TOKENS + 1), 1, 5):
        token_ids, positions = torch.randint(VOCAB, (2, 1, num_tokens))
        values = {
            "token_ids": token_ids, "positions": positions, "seq_lens": torch.ones(2), "logits_rows": torch.ones(1),
            "block_table_0": torch.ones(2, 1), "k_cache_0": torch.ones(1),
        }  # fmt: skip
        assert torch.equal(plan.run(values), graph(token_ids, positions)), f"{num_tokens} tokens"


def test_what_only_changes_shape_is_no_step() -> None:
    grower = Grower(0, torch.float32)
    parts = grower.call(aten.split_with_sizes.default, grower.values[0], [4, 8], 1)
    grower.graph.output(grower.call(aten.transpose.int, grower.call(operator.getitem, parts, 1), 0, 1))
    steps = lowered(fx.GraphModule(grower.weights, grower.graph)).steps
    assert [step.native.kernel for step in steps] == ["embedding"] * 2


# whole models


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_models_buffers_never_overlap(family: str) -> None:
    config = CompileConfig(str(checkpoint(family, "bfloat16")))
    captured, _ = optimize(config)
    made = Lowering(captured.graph, meta_inputs(captured.graph, config.block_size), limits_of(config)).run()
    total = place(made.buffers)
    found = lives(made)
    assert_apart(found)
    assert len(found) == len(made.buffers) and total < sum(b.num_bytes for b in made.buffers) / 2


def test_explain_tells_stages_passes_and_the_plan() -> None:
    text = explain(CompileConfig(str(checkpoint("llama", "bfloat16"))))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "llama, bfloat16, level 1"
    assert any(line.startswith("fuse fuse_add_norm 6 ") for line in lines)
    assert {f"ops after {stage}" for stage in ("clean", "recognize", "fuse", "serve", "lower")} < set(lines)
    plan = next(k for k, line in enumerate(lines) if line.startswith("plan: "))
    assert lines[plan].endswith(" kernel calls, 0 regions computed by torch") and lines[plan + 1] == "linear 13"
    assert lines[-1].startswith("return ")


def test_explain_names_what_torch_computes() -> None:
    text = explain(CompileConfig(str(checkpoint("cohere", "bfloat16")), disabled_passes=("find_norm",)))
    assert "region 0: " in text and "aten.mean" in text


def test_explain_says_why_a_model_cannot_be_served(tmp_path) -> None:
    assert explain(CompileConfig(str(tmp_path))).startswith("this model cannot be served: ")
