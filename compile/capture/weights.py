"""Weights from a checkpoint into the layout that the lowered graph reads, without a second copy in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.capture import pieces
from fuseline.compile.capture.checkpoint import open_checkpoint
from fuseline.compile.capture.dummy import DummyWeights
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.export import CapturedModel
from fuseline.compile.capture.hf_model import build_on_meta
from fuseline.compile.capture.panels import empty_panels, pack_block
from fuseline.compile.capture.pieces import Unread
from fuseline.compile.capture.reader import Reader, write_box
from fuseline.compile.capture.weight_names import StoredWeights
from fuseline.compile.config import CompileConfig
from fuseline.compile.specs import WeightSource

Progress = Callable[[str, int, int], None]


def load_weights(
    requests: Mapping[str, WeightSource],
    captured: CapturedModel,
    config: CompileConfig,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """One tensor per request, in its final layout; equal sources share one. Raises LoadError."""
    weights = open_weights(captured, config)
    sources = {key: replace(s, names=tuple(captured.tied.get(n, n) for n in s.names)) for key, s in requests.items()}
    loaded: dict[WeightSource, Tensor] = {}
    with Reader() as reader:
        weights.check_tied(reader)
        for done, source in enumerate(sources.values()):
            if source not in loaded:
                loaded[source] = _load(source, weights, captured, reader)
            if progress:
                progress("loading", done + 1, len(requests))
    return {key: loaded[source] for key, source in sources.items()}


class CheckpointWeights:
    """The checkpoint by the names of the model; nothing is read."""

    def __init__(self, captured: CapturedModel, config: CompileConfig) -> None:
        self.origin = config.model
        model = build_on_meta(captured.config, captured.dtype, config.trust_remote_code)
        self._stored = StoredWeights(open_checkpoint(Path(config.model), config.load_format), model)
        self._alike = alike(captured.tied)

    def find(self, name: str) -> Unread | None:
        """What becomes the parameter or buffer `name`; for a tied one, whichever of them is stored."""
        return next((self._stored[other] for other in self._alike.get(name, (name,)) if other in self._stored), None)

    def check_tied(self, reader: Reader) -> None:
        """Raises LoadError if parameters that the model ties are stored with different values."""
        for first, *others in self._alike.values():
            for other in others:
                if first in self._stored and other in self._stored and not self._equal(first, other, reader):
                    raise LoadError(
                        f"{first} and {other} differ in {self.origin}, but config.json ties them: "
                        "set tie_word_embeddings to false there or among the overrides"
                    )

    def _equal(self, first: str, second: str, reader: Reader) -> bool:
        one, two = self._stored[first], self._stored[second]
        places = [[(p.stored.path, p.stored.begin) for p in unread.pieces if p.stored] for unread in (one, two)]
        return places[0] == places[1] or torch.equal(reader.value(one), reader.value(two))

    def origin_of(self, unread: Unread) -> str:
        return next((str(piece.stored.path) for piece in unread.pieces if piece.stored), self.origin)


def alike(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """First parameter -> itself and those that share its memory."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, first in tied.items():
        groups[first] = (*groups.get(first, (first,)), name)
    return groups


def open_weights(captured: CapturedModel, config: CompileConfig) -> CheckpointWeights | DummyWeights:
    """Where parameters come from."""
    if config.load_format == "dummy":
        return DummyWeights(captured, config.seed)
    return CheckpointWeights(captured, config)


def _load(
    source: WeightSource, weights: CheckpointWeights | DummyWeights, captured: CapturedModel, reader: Reader
) -> Tensor:
    unread, dtype = _gather(source, weights, captured)
    final = getattr(torch, source.dtype) if source.dtype else dtype
    target = empty_panels(unread.shape, final) if source.layout == "panels" else torch.zeros(unread.shape, dtype=final)
    for piece in unread.pieces:
        for start, block in reader.blocks(piece):
            # The model computes with values rounded to its own dtype, whatever is stored before and after.
            value = block if dtype in (block.dtype, final) else block.to(dtype)
            _write(target, value, start, source.layout)
    return target


def _gather(
    source: WeightSource, weights: CheckpointWeights | DummyWeights, captured: CapturedModel
) -> tuple[Unread, torch.dtype]:
    """All parts of the source, joined but not read, and the dtype the model has them in."""
    pads = source.pads or (0,) * len(source.names)
    parts = [
        None if pad else _part(name, source, weights, captured) for name, pad in zip(source.names, pads, strict=True)
    ]
    real = [part for part in parts if part is not None]
    shape = real[0][0].shape[1:]
    whole = [part[0] if part else pieces.zeros((pad, *shape)) for part, pad in zip(parts, pads, strict=True)]
    try:
        return pieces.concatenate(whole, 0), real[0][1]
    except ValueError as error:
        raise LoadError(f"{' + '.join(source.names)}: {error}") from error


def _part(
    name: str, source: WeightSource, weights: CheckpointWeights | DummyWeights, captured: CapturedModel
) -> tuple[Unread, torch.dtype]:
    shape, dtype = expected(name, captured)
    unread = weights.find(name)
    if unread is None and name in captured.constants:
        unread = pieces.computed(captured.constants[name])
    if unread is None:
        raise LoadError(f"{name} is not in the weights of {weights.origin}: the checkpoint is not complete")
    if unread.shape != shape:
        raise LoadError(
            f"{name} in {weights.origin_of(unread)} has shape {list(unread.shape)}, "
            f"but config.json makes it {list(shape)}: they do not belong together"
        )
    return (pieces.transpose(unread, -2, -1) if source.transpose else unread), dtype


def expected(name: str, captured: CapturedModel) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype that the model has for a parameter or buffer."""
    if name in captured.parameters:
        return captured.parameters[name]
    if name in captured.constants:
        return tuple(captured.constants[name].shape), captured.constants[name].dtype
    raise LoadError(f"the model has no parameter {name}")


def _write(target: Tensor, block: Tensor, start: tuple[int, ...], layout: str) -> None:
    if layout == "rows":
        write_box(target, block, start)
    elif block.ndim == 2:
        pack_block(target, block, *start)
    else:
        for expert, matrix in enumerate(block, start[0]):
            pack_block(target[expert], matrix, *start[1:])
