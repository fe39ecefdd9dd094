"""Regions of a plan that torch computes: a run of ops with its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fuseline.compile.graph.edit import reached, tensors_of
from fuseline.compile.ops.library import op_name


@dataclass
class Region:
    """Nodes that torch computes, views included. Only `outputs`, which other nodes read, are copied into the arena."""

    mark: int | None = None
    """The region's number from cut_regions."""
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    """Tensors from outside."""
    outputs: list[tuple[fx.Node, int | None]] = field(default_factory=list)
    """Nodes, each with the index of the result if it has several."""

    @property
    def kind(self) -> str:
        return f"region of {[node.name for node in self.nodes]}"


def draw_borders(regions: Sequence[Region], values: Mapping[fx.Node, object]) -> set[int]:
    """Completes regions that hold only computed nodes. Returns the storages that nothing outside reads."""
    borders = _Borders(regions, values)
    inside: set[int] = set()
    for region in regions:
        inside |= borders.draw(region)
    return inside


def ops_of(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the ops that compute tensors, views left out."""
    calls = (node for node in nodes if node.op == "call_function" and tensors_of(node.meta.get("val")))
    return {op_name(node.target) for node in calls if not getattr(node.target, "is_view", True)}


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Borders:
    def __init__(self, regions: Sequence[Region], values: Mapping[fx.Node, object]) -> None:
        self._values = values
        self._order = {node: k for k, node in enumerate(values)}
        self._keys = {node: {storage_key(t) for t in tensors_of(value)} for node, value in values.items()}
        computed = {node for region in regions for node in region.nodes}
        self._views: dict[int, list[fx.Node]] = {}
        for node, keys in self._keys.items():
            for key in keys if node not in computed else ():
                self._views.setdefault(key, []).append(node)

    def draw(self, region: Region) -> set[int]:
        computed = set(region.nodes)
        made = {key for node in region.nodes for key in self._keys[node] if self._is_made_by(node, key)}
        inner = computed | {view for key in made for view in self._views.get(key, ())}
        # The nodes, and the inner views that they read.
        needed = reached(region.nodes, lambda node: [arg for arg in node.all_input_nodes if arg in inner])
        leaving = {
            key for node in inner if any(user not in inner for user in node.users) for key in self._keys[node] & made
        }
        region.nodes = sorted(needed, key=self._order.__getitem__)
        read = (arg for node in region.nodes for arg in node.all_input_nodes if arg not in needed)
        region.inputs = list(dict.fromkeys(arg for arg in read if self._keys[arg]))
        region.outputs = self._outputs([node for node in region.nodes if node in computed], leaving)
        return made - leaving

    def _is_made_by(self, node: fx.Node, key: int) -> bool:
        """Whether the op allocated this storage: none of its arguments shares it."""
        return all(key not in self._keys[arg] for arg in node.all_input_nodes)

    def _outputs(self, nodes: list[fx.Node], leaving: set[int]) -> list[tuple[fx.Node, int | None]]:
        """For each storage that leaves the region, the first result that covers all of it."""
        outputs, seen = [], set()
        for node in nodes:
            value = self._values[node]
            for index, tensor in enumerate(tensors_of(value)):
                if storage_key(tensor) in leaving - seen:
                    seen.add(storage_key(tensor))
                    outputs.append((node, None if isinstance(value, Tensor) else index))
        return outputs
