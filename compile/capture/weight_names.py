"""From names of the module's parameters to what is stored, by the renaming rules of Transformers.

The rules are those of transformers.conversion_mapping: renamings, all applied in turn, then at most one converter,
which joins or cuts stored tensors (one expert each, w1 beside w3, a joined qkv).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.conversions import convert
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import LazyTensor
from fuseline.compile.capture.stored_parts import part_name, weight_of


@dataclass
class Conversion:
    """One use of a converter: the stored tensors it takes, by the pattern that each matched."""

    rule: WeightConverter
    first: str
    """Name of the first parameter it makes."""
    model: nn.Module
    taken: dict[str, list[LazyTensor]] = field(default_factory=dict)

    def results(self) -> dict[str, LazyTensor]:
        """Parameters by name. Raises LoadError if the stored tensors do not fit together."""
        try:
            made = convert(self.rule, self.taken, self.first, self.model)
        except (ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise LoadError(
                f"{self.first} cannot be made from the {', '.join(self.taken)} of the checkpoint: {error}"
            ) from error
        full = self.first.replace("*.", "0.")
        before, _, after = next((full.partition(target) for target in made if target in full), ("", "", ""))
        return {before + target + after: lazy for target, lazy in made.items()}

    def names(self) -> list[str]:
        """Return the names of `results` without reading any tensor."""
        first = self.rule.target_patterns[0]
        if len(self.rule.target_patterns) == 1 and "*" in first:
            return list(self.results())
        return [self.first.replace(first, target) for target in self.rule.target_patterns]


class StoredWeights:
    """The parameters and persistent buffers of a model that a checkpoint holds, by their name in the model."""

    def __init__(self, stored: Mapping[str, StoredTensor], model: nn.Module) -> None:
        self._direct, self._converted = resolve(stored, model)

    def __contains__(self, name: str) -> bool:
        return name in self._direct or name in self._converted

    def __getitem__(self, name: str) -> LazyTensor:
        if name in self._direct:
            return lazy_tensor.whole(self._direct[name])
        return self._converted[name].results()[name]


def resolve(
    stored: Mapping[str, StoredTensor], model: nn.Module
) -> tuple[dict[str, StoredTensor], dict[str, Conversion]]:
    """Map stored tensors to parameters, directly or by a conversion; tensors of neither kind are unused."""
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    direct: dict[str, StoredTensor] = {}
    conversions: dict[str, Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):
        weight = weight_of(name)
        target, pattern = rename_source_key(weight, renamings, converters, model.base_model_prefix, known)
        if weight != name:
            if target in known and pattern is None:
                direct[part_name(target, name.rpartition(".")[2])] = stored[name]
            continue
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            continue
        if pattern is None:
            direct.setdefault(target, stored[name])
            continue
        if target not in conversions:
            conversions[target] = Conversion(deepcopy(of_pattern[pattern]), target, model)
        conversions[target].taken.setdefault(pattern, []).append(lazy_tensor.whole(stored[name]))
    return direct, {name: conversion for conversion in conversions.values() for name in conversion.names()}
