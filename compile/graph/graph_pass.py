"""The interface of a pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from fuseline.compile.config import CompileConfig
from fuseline.compile.target import CPU, Target


@dataclass(frozen=True)
class PassContext:
    """Information a pass may use besides the graph."""

    config: CompileConfig
    facts: object
    """ModelFacts of the captured model."""
    max_model_len: int
    num_rope_rows: int
    """Rows of a rope table: the context length, or twice a table's length if rope depends on the sequence length."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Buffers of the model that have values, by fqn."""
    target: Target = CPU
    layouts: Mapping[str, str] = field(default_factory=dict)
    """Layouts of codes that weights are stored in, by parameter (ops/coded.py); others are plain."""


@dataclass(frozen=True)
class PassResult:
    """Result of a pass: `specs` are facts for upper layers, `constants` the new ones it computed, by fqn."""

    matches: int
    specs: tuple[object, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict)


GraphPass = Callable[[fx.GraphModule, PassContext], PassResult]


def each_call(rewrite: Callable[[fx.Node], bool]) -> GraphPass:
    """The pass that applies `rewrite` to every call in order; it tells whether it rewrote the call, a match."""

    @functools.wraps(rewrite)
    def graph_pass(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        return PassResult(sum(rewrite(node) for node in calls))

    return graph_pass
