"""From names of the module's parameters to what is stored, by the renaming rules of Transformers."""

from __future__ import annotations

from collections.abc import Mapping

from fuseline.compile.capture import pieces
from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.export import CapturedModel
from fuseline.compile.capture.hf_model import build_on_meta
from fuseline.compile.capture.pieces import Unread
from fuseline.compile.config import CompileConfig
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class CheckpointWeights:
    """The checkpoint as the module names it; nothing is read."""

    def __init__(self, stored: Mapping[str, StoredTensor], captured: CapturedModel, config: CompileConfig) -> None:
        self.origin = config.model
        model = build_on_meta(captured.config, captured.dtype, config.trust_remote_code)
        self._found = resolve(stored, model)
        self._alike = alike(captured.tied)

    def find(self, name: str) -> Unread | None:
        """What becomes the parameter or buffer `name`; for a tied one, whichever of them is stored."""
        return next((self._found[other] for other in self._alike.get(name, (name,)) if other in self._found), None)

    def origin_of(self, unread: Unread) -> str:
        return next((str(piece.stored.path) for piece in unread.pieces if piece.stored), self.origin)


def alike(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Parameter -> itself and those that share its memory."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, first in tied.items():
        groups[first] = (*groups.get(first, (first,)), name)
    return groups


def resolve(stored: Mapping[str, StoredTensor], model: nn.Module) -> dict[str, Unread]:
    """Parameters and persistent buffers of the model that the checkpoint holds, by their name in the model."""
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, Unread] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is None and renamed in known:
            found[renamed] = pieces.whole(stored[name])
    return found
