"""Converters of transformers.core_model_loading, applied to lazy tensors.

An operation maps {pattern: tensors} to {pattern: tensors}; the patterns of the last one's result are the targets. One
that is not arithmetic on strides is run by Transformers itself, on values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from transformers import core_model_loading as loading
from transformers.core_model_loading import WeightConverter

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.lazy_tensor import LazyTensor
from fuseline.compile.capture.reader import Reader

Tensors = Mapping[str, list[LazyTensor]]


def convert(rule: WeightConverter, taken: Tensors, first: str, model: nn.Module) -> dict[str, LazyTensor]:
    """Target pattern -> tensor. Raises ValueError when the tensors do not fit the rule."""
    current: Tensors = taken
    for operation in rule.operations:
        apply = OPERATIONS.get(type(operation), _run)
        current = apply(operation, current, rule, first, model)
    return {target: _only(tensors) for target, tensors in current.items()}


def _only(tensors: list[LazyTensor]) -> LazyTensor:
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors where one was expected")
    return tensors[0]


def _single(current: Tensors) -> LazyTensor:
    if len(current) != 1:
        raise ValueError(f"only {', '.join(current)} found")
    return next(iter(current.values()))[0]


def _merge(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    alone = len(current) == 1
    return {
        (rule.target_patterns[0] if alone else pattern): [lazy_tensor.stack(tensors, operation.dim)]
        for pattern, tensors in current.items()
    }


def _concatenate(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    parts = [part for pattern in rule.source_patterns for part in current.get(pattern, [])]
    return {operation.get_target_pattern(rule.target_patterns): [lazy_tensor.concatenate(parts, operation.dim)]}


def _chunk(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    whole = _single(current)
    targets = operation.get_target_patterns(rule.target_patterns, config=model.config)
    total = whole.shape[operation.dim]
    size = -(-total // len(targets))
    sizes = [min(size, total - at) for at in range(0, total, size)]
    parts = lazy_tensor.split(whole, sizes, operation.dim)
    return {target: [part] for target, part in zip(targets, parts, strict=True)}


def _split(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    names = [first.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
    sizes = [model.get_parameter(name).shape[operation.dim] for name in names]
    parts = lazy_tensor.split(_single(current), sizes, operation.dim)
    return {target: [part] for target, part in zip(rule.target_patterns, parts, strict=True)}


def _transpose(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    whole = _single(current)
    target = operation.get_target_pattern(current, rule.source_patterns, rule.target_patterns)
    if operation.check_dims and whole.shape == tuple(model.get_parameter(first).shape):
        return {target: [whole]}
    return {target: [lazy_tensor.transpose(whole, operation.dim0, operation.dim1)]}


def _run(operation, current: Tensors, rule: WeightConverter, first: str, model: nn.Module) -> Tensors:
    with Reader() as reader:
        values = {pattern: [reader.value(part) for part in tensors] for pattern, tensors in current.items()}
    made = operation.convert(
        values,
        source_patterns=rule.source_patterns,
        target_patterns=rule.target_patterns,
        full_layer_name=first,
        model=model,
        config=model.config,
        missing_keys=None,
    )
    return {
        target: [lazy_tensor.computed(value) for value in (values if isinstance(values, list) else [values])]
        for target, values in made.items()
    }


OPERATIONS: Mapping[type, Callable[..., Tensors]] = {
    loading.MergeModulelist: _merge,
    loading.Concatenate: _concatenate,
    loading.Chunk: _chunk,
    loading.Split: _split,
    loading.Transpose: _transpose,
}
