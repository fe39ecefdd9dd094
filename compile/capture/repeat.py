"""Capture of a few layers, repeated: a model of L equal layers is exported with three of them.

Layers are of one kind when their modules are alike in all but their number: classes, settings, shapes and dtypes.
Of each kind the first and the last layer are exported, behind layer 0; where the same nodes come out for both, every
layer between gives them too. The graph is cut where modules begin and end, and written out again with L layers. What
does not fit (nodes between layers, layers that read more of each other than one hidden state, modules that count
their layers) gives None, and the whole model is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType

import torch
from torch import fx, nn
from transformers import PreTrainedConfig

PLAIN = (bool, int, float, str, type(None), torch.dtype)
FEW_LAYERS = 6
OF_THE_NUMBER = {"layer_idx", "layer_id", "training"}


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model, and those that are exported in their place."""

    path: str
    """Module path of the layer list."""
    kinds: tuple[int, ...]
    """Kind number of each layer; equal numbers are equal layers."""
    chosen: tuple[int, ...]
    """Numbers of the layers that are exported, layer 0 first."""


def find_layers(model: nn.Module) -> Layers | None:
    """None when nothing would be gained."""
    total = model.config.get_text_config().num_hidden_layers
    path, kinds = layer_kinds(model)
    if not path:
        return None
    of_kind = [[n for n in range(1, total) if kinds[n] == kind] for kind in dict.fromkeys(kinds)]
    chosen = sorted({0} | {n for numbers in of_kind if numbers for n in (numbers[0], numbers[-1])})
    return Layers(path, kinds, tuple(chosen)) if len(kinds) == total and len(chosen) < total else None


def layer_kinds(model: nn.Module) -> tuple[str, tuple[int, ...]]:
    """The path of the list of layers, and of each the first layer that is alike; nothing when there is no such list."""
    text = model.config.get_text_config()
    total = text.num_hidden_layers
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) > 1:  # a part for another medium may have as many
        decoders = [path for path, module in model.named_modules() if getattr(module, "config", None) is text]
        lists = [(path, m) for path, m in lists if any(path.startswith(f"{decoder}.") for decoder in decoders)]
    if len(lists) != 1:
        return "", ()
    path, layers = lists[0]
    types = getattr(text, "layer_types", None) or [None] * total
    seen: dict[object, int] = {}
    kinds = tuple(
        seen.setdefault((layer_type, signature(layer, number)), number)
        for number, (layer, layer_type) in enumerate(zip(layers, types, strict=False))
    )
    return path, kinds


def num_distinct_layers(model: nn.Module) -> int:
    """So many layers from the first on hold one of each kind, with one more that repeats the last kind.

    Where hardly two layers are alike, what they are cannot be told from that: then FEW_LAYERS or all.
    """
    total = model.config.get_text_config().num_hidden_layers
    _, kinds = layer_kinds(model)
    if 2 * len(set(kinds)) > len(kinds):
        return min(total, FEW_LAYERS)
    return min(total, max(kinds[1:] or (0,)) + 3)


def signature(layer: nn.Module, number: int) -> tuple[object, ...]:
    """All that may shape a layer's nodes, its number left out."""
    return tuple((path, *_settings(module, number)) for path, module in layer.named_modules())


def _settings(module: nn.Module, number: int) -> Iterator[object]:
    yield type(module)
    for kind in (module._parameters, module._buffers):
        yield tuple((name, t if t is None else (tuple(t.shape), t.dtype)) for name, t in kind.items())
    for name, value in sorted(vars(module).items()):
        if name in OF_THE_NUMBER:
            yield name, value == number if name != "training" else value
        elif name not in ("_parameters", "_buffers", "_modules", "fuseline_buffers"):
            yield name, _comparable(value)


def _comparable(value: object) -> object:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_comparable(item) for item in value)
    if isinstance(value, (dict, set)) and not value:
        return type(value)
    if isinstance(value, partial):
        return partial, _comparable(value.func), _comparable(value.args), _comparable(tuple(value.keywords.items()))
    # Shared by the layers (the config, functions), or of one of them and then no two are alike.
    return value if isinstance(value, (FunctionType, BuiltinFunctionType, type)) else id(value)


