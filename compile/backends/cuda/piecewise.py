"""Piecewise graphs for mixed steps: segments are replayed, attention and the logits are launched op by op.

A step is padded to the next captured number of tokens. A padding token is token 0 at position 0, whose key and value
are not cached; its results are arbitrary and stay in its own row. Attention runs on the step's real tokens, from and to
fixed memory of the pool.

During capture a value is owned until the last part that reads it is captured; later segments may then reuse its memory,
as they would op by op. A replay runs the same parts in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.backends.cuda.graph_api import GraphApi
from fuseline.compile.backends.cuda.segments import Cuts, Segment, SplitOp, Values, cut, map_tensors
from fuseline.compile.graph_inputs import GraphOutput, graph_values, narrowed, padding
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.triton.batch import pad_tokens

Launch = Callable[[Mapping[str, Tensor], int], None]
"""Takes a step's inputs by placeholder name and its number of tokens."""


class TokenInputs:
    """Fixed memory of the segments' inputs for a step of up to `size` tokens: `padded`, by field name."""

    def __init__(self, size: int, num_groups: int, has_rope_switch: bool, device: str) -> None:
        self.padded = padding({"T": size}, num_groups, device)
        self._num_groups = num_groups
        self._has_rope_switch = has_rope_switch
        self._device = device

    def values(self, size: int) -> Values:
        """Graph inputs by placeholder name, for `size` tokens."""
        return graph_values(narrowed(self.padded, {"T": size}), self._has_rope_switch)

    def trial_sequence(self, size: int, block_size: int) -> Values:
        """The other inputs for a single sequence of all tokens, with every block being block 0."""
        # Made on the device: waiting for copies from the host would stall serving.
        tables = padding({"S": 1, "M": -(-size // block_size)}, self._num_groups, self._device)["block_tables"]
        return graph_values({
            "query_start": torch.arange(2, dtype=torch.int32, device=self._device) * size,
            "seq_lens": torch.full((1,), size, dtype=torch.int32, device=self._device),
            "logits_rows": torch.full((1,), size - 1, device=self._device),
            "block_tables": tables,
        })  # fmt: skip


@dataclass(frozen=True)
class MixedGraph:
    launches: tuple[Launch, ...]
    tail: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


@dataclass
class MixedGraphs:
    """Piecewise graphs of any step, by padded number of tokens."""

    executable: CudaExecutable
    caches: Mapping[str, Tensor]
    sizes: tuple[int, ...]
    splitting_ops: tuple[str, ...]
    make_inputs: Callable[[int], TokenInputs]
    block_size: int
    api: GraphApi
    captured: dict[int, MixedGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cuts = cut(self.executable, self.splitting_ops) if self.sizes else None
        if self._cuts is None:
            self.sizes = ()
            return
        self._inputs = self.make_inputs(max(self.sizes))

    def run(self, step: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> GraphOutput | None:
        """Results on the current stream; None if the step's size is not captured.

        `step` by field of StepInputs, `values` by placeholder name, both on the device.
        """
        num_tokens = step["token_ids"].shape[0]
        size = next((size for size in self.sizes if size >= num_tokens), None)
        # A larger captured size is not used: padding could double the tokens.
        graph = self.captured.get(size)
        if graph is None:
            return None
        pad_tokens(self._inputs.padded, step, size)
        for launch in graph.launches:
            launch(values, num_tokens)
        # One row per requested logit; a graph without keep_last_logits computes all tokens.
        return map_tensors(graph.tail(values), lambda result: result[:, :num_tokens])

    def capture(self, size: int, num_warmups: int) -> None:
        results: Values = {}
        for _ in range(max(1, num_warmups)):  # at least one, for the results of split ops
            self.api.warm_up(lambda: results.update(self._trial(size)))
        fixed = {**self.caches, **self._inputs.values(size)}
        self.captured[size] = _Capture(self._cuts, self.api, fixed, results).graph()

    def _trial(self, size: int) -> Values:
        """Runs the parts op by op; returns the results of split ops by name, on meta."""
        inputs = self.make_inputs(size)
        pad_tokens(inputs.padded, inputs.padded, size)  # compiles it before the first replay
        values = {**self.caches, **inputs.values(size), **inputs.trial_sequence(size, self.block_size)}
        last, results = self._cuts.last_uses(), {}
        for at, part in enumerate(self._cuts.parts):
            if isinstance(part, Segment):
                values.update(zip(part.outputs, part.run(*(values[name] for name in part.inputs)), strict=True))
            else:
                found = values[part.name] = part.kernel.run(*part.with_values(values))
                results[part.name] = map_tensors(found, lambda tensor: _like(tensor, torch.device("meta")))
            values = _still_read(values, last, at)
        self._cuts.tail.run(*(values[name] for name in self._cuts.tail.inputs))
        return results


class _Capture:
    """Capture state of one size: `lent` values are read by replays, `owned` ones by later parts; by name."""

    def __init__(self, cuts: Cuts, api: GraphApi, fixed: Values, results: Values) -> None:
        self._cuts, self._api, self._results = cuts, api, results
        self._lent, self._owned = dict(fixed), {}
        launched = [part for part in (*cuts.parts, cuts.tail) if part is cuts.tail or isinstance(part, SplitOp)]
        self._read_later = {name for part in launched for name in part.inputs}

    def graph(self) -> MixedGraph:
        launches, last = [], self._cuts.last_uses()
        for at, part in enumerate(self._cuts.parts):
            launches.append(self._captured(at, part) if isinstance(part, Segment) else self._launched(part))
            self._owned = _still_read(self._owned, last, at)
        tail, lent = self._cuts.tail, self._lent
        return MixedGraph(
            tuple(launches), lambda step: tail.run(*(lent[n] if n in lent else step[n] for n in tail.inputs))
        )

    def _captured(self, at: int, segment: Segment) -> Launch:
        """Captures a segment; memory for results of the split ops after it is allocated from the pool then."""
        behind = []
        for part in self._cuts.parts[at + 1 :]:
            if isinstance(part, Segment):
                break
            behind.append(part.name)
        device = self._lent["token_ids"].device

        def run(*inputs: object) -> tuple:
            made = (map_tensors(self._results[name], lambda t: _like(t, device)) for name in behind)
            return (*segment.run(*inputs), *made)

        inputs = (self._owned[name] if name in self._owned else self._lent[name] for name in segment.inputs)
        replay, found = self._api.capture(run, *inputs)
        for name, value in zip((*segment.outputs, *behind), found, strict=True):
            self._owned[name] = value
            if name in self._read_later or name in behind:
                self._lent[name] = map_tensors(value, self._api.borrowed)
        return lambda step, num_tokens: replay()

    def _launched(self, op: SplitOp) -> Launch:
        args, out = op.with_values(self._lent), self._lent[op.name]

        def launch(step: Mapping[str, Tensor], num_tokens: int) -> None:
            filled = [step[arg.name] if isinstance(arg, fx.Node) else arg for arg in args]
            if op.is_attention:
                filled[0] = filled[0][:, :, :num_tokens]
                _write(op.kernel, out[:, :num_tokens], filled)
            else:
                _write(op.kernel, out, filled)

        return launch


def _still_read(values: Values, last_uses: Mapping[str, int], at: int) -> Values:
    """Values that a part after index `at` reads."""
    return {name: value for name, value in values.items() if last_uses.get(name, -1) > at}


def _write(kernel: Implementation, out: object, args: list) -> None:
    """Writes the kernel's results to existing memory."""
    if kernel.into is not None:
        kernel.into(out, *args)
        return
    found = kernel.run(*args)
    if isinstance(out, Tensor):
        out, found = (out,), (found,)
    for to, result in zip(out or (), found or (), strict=True):
        to.copy_(result)


def _like(shape: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
