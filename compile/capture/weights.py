"""Weights from a checkpoint into the layout that the lowered graph reads, without a second copy in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from fuseline.compile.cache.files import CacheError
from fuseline.compile.cache.keys import cache_key, optimized_key
from fuseline.compile.cache.store import cache_path, read_cached, write_cached
from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.captured import DTYPES, CapturedModel
from fuseline.compile.capture.checkpoint import CodedTensor, StoredTensor
from fuseline.compile.capture.coded import open_stored, store_coded
from fuseline.compile.capture.dummy import DummyWeights
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import LazyTensor
from fuseline.compile.capture.reader import Reader, write_box
from fuseline.compile.capture.sinks import HostSink, Sink
from fuseline.compile.capture.stored_parts import check_parts, joined, stored_parts
from fuseline.compile.capture.weight_map import Found, RememberedWeights, fingerprint, read_map, write_map
from fuseline.compile.config import CompileConfig, Progress, silent
from fuseline.compile.formats.format import Format, Put, Stored
from fuseline.compile.formats.registry import format_named
from fuseline.compile.gguf.table import is_unpacked, source_of
from fuseline.compile.specs import WeightSource

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
MAX_READERS = 4
"""Threads that read and pack; each holds one block of the file."""


def load_weights(
    requests: Mapping[str, WeightSource],
    captured: CapturedModel,
    config: CompileConfig,
    progress: Progress = silent,
    sink: Sink | None = None,
    weights: WeightFinder | None = None,
) -> dict[str, Tensor]:
    """One tensor per request, in its final layout; equal sources share one. Raises LoadError.

    `sink` is where they come to lie, this machine's memory if none is given; `weights` is where parameters come from,
    the checkpoint if none is given.
    """
    sink = sink or HostSink()
    if weights is None and config.load_format == "dummy":
        weights = DummyWeights(captured, config.seed, sink.device)
    weights = weights or CheckpointWeights(captured, config)
    num_readers = max(1, min(MAX_READERS, torch.get_num_threads()))
    sources = {key: replace(s, names=tuple(captured.tied.get(n, n) for n in s.names)) for key, s in requests.items()}
    # A weight is read once for all of its stored tensors.
    distinct: dict[WeightSource, dict[str, str]] = {}
    for key, source in sources.items():
        distinct.setdefault(replace(source, part=""), {}).setdefault(source.part, key)
    loaded: dict[WeightSource, Tensor] = {}
    # One for each thread: buffers that come and go between small weights tear holes of their size into the heap.
    readers: SimpleQueue[Reader] = SimpleQueue()
    with ThreadPoolExecutor(num_readers) as pool, ExitStack() as stack:
        for _ in range(num_readers):
            readers.put(stack.enter_context(Reader()))
        tensors = pool.map(lambda item: _load(*item, weights, captured, readers, sink), distinct.items())
        for done, (source, stored) in enumerate(zip(distinct, tensors, strict=True)):
            loaded |= {replace(source, part=part): tensor for part, tensor in stored.items()}
            progress("loading", done + 1, len(distinct))
    sink.finish()
    weights.remember()
    return {key: loaded[source] for key, source in sources.items()}


class WeightFinder(Protocol):
    """A source of parameters."""

    origin: str

    def find(self, name: str) -> LazyTensor | None: ...

    def remember(self) -> None: ...


class CheckpointWeights:
    """The checkpoint by the names of the model. Only values of tied parameters are read, to compare them."""

    def __init__(self, captured: CapturedModel, config: CompileConfig) -> None:
        """Raises LoadError for a damaged checkpoint, or if parameters that the model ties have different values."""
        folder = Path(config.model)
        self._config, self.origin = config, str(source_of(folder)) if is_unpacked(folder) else config.model
        self._stored = open_stored(config)
        self._alike = alike(captured.tied)
        key = cache_key(config)
        name = hashlib.sha256(f"{key} {fingerprint(self._stored)}".encode()).hexdigest()
        self._map_path = key and cache_path(config, "weights", name)
        found = self._map_path and read_cached(self._map_path, self._read_map, "it is made anew")
        self._known = RememberedWeights(found, lambda: resolve(self._stored, captured, config))
        with Reader() as reader:
            self._check_tied(reader)

    def _read_map(self, body: bytes) -> Found:
        try:
            return read_map(body, self._stored)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"it is no map of {self.origin} ({type(error).__name__})") from error

    def remember(self) -> None:
        """Save the locations of all requested tensors for the next start."""
        body = write_map(self._known.found) if self._known.is_new and self._map_path else None
        if body is not None:
            lowered = cache_path(self._config, "models", optimized_key(self._config) or "")
            write_cached(self._map_path, lambda: body, earlier=lowered)

    def find(self, name: str) -> LazyTensor | None:
        """Return the lazy tensor of parameter or buffer `name`; tied names share the stored one."""
        found = (self._known.get(other) for other in self._alike.get(name, (name,)))
        return next((lazy for lazy in found if lazy is not None), None)

    def _check_tied(self, reader: Reader) -> None:
        for first, *others in self._alike.values():
            for other in others:
                one, two = self._known.get(first), self._known.get(other)
                if one is not None and two is not None and not equal(one, two, reader):
                    raise LoadError(
                        f"{first} and {other} differ in {self.origin}, but config.json ties them: "
                        "set tie_word_embeddings to false there or among the overrides"
                    )


def alike(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """First parameter -> itself and those that share its memory."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, first in tied.items():
        groups[first] = (*groups.get(first, (first,)), name)
    return groups


