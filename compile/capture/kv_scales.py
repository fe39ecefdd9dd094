"""Scales of keys and values that a checkpoint of a quantized model brings for caches of fp8."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.lazy_tensor import whole
from fuseline.compile.capture.load_formats import open_weights
from fuseline.compile.capture.reader import Reader
from fuseline.compile.config import CompileConfig
from fuseline.compile.specs import scale_names

logger = logging.getLogger(__name__)
NAME = re.compile(r"(?:^|\.)(\d+)\.(?:.+\.)?(?:([kv]|kv)_scale|([kv])_proj\.output_scale)$")
"""model.layers.3.self_attn.attn.k_scale, ...self_attn.k_proj.k_scale, ...self_attn.kv_scale (of both), and the older
...self_attn.k_proj.output_scale."""


def stored_scales(config: CompileConfig, layers: Collection[int]) -> dict[str, Tensor]:
    """[1] float32 by the names of the graph's constants. Layers without scales in the checkpoint are left out."""
    if config.load_format == "dummy":
        return {}
    found = find_scales(open_weights(config), layers)
    with Reader() as reader:
        values = {name: reader.value(whole(stored)).float().amax().reshape(1) for name, stored in found.items()}
    good = {name: value for name, value in values.items() if value.isfinite() and value > 0}
    if bad := sorted(values.keys() - good.keys()):
        logger.warning("%s in %s is no scale (%s); 1 is taken", found[bad[0]].name, config.model, float(values[bad[0]]))
    return good


def find_scales(stored: Mapping[str, StoredTensor], layers: Collection[int]) -> dict[str, StoredTensor]:
    """Constants' names -> what is stored for them. A scale of its own goes before one for both."""
    both, own = {}, {}
    for name, tensor in stored.items():
        match = NAME.search(name)
        if match is None or int(match[1]) not in layers:
            continue
        of_keys, of_values = scale_names(int(match[1]))
        kind = match[2] or match[3]
        if kind == "kv":
            both |= {of_keys: tensor, of_values: tensor}
        else:
            own[of_keys if kind == "k" else of_values] = tensor
    return both | own
