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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant_name, source_of
from fuseline.compile.memory import host_pages
from fuseline.compile.ops.registry import op_of

NUM_SLOTS = 2
ALIGNMENT = 256  # of weights within a slot in bytes, as torch's allocator has it


@dataclass(frozen=True)
class HostWeight:
    key: str
    begin: int
    """First byte within the layer."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, layer: Tensor) -> Tensor:
        """The weight within the bytes of its layer."""
        return layer[self.begin : self.begin + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class HostLayer:
    weights: tuple[HostWeight, ...]

    @property
    def num_bytes(self) -> int:
        last = self.weights[-1]
        return last.begin + last.num_bytes


def choose_offloaded(graph: fx.GraphModule, num_bytes: int) -> tuple[HostLayer, ...]:
    """Weights of products by layer, in the order of the graph: the last ones that fit into `num_bytes`.

    A weight belongs to the layer whose number is in its name; those of no layer (embedding, head) stay on the GPU.
    """
    layers: dict[int, list[fx.Node]] = {}
    for node in _product_weights(graph):
        if found := re.search(r"(?:^|\.)(\d+)\.", source_of(node).names[0]):
            layers.setdefault(int(found[1]), []).append(node)
    chosen: list[HostLayer] = []
    for nodes in reversed(layers.values()):
        kept = []
        for node in reversed(nodes):
            value = node.meta["val"]
            if value.nbytes <= num_bytes:
                kept.append(node)
                num_bytes -= value.nbytes
        if kept:
            chosen.append(_layer(kept[::-1]))
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


def _layer(nodes: Sequence[fx.Node]) -> HostLayer:
    weights, at = [], 0
    for node in nodes:
        value = node.meta["val"]
        weights.append(HostWeight(constant_name(node), at, tuple(value.shape), value.dtype))
        at += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    return HostLayer(tuple(weights))


class Lane(Protocol):
    """A stream for copies beside the current one; tests have their own."""

    def fork(self) -> None:
        """Order later copies after the work already enqueued on the current stream."""

    def copy(self, target: Tensor, source: Tensor) -> object:
        """Start the copy and return an event recorded after it."""

    def join(self, mark: object) -> None:
        """Order later work on the current stream after the event."""


class CudaLane:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def fork(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def join(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)


class HostLane:
    """Copies for interpreted GPU kernels: a copy is done when the call returns."""

    def fork(self) -> None:
        """Do nothing: all earlier work is done."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def join(self, mark: None) -> None:
        """Everything before is done."""


class Offload:
    """The layers' host memory and their slots on the device, from which the graph reads (passes/stream_weights.py)."""

    def __init__(
        self, layers: Sequence[HostLayer], device: torch.device, make_lane: Callable[[], Lane] | None = None
    ) -> None:
        self.layers = tuple(layers)
        pages, self._device = host_pages(device), device
        self.host = [pages.zeros((layer.num_bytes,), torch.uint8) for layer in self.layers]
        size = max(layer.num_bytes for layer in self.layers)
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        make_lane = make_lane or ((lambda: CudaLane(device)) if device.type == "cuda" else HostLane)
        # A stream that a capture has forked into takes no other work: steps go on meanwhile on theirs.
        self._lane, self._captured_lane = make_lane(), make_lane()

    @property
    def num_bytes(self) -> int:
        return sum(memory.nbytes for memory in self.host)

    @property
    def layer_keys(self) -> list[list[str]]:
        """Keys of the weights of each layer."""
        return [[weight.key for weight in layer.weights] for layer in self.layers]

    @property
    def keys(self) -> frozenset[str]:
        """Keys of all offloaded weights."""
        return frozenset(weight.key for layer in self.layers for weight in layer.weights)

    def host_tensors(self) -> dict[str, Tensor]:
        """Host tensors that the weights are loaded into, by key."""
        pairs = zip(self.layers, self.host, strict=True)
        return {weight.key: weight.view(memory) for layer, memory in pairs for weight in layer.weights}

    def on_slot(self, index: int) -> tuple[Tensor, ...]:
        """The weights of a layer on the device while the layer computes."""
        return tuple(weight.view(self.slots[index % NUM_SLOTS]) for weight in self.layers[index].weights)

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