def equal(one: LazyTensor, two: LazyTensor, reader: Reader) -> bool:
    """Whether two stored tensors have the same values."""
    places = [[(p.stored.path, p.stored.begin) for p in lazy.slices if p.stored] for lazy in (one, two)]
    return places[0] == places[1] or torch.equal(reader.value(one), reader.value(two))


def resolve(
    stored: Mapping[str, StoredTensor], captured: CapturedModel, config: CompileConfig
) -> Mapping[str, LazyTensor]:
    """Map stored tensors to parameters by Transformers' own rules. Raises CaptureError, LoadError."""
    from fuseline.compile.capture.hf_model import build_on_meta, load_config
    from fuseline.compile.capture.weight_names import StoredWeights

    return StoredWeights(stored, build_on_meta(load_config(config), captured.dtype, config.trust_remote_code))


def _load(
    source: WeightSource,
    keys: Mapping[str, str],
    weights: WeightFinder,
    captured: CapturedModel,
    readers: SimpleQueue[Reader],
    sink: Sink,
) -> dict[str, Tensor]:
    """The stored tensors of a weight by part; `keys`: the request of each, by part."""
    form = format_named(source.format)
    parts = stored_parts(source, form, weights.find)
    lazy, dtype = _gather(source, weights, captured) if parts is None else _joined_shape(source, captured)
    final = getattr(torch, source.dtype) if source.dtype else dtype
    shapes = form.shapes(lazy.shape, final)
    if parts is not None:
        check_parts(parts, shapes, source)
    # A part that no constant is may still be needed to make the others.
    stored = {part: sink.zeros(keys.get(part, ""), shape, kind) for part, (shape, kind) in shapes.items()}
    reader = readers.get()
    try:
        if parts is not None:
            _copy(parts, stored, reader, sink)
        elif form.layout is not None:
            store_coded(form, lazy, dtype, stored, reader)
        elif form.is_blockwise or sink.device.type == "cpu":
            _store(form, lazy, (dtype, final), stored, reader, sink.write)
        else:
            made = {part: torch.zeros(shape, dtype=kind) for part, (shape, kind) in shapes.items()}
            _store(form, lazy, (dtype, final), made, reader, write_box)
            for part, tensor in made.items():
                sink.write(stored[part], tensor, (0,) * tensor.ndim)
    finally:
        readers.put(reader)
    return stored


def _copy(parts: Mapping[str, LazyTensor], stored: Mapping[str, Tensor], reader: Reader, sink: Sink) -> None:
    """Copies a weight that the checkpoint holds in its format."""
    for part, lazy in parts.items():
        for one in lazy.slices:
            for start, block in reader.blocks(one):
                sink.write(stored[part], block, start)


