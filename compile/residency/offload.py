"""Weights that stay in pinned host memory: each pass copies them to the GPU, one layer ahead of compute.

Two slots on the GPU, each as large as the largest of these layers, take them in turn. On a stream of its own a layer
is copied to the slot that the layer before the last has left:

    compute   layer 6      layer 7      layer 8      ...
    copies    8 -> slot 0  9 -> slot 1  10 -> slot 0 ...

Events order the two, so it is the same op by op and in a captured graph, where the copies are nodes of a fork. Passes
follow each other on one stream; nothing of a slot is used by the next one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import source_of
from fuseline.compile.memory import host_pages
from fuseline.compile.ops.registry import op_of
from fuseline.compile.residency.uploads import Layout, num_bytes, views

NUM_SLOTS = 2


def choose_offloaded(graph: fx.GraphModule, most_bytes: int) -> tuple[Layout, ...]:
    """Weights of products by layer, in the order of the graph: the last ones that fit into `most_bytes`.

    They are named by get_attr target. A weight belongs to the layer whose number is in its parameter's name; those of
    no layer (embedding, head) stay on the GPU.
    """
    layers: dict[int, list[fx.Node]] = {}
    for node in _product_weights(graph):
        if found := re.search(r"(?:^|\.)(\d+)\.", source_of(node).names[0]):
            layers.setdefault(int(found[1]), []).append(node)
    chosen: list[Layout] = []
    for nodes in reversed(layers.values()):
        kept = []
        for node in reversed(nodes):
            value = node.meta["val"]
            if value.nbytes <= most_bytes:
                kept.append(node)
                most_bytes -= value.nbytes
        if kept:
            values = {str(node.target): node.meta["val"] for node in kept[::-1]}
            chosen.append({name: (tuple(value.shape), value.dtype) for name, value in values.items()})
        if len(kept) < len(nodes):
            break
    return tuple(reversed(chosen))


def _product_weights(graph: fx.GraphModule) -> list[fx.Node]:
    """Matrices that one product reads and nothing else, in its order."""
    weights = [
        arg
        for node in graph.graph.nodes
        if (op := op_of(node.target)) and op.is_product
        for arg in node.all_input_nodes
        if arg.op == "get_attr" and len(arg.users) == 1 and arg.meta["val"].ndim > 1
    ]
    times = Counter(source_of(node) for node in weights)
    return [node for node in weights if times[source_of(node)] == 1]


class Lane:
    """A stream for copies beside the current one. Torch's streams of a CPU, for interpreted kernels, do nothing."""

    def __init__(self, device: torch.device) -> None:
        self._streams = torch.get_device_module(device)
        self._stream = self._streams.Stream(device)

    def fork(self) -> None:
        """Orders later copies after the work already enqueued on the current stream."""
        self._stream.wait_stream(self._streams.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> object:
        """Starts the copy and returns an event recorded after it."""
        with self._streams.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def join(self, mark: object) -> None:
        """Orders later work on the current stream after the event."""
        self._streams.current_stream().wait_event(mark)


class Offload:
    """The layers' host memory and their slots on the device, from which the graph reads (passes/stream_weights.py)."""

    def __init__(self, layers: Sequence[Layout], device: torch.device) -> None:
        self.layers = tuple(layers)
        pages, self._device = host_pages(device), device
        self.host = [pages.zeros((num_bytes(layer),), torch.uint8) for layer in self.layers]
        size = max(memory.nbytes for memory in self.host)
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        # A stream that a capture has forked into takes no other work: steps go on meanwhile on theirs.
        self._lane, self._captured_lane = Lane(device), Lane(device)

    @property
    def num_bytes(self) -> int:
        return sum(memory.nbytes for memory in self.host)

    @property
    def keys(self) -> frozenset[str]:
        """Names of all offloaded weights."""
        return frozenset(name for layer in self.layers for name in layer)

    def host_tensors(self) -> dict[str, Tensor]:
        """Host tensors that the weights are loaded into, by name."""
        pairs = zip(self.layers, self.host, strict=True)
        return {name: view for layer, memory in pairs for name, view in views(memory, layer).items()}

    def on_slot(self, index: int) -> tuple[Tensor, ...]:
        """The weights of a layer on the device while the layer computes."""
        return tuple(views(self.slots[index % NUM_SLOTS], self.layers[index]).values())

    def start(self, is_trial: bool) -> Prefetch:
        """Return the prefetch of the next pass on the current stream; a trial uses the slots' present contents."""
        if is_trial:
            return Prefetch(self, None)
        is_captured = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        return Prefetch(self, self._captured_lane if is_captured else self._lane)


class Prefetch:
    """The copies of one pass. Without a lane there are none."""

    def __init__(self, offload: Offload, lane: Lane | None) -> None:
        self._offload, self._lane = offload, lane
        self._marks: list[object] = []
        if lane is not None:
            lane.fork()
            self._send(NUM_SLOTS)

    def fetch(self, index: int) -> tuple[Tensor, ...]:
        """The weights of a layer, for what is launched from now on."""
        if self._lane is not None:
            self._lane.join(self._marks[index])
        return self._offload.on_slot(index)

    def release(self, index: int) -> None:
        """All that reads the layer has been launched: its slot is for the one after the next."""
        if self._lane is not None and index + NUM_SLOTS < len(self._offload.layers):
            self._lane.fork()
            self._send(1)

    def _send(self, count: int) -> None:
        offload, begin = self._offload, len(self._marks)
        for index in range(begin, min(begin + count, len(offload.layers))):
            source = offload.host[index]
            self._marks.append(self._lane.copy(offload.slots[index % NUM_SLOTS][: source.numel()], source))


def without_offloaded(weights: Mapping[str, Tensor], offload: Offload | None) -> dict[str, Tensor]:
    """Weights that are resident on the device, including the slots."""
    if offload is None:
        return dict(weights)
    on_device = {key: tensor for key, tensor in weights.items() if key not in offload.keys}
    return on_device | {f"slot {place}": slot for place, slot in enumerate(offload.slots)}
