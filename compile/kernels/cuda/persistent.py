"""Several calls of the library as one launch: the persistent kernel of csrc/cuda/persistent.cu.

A Recorder stands in the place of the library. It keeps calls that the kernel has a step for, in their order, and
launches them together as soon as something else would be launched: another function of the library, or, within
`recording_steps`, an op of torch. So whatever is called, everything is computed in the order of the calls.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.cuda.library import BULK_ISAS, DTYPES, CudaLibrary, Overlap
from fuseline.compile.kernels.registry import Implementation, OpCall, implementations
from fuseline.compile.ops.library import op_name
from fuseline.compile.ops.registry import op_of
from fuseline.compile.target import Target

KINDS = ("linear", "linear_act_mul", "norm", "rope_cache")
"""Functions that are steps; their codes (StepKind of csrc/cuda/persistent.h) are their places."""
PRODUCTS = KINDS[:2]
PREFETCH = len(KINDS)
MOST_STEPS = 10
"""Of a launch, kMostSteps of persistent.h."""
MOST_AHEAD = 32 << 20
"""Bytes of a weight that a launch has L2 fetch for the next one: two thirds of an H200's cache."""
LABEL = "cuda.persistent"
HALF = (DTYPES[torch.bfloat16], DTYPES[torch.float16])
aten = torch.ops.aten
ALLOCATES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""Ops of torch that launch nothing, as views do."""


class Recorder:
    """Takes calls as CudaLibrary does. Weights of products must be constants: they are read ahead of their turn.

    `ahead` holds the weights that are read first behind each launch, in order: L2 fetches them meanwhile.
    """

    def __init__(self, library: CudaLibrary, ahead: Sequence[Tensor] = ()) -> None:
        self._library = library
        self._ahead = iter(ahead)
        self._steps: list[tuple[str, Tensor, dict[str, Tensor | int | float | None]]] = []

    def call(self, name: str, on: Tensor, **fields: Tensor | int | float | None) -> None:
        """As CudaLibrary.call, perhaps later."""
        if not _is_step(name, fields):
            self.launch()
            self._library.call(name, on, **fields)
            return
        if self._steps and (len(self._steps) == MOST_STEPS - 1 or self._steps[0][2]["dtype"] != fields["dtype"]):
            self.launch()
        self._steps.append((name, on, fields))  # holds what it reads and writes

    def launch(self) -> None:
        """Launches the calls that are kept, if there are any."""
        steps, self._steps = self._steps, []
        products = [k for k, (name, *_) in enumerate(steps) if name in PRODUCTS]
        if len(steps) < 2 or not products:  # nothing to read ahead
            for name, on, fields in steps:
                self._library.call(name, on, **fields)
            return
        records = [_record(KINDS.index(name), self._library.pack(name, fields)) for name, _, fields in steps]
        if (weight := next(self._ahead, None)) is not None:
            fetched = struct.pack("qq", weight.data_ptr(), min(weight.nbytes, MOST_AHEAD))
            records.insert(products[-1] + 1, _record(PREFETCH, fetched))
        program = ctypes.create_string_buffer(b"".join(records))
        _, on, fields = steps[0]
        self._library.call(
            "persistent", on, steps=ctypes.addressof(program), num_steps=len(records), dtype=fields["dtype"]
        )


def _record(kind: int, call: bytes) -> bytes:
    return struct.pack("qq", kind, len(call)) + call


def _is_step(name: str, fields: Mapping[str, object]) -> bool:
    """Half precision, also of caches."""
    return name in KINDS and fields["dtype"] in HALF and fields.get("cache_dtype", fields["dtype"]) == fields["dtype"]


class _LaunchFirst(TorchDispatchMode):
    """Has a recorder launch what it keeps before torch launches anything."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not (func.is_view or func.overloadpacket in ALLOCATES):
            self._recorder.launch()
        return func(*args, **(kwargs or {}))


@contextmanager
def recording_steps(library: CudaLibrary, ahead: Sequence[Tensor] = ()) -> Iterator[Recorder]:
    """A recorder that launches before torch does, and what is left at the end."""
    recorder = Recorder(library, ahead)
    with _LaunchFirst(recorder):
        yield recorder
    recorder.launch()


@dataclass(frozen=True, eq=False)
class PersistentRun:
    """A chain of ops, one launch where nothing but steps is called; `body` takes what stands for the library first."""

    library: CudaLibrary
    body: Callable
    ahead: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: object) -> tuple:
        with recording_steps(self.library, self.ahead) as recorder:
            return self.body(recorder, *inputs)


def library_of_runs(target: Target) -> CudaLibrary | None:
    """The library where it has the persistent kernel; the weights of runs are constants, so that all calls overlap."""
    library = cuda_library.library_for(target) if target.isa in BULK_ISAS else None
    return None if library is None else library.overlapping(Overlap.WEIGHTS)


def step_of(call: OpCall) -> Implementation | None:
    """What makes the calls of a run for an op, with the library as its first argument; None for what is no step."""
    op = op_of(call.op)
    if op is None or (op.is_product and not _is_kept(call, op.weights)):
        return None
    found = implementations("cuda").get(op_name(call.op), ())
    return next((one for one in found if one.is_step and one.supports(*call.args)), None)


def _is_kept(call: OpCall, weights: Sequence[str]) -> bool:
    """Whether nothing on the device writes the weights that a call has."""
    given = dict(zip((argument.name for argument in call.op._schema.arguments), call.args, strict=False))
    return all(given.get(name) is None or name in call.kept for name in weights)