def _store(
    form: Format, lazy: LazyTensor, dtypes: tuple[torch.dtype, torch.dtype], stored: Stored, reader: Reader, put: Put
) -> None:
    """Converts a weight to its format, block by block. `dtypes`: of the model, and of the stored values."""
    dtype, final = dtypes
    for take in filter(None, (form.scan, form.write)):
        for part in lazy.slices:
            for start, block in reader.blocks(part):
                # For every storage dtype, the model computes with values rounded to its own dtype.
                # Packing casts, too, but only the dtypes of models: no float64.
                is_cast = block.dtype in DTYPES.values() and dtype == final
                value = block if is_cast or block.dtype == dtype else block.to(dtype)
                # Dummy weights of a GPU are made there.
                take(stored, value if form.is_blockwise else value.cpu(), start, put)


def _joined_shape(source: WeightSource, captured: CapturedModel) -> tuple[LazyTensor, torch.dtype]:
    """A weight as the model has it, without values."""
    wanted = [expected(name, captured) for name in source.names]
    return lazy_tensor.concatenate([lazy_tensor.zeros(shape) for shape, _ in wanted], 0), wanted[0][1]


def _gather(source: WeightSource, weights: WeightFinder, captured: CapturedModel) -> tuple[LazyTensor, torch.dtype]:
    """All parts of the source, joined but not read, and the dtype the model has them in."""
    pads = source.pads or (0,) * len(source.names)
    parts = [
        None if pad else _part(name, source, weights, captured) for name, pad in zip(source.names, pads, strict=True)
    ]
    real = [part for part in parts if part is not None]
    shape = real[0][0].shape[1:]
    whole = [part[0] if part else lazy_tensor.zeros((pad, *shape)) for part, pad in zip(parts, pads, strict=True)]
    return joined(whole, source), real[0][1]


def _part(
    name: str, source: WeightSource, weights: WeightFinder, captured: CapturedModel
) -> tuple[LazyTensor, torch.dtype]:
    shape, dtype = expected(name, captured)
    lazy = weights.find(name)
    if lazy is None and name in captured.constants:
        lazy = lazy_tensor.computed(captured.constants[name])
    if lazy is None:
        raise LoadError(f"{name} is not in the weights of {weights.origin}: the checkpoint is not complete")
    file = next((str(part.stored.path) for part in lazy.slices if part.stored), weights.origin)
    if lazy.shape != shape:
        told = next((part.stored.told for part in lazy.slices if isinstance(part.stored, CodedTensor)), name)
        raise LoadError(
            f"{told} in {file} has shape {list(lazy.shape)}, "
            f"but config.json makes it {list(shape)}: they do not belong together"
        )
    if dtype.is_floating_point and any(part.view.dtype in INTEGERS for part in lazy.slices):
        raise LoadError(
            f"{name} in {file} is stored as integers, which format {source.format} does not read: "
            "the checkpoint is quantized, but its config.json has no quantization_config"
        )
    lazy = _heads(lazy, *source.heads) if source.heads else lazy
    lazy = lazy_tensor.viewed(lazy, source.shape) if source.shape else lazy
    return (lazy_tensor.transpose(lazy, -2, -1) if source.transpose else lazy), dtype


def _heads(lazy: LazyTensor, num_heads: int, begin: int, end: int) -> LazyTensor:
    """Rows [begin, end) of each head's, [heads, rows, inputs]."""
    size = lazy.shape[0] // num_heads
    return lazy_tensor.stack(
        [lazy_tensor.narrow(lazy, 0, head * size + begin, head * size + end) for head in range(num_heads)], 0
    )


def expected(name: str, captured: CapturedModel) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype that the model has for a parameter or buffer."""
    if name in captured.parameters:
        return captured.parameters[name]
    if name in captured.constants:
        return tuple(captured.constants[name].shape), captured.constants[name].dtype
    raise LoadError(f"the model has no parameter {name}")