@contextmanager
def only_chosen(model: nn.Module, layers: Layers) -> Iterator[None]:
    """The model with no other layers; its config says so too."""
    parent_path, _, name = layers.path.rpartition(".")
    parent, text = model.get_submodule(parent_path), model.config.get_text_config()
    whole, types = getattr(parent, name), getattr(text, "layer_types", None)
    try:
        setattr(parent, name, nn.ModuleList([whole[number] for number in layers.chosen]))
        text.num_hidden_layers = len(layers.chosen)
        _set_types(text, types and [types[number] for number in layers.chosen])
        yield
    finally:
        setattr(parent, name, whole)
        text.num_hidden_layers = len(whole)
        _set_types(text, types)


def _set_types(text: PreTrainedConfig, types: list[str] | None) -> None:
    if types:
        with suppress(AttributeError):  # some configs compute them: no setter
            text.layer_types = types


@dataclass(frozen=True)
class _Segment:
    """The nodes of one exported layer."""

    nodes: tuple[fx.Node, ...]
    hidden_in: fx.Node
    hidden_out: fx.Node


class _Unlike(Exception):
    """The graph cannot be cut into layers, or two of a kind differ."""


def repeat_layers(graph: fx.Graph, layers: Layers) -> fx.Graph | None:
    """The whole model's graph from that of the chosen layers; None when it cannot be told.

    Nodes have meta "layer": the position of the exported layer they were traced in, or None; get_attr nodes come
    first, named by path with "__" for ".".
    """
    try:
        return _Repeat(graph, layers).run()
    except _Unlike:
        return None


