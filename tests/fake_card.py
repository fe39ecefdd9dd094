"""A card that is none: tensors on the CPU, kernels interpreted, graphs run again where a card would replay them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import triton_interpreter
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fuseline.compile.backends.cuda_graph import Graph
from fuseline.compile.backends.device_inputs import DeviceInputs, Layout, views
from fuseline.compile.cuda_model import CudaModel
from fuseline.compile.kernels.triton import sampling
from fuseline.compile.target import Target
from fuseline.engine.memory.sizing import Memory
from fuseline.engine.run.card import CardResults, CudaDevice
from fuseline.engine.run.device import Progress, SampleOps

__all__ = ["CARD", "FakeCard", "FakeGraphs", "no_host_sync", "triton_interpreter"]
CARD = Target("cuda", "sm_90", 1, tensors="cpu")
READS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero", "bincount",
    "argwhere", "repeat_interleave",
}  # fmt: skip


class HostSync(AssertionError):
    """The host asked for what only the device knows."""


class FakeGraphs:
    """A graph that runs its ops again. `replays` counts by size, `fails` makes capture raise."""

    def __init__(self, fails: bool = False) -> None:
        self.replays: list[int] = []
        self.captured: list[int] = []
        self._fails = fails

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        run()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        if self._fails:
            raise RuntimeError("out of memory")
        output = run()
        self.captured.append(output.shape[1])

        def replay() -> None:
            self.replays.append(output.shape[1])
            output.copy_(run())

        return Graph(replay, output)


class no_host_sync:
    """Raises HostSync where a card would be waited for: values of tensors read, or results whose size they decide.

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


class FakeCard(CudaDevice):
    """The engine's device over the fake card. What lies on the card is read only through results that were waited for.

    `log`: ("sent" | "read", number of the step). The model's runs and the sampling kernels may wait for nothing.
    """

    def __init__(self, model: CudaModel, peak: int = 1 << 20) -> None:
        self._device = torch.device("cpu")
        self._uploads = DeviceInputs(self._device)
        self._peak = peak
        self._on_card: dict[int, Tensor] = {}
        self.name = "fake card"
        self.ops = SampleOps(waiting_for_nothing(sampling.sample), waiting_for_nothing(sampling.row_logprobs))
        self.graphs = FakeGraphs()
        self.log: list[tuple[str, int]] = []
        self.rehearsed: list[int] = []
        run = model.run
        model.run = lambda *args: self._run(run, *args)

    def guard(self) -> TorchFunctionMode:
        """Raises HostSync where the host reads what lies on the card."""
        return _Reads(self._on_card)

    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 31)

    def rehearse(self, runs: Sequence[Callable[[], None]]) -> int:
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

    def results(self, layout: Layout) -> CardResults:
        results = _FakeResults(layout, self._device, self.log)
        self._note(*results.tensors.values())
        return results

    def _run(self, run: Callable[..., Tensor], inputs, sources=None, sampled=None) -> Tensor:
        with no_host_sync([*vars(inputs).values(), *([] if sources is None else [sources])]):
            logits = run(inputs, sources, sampled)
        self._note(logits)
        return logits

    def _note(self, *tensors: Tensor) -> None:
        """They stay alive, so that no tensor of the host gets their memory."""
        self._on_card |= {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


class _FakeResults(CardResults):
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
    def __init__(self, on_card: dict[int, Tensor]) -> None:
        super().__init__()
        self._on_card = on_card

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and args[0].untyped_storage().data_ptr() in self._on_card:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


def waiting_for_nothing(op: Callable[..., None]) -> Callable[..., None]:
    def guarded(*args: object) -> None:
        with no_host_sync():
            op(*args)

    return guarded
