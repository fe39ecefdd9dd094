"""A GPU that is none: tensors on the CPU, kernels interpreted, graphs run again where a GPU would replay them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton_interpreter
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.backends.cuda.segments import map_tensors
from fuseline.compile.graph_inputs import StepInputs, StepOutput
from fuseline.compile.kernels.triton import sampling
from fuseline.compile.residency.uploads import DeviceInputs, Layout, views
from fuseline.compile.target import Target
from fuseline.engine.memory.sizing import Memory
from fuseline.engine.run.cuda_device import CudaDevice, CudaResults
from fuseline.engine.run.device import Progress, SampleOps

__all__ = ["GPU", "FakeGpu", "FakeGraphs", "no_host_sync", "triton_interpreter"]
GPU = Target("cuda", "sm_90", 1, tensors="cpu")
READS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero", "bincount",
    "argwhere", "repeat_interleave",
}  # fmt: skip


class HostSync(AssertionError):
    """The host asked for what only the device knows."""


class FakeGraphs:
    """A graph that runs its ops again, over memory that is as wild as a pool's: what nobody owned any more when it was
    captured is NaN after a replay, and so is memory that a graph takes and does not write. A capture that waits for the
    device raises HostSync.

    `captured` and `replays` are sizes of whole steps, `segments` and `segment_replays` numbers of segments. Capture
    raises for what `fails` says of its results. A segment has inputs, a whole step reads fixed memory.
    """

    def __init__(self, fails: Callable[[object], bool] = lambda results: False) -> None:
        self.captured: list[int] = []
        self.replays: list[int] = []
        self.segments = self.segment_replays = 0
        self._fails = fails
        self._results: list[tuple[weakref.ref, Tensor]] = []

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    def capture(self, run: Callable[..., Any], *inputs: object) -> tuple[Callable[[], None], Any]:
        inputs = tuple(map_tensors(value, self.borrowed) for value in inputs)
        with no_host_sync(), Uninitialized():
            results = run(*inputs)
        if self._fails(results):
            raise RuntimeError("out of memory")
        owned = {alias.untyped_storage().data_ptr() for owner, alias in self._results if owner() is not None}
        lost = [alias for _, alias in self._results if alias.untyped_storage().data_ptr() not in owned]
        memory = map_tensors(results, self.borrowed)
        map_tensors(results, lambda tensor: self._results.append((weakref.ref(tensor), self.borrowed(tensor))))
        is_step = not inputs
        size = tensors_of(results)[0].shape[1] if is_step else 0
        self.captured += [size] if is_step else []
        self.segments += not is_step

        def replay() -> None:
            self.replays += [size] if is_step else []
            self.segment_replays += not is_step
            for tensor in lost:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            with Uninitialized():
                again = run(*inputs)
            for to, found in zip(tensors_of(memory), tensors_of(again), strict=True):
                to.copy_(found)

        return replay, results

    def borrowed(self, tensor: Tensor) -> Tensor:
        return tensor.detach()


def tensors_of(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def capture_when_allocated(model: CudaModel, api: FakeGraphs, seen: list[tuple]) -> None:
    """All graphs are there once the model has caches; `seen` gets the progress of their capture."""
    allocate = model.allocate_caches

    def allocate_and_capture(num_blocks: Sequence[int]) -> None:
        allocate(num_blocks)
        model.capture_graphs(lambda *step: seen.append(step), api)
        model.graphs.wait()

    model.allocate_caches = allocate_and_capture


class Uninitialized(TorchDispatchMode):
    """New memory of floats is NaN until it is written."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func._schema.name and out.is_floating_point() and out.device.type == "cpu":
            out.fill_(float("nan"))
        return out


class no_host_sync:
    """Raises HostSync where a GPU would be waited for: values of tensors read, or results whose size they decide.

    Tensors of `host` may be read.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        self._modes = (_Functions({t.data_ptr() for t in host}), _Ops())

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self._host = host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and args[0].data_ptr() not in self._host:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or is_masked:
            raise HostSync(name)
        return func(*args, **(kwargs or {}))


class FakeGpu(CudaDevice):
    """The engine's device over the fake GPU. What lies on the GPU is read only through results that were waited for.

    `log`: ("sent" | "read", number of the step). The model's runs and the sampling kernels may wait for nothing.
    """

    def __init__(self, model: CudaModel, peak: int = 1 << 20) -> None:
        self._device = torch.device("cpu")
        self._uploads = DeviceInputs(self._device)
        self._peak = peak
        self._on_gpu: dict[int, Tensor] = {}
        self.name = "fake GPU"
        self.ops = SampleOps(waiting_for_nothing(sampling.sample), waiting_for_nothing(sampling.row_logprobs))
        self.graphs = FakeGraphs()
        self.log: list[tuple[str, int]] = []
        self.rehearsed: list[int] = []
        run = model.run
        model.run = lambda inputs: self._run(run, inputs)

    def guard(self) -> TorchFunctionMode:
        """Raises HostSync where the host reads what lies on the GPU."""
        return _Reads(self._on_gpu)

    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 31)

    def profile(self, runs: Sequence[Callable[[], None]]) -> int:
        for run in runs:
            run()
        self.rehearsed.append(len(runs))
        return self._peak

    def capture_graphs(self, model: CudaModel, progress: Progress) -> None:
        model.capture_graphs(progress, self.graphs)

    def upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().upload(tensors)
        self._note(*found.values())
        return found

    def results(self, layout: Layout) -> CudaResults:
        results = _FakeResults(layout, self._device, self.log)
        self._note(*results.tensors.values())
        return results

    def _run(self, run: Callable[[StepInputs], StepOutput], inputs: StepInputs) -> StepOutput:
        on_host = [*inputs.fields().values(), *([] if inputs.sources is None else [inputs.sources])]
        with no_host_sync(on_host):
            output = run(inputs)
        self._note(output.logits, *([] if output.hidden is None else [output.hidden]))
        return output

    def _note(self, *tensors: Tensor) -> None:
        """They stay alive, so that no tensor of the host gets their memory."""
        self._on_gpu |= {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


class _FakeResults(CudaResults):
    def __init__(self, layout: Layout, device: torch.device, log: list[tuple[str, int]]) -> None:
        super().__init__(layout, device)
        self._log, self._number = log, sum(kind == "sent" for kind, _ in log)

    def send(self) -> None:
        self._log.append(("sent", self._number))
        self._host = self._memory.clone()

    def read(self) -> dict[str, Tensor]:
        self._log.append(("read", self._number))
        return views(self._host, self._layout)


class _Reads(TorchFunctionMode):
    def __init__(self, on_gpu: dict[int, Tensor]) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and args[0].untyped_storage().data_ptr() in self._on_gpu:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


def waiting_for_nothing(op: Callable[..., None]) -> Callable[..., None]:
    def guarded(*args: object) -> None:
        with no_host_sync():
            op(*args)

    return guarded