class _Repeat:
    def __init__(self, graph: fx.Graph, layers: Layers) -> None:
        self._layers = layers
        self._prefix = f"{layers.path}."
        self._nodes = list(graph.nodes)
        self._segments = self._cut()
        self._out = fx.Graph()
        self._done: dict[fx.Node, fx.Node] = {}
        self._attributes: dict[str, fx.Node] = {}

    def run(self) -> fx.Graph:
        self._check_kinds()
        self._copy_attributes()
        calls = [node for node in self._nodes if node.op != "get_attr"]
        first, last = (calls.index(self._segments[p].nodes[at]) for p, at in ((0, 0), (-1, -1)))
        for node in calls[:first]:
            self._copy(node)
        hidden = self._done[self._segments[0].hidden_in]
        for number in range(len(self._layers.kinds)):
            hidden = self._copy_layer(number, hidden)
        self._done[self._segments[-1].hidden_out] = hidden
        for node in calls[last + 1 :]:
            self._copy(node)
        return self._out

    def _cut(self) -> list[_Segment]:
        calls = [node for node in self._nodes if node.op != "get_attr"]
        marks = [node.meta.get("layer") for node in calls]
        runs = [[n for n, mark in zip(calls, marks, strict=True) if mark == p] for p in range(len(self._layers.chosen))]
        inside = [mark for mark in marks[marks.index(0) :] if mark is not None] if 0 in marks else []
        begin = marks.index(0) if 0 in marks else 0
        if not all(runs) or marks[begin : begin + len(inside)] != sorted(inside):
            raise _Unlike
        outs = [self._hidden_out(run) for run in runs]
        ins = [self._hidden_in(runs), *outs[:-1]]
        return [_Segment(tuple(run), a, b) for run, a, b in zip(runs, ins, outs, strict=True)]

    def _hidden_out(self, run: list[fx.Node]) -> fx.Node:
        own = set(run)
        outs = [node for node in run if any(user not in own for user in node.users)]
        if len(outs) != 1:
            raise _Unlike
        return outs[0]

    def _hidden_in(self, runs: list[list[fx.Node]]) -> fx.Node:
        """Return the earlier node that only layer 0 reads; other layers read the hidden state instead."""
        read = [{a for node in run for a in node.all_input_nodes if a.op != "get_attr"} for run in runs]
        found = read[0] - set(runs[0]) - set().union(*read[1:])
        if len(found) != 1:
            raise _Unlike
        return found.pop()

    def _check_kinds(self) -> None:
        """Exported layers of one kind have the same nodes."""
        first: dict[int, list[object]] = {}
        for position, number in enumerate(self._layers.chosen):
            nodes = self._canonical(position)
            if first.setdefault(self._layers.kinds[number], nodes) != nodes:
                raise _Unlike

    def _canonical(self, position: int) -> list[object]:
        segment = self._segments[position]
        own = {node: k for k, node in enumerate(segment.nodes)}
        earlier = {node for other in self._segments[:position] for node in other.nodes} - {segment.hidden_in}

        def name(node: fx.Node) -> str:
            if node in earlier:
                raise _Unlike
            if node in own:
                return f"node {own[node]}"
            if node is segment.hidden_in:
                return "hidden"
            return f"own {self._local(node, position)}" if self._is_own(node) else f"shared {node.name}"

        return [
            (node.target, repr(fx.node.map_arg((self._plain_args(node), node.kwargs), name)), str(node.meta["val"]))
            for node in segment.nodes
        ]

    def _plain_args(self, node: fx.Node, number: int = 0) -> tuple[object, ...]:
        """With the layer's number replaced."""
        if node.target is not torch.ops.fuseline.attention.default:
            return node.args
        return (*node.args[:4], number, *node.args[5:])

    def _is_own(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and node.meta["fqn"].startswith(self._prefix)

    def _local(self, node: fx.Node, position: int) -> str:
        """Return the name within the layer. Raises _Unlike for another layer's."""
        number, _, local = node.meta["fqn"].removeprefix(self._prefix).partition(".")
        if int(number) != position:
            raise _Unlike
        return local

    def _position(self, number: int) -> int:
        """Return the index of the exported layer that represents layer `number`."""
        chosen = self._layers.chosen
        if number in chosen:
            return chosen.index(number)
        return next(p for p, n in enumerate(chosen) if p and self._layers.kinds[n] == self._layers.kinds[number])

    def _copy_attributes(self) -> None:
        """A run of one layer's parameters becomes a run of every layer's."""
        of_layer: list[list[fx.Node]] = [[] for _ in self._layers.chosen]
        for node in (n for n in self._nodes if n.op == "get_attr"):
            if self._is_own(node):
                of_layer[int(node.meta["fqn"].removeprefix(self._prefix).partition(".")[0])].append(node)
                continue
            self._flush(of_layer)
            self._done[node] = self._attribute(node, node.meta["fqn"])
        self._flush(of_layer)

    def _flush(self, of_layer: list[list[fx.Node]]) -> None:
        if not any(of_layer):
            return
        for number in range(len(self._layers.kinds)):
            position = self._position(number)
            for node in of_layer[position]:
                self._attribute(node, f"{self._prefix}{number}.{self._local(node, position)}")
        for nodes in of_layer:
            nodes.clear()

    def _attribute(self, like: fx.Node, fqn: str) -> fx.Node:
        node = self._out.create_node("get_attr", fqn.replace(".", "__"))
        node.meta = {"val": like.meta["val"], "fqn": fqn}
        self._attributes[fqn] = node
        return node

    def _copy_layer(self, number: int, hidden: fx.Node) -> fx.Node:
        position = self._position(number)
        segment = self._segments[position]
        own: dict[fx.Node, fx.Node] = {segment.hidden_in: hidden}

        def find(node: fx.Node) -> fx.Node:
            if node in own:
                return own[node]
            if self._is_own(node):
                return self._attributes[f"{self._prefix}{number}.{self._local(node, position)}"]
            return self._done[node]

        for node in segment.nodes:
            own[node] = self._copy(node, find)
            own[node].args = self._plain_args(own[node], number)
        return own[segment.hidden_out]

    def _copy(self, node: fx.Node, find=None) -> fx.Node:
        copy = self._out.node_copy(node, find or self._find)
        copy.meta = {name: value for name, value in node.meta.items() if name != "layer"}
        self._done[node] = copy
        return copy

    def _find(self, node: fx.Node) -> fx.Node:
        if node not in self._done:
            raise _Unlike
        return self._done[node]


def layer_at(path_stack: Sequence[str], list_path: str) -> int | None:
    """Find the layer that a node was traced in, from the paths of the modules around it."""
    marker = f"{list_path}."
    for path in path_stack:
        _, found, rest = path.partition(marker)
        if found:
            return int(rest.partition(".")[0])
    return None
