"""AutoRound checkpoints (Intel): the tensors of GPTQ or AWQ, as packing_format says, with settings of single layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fuseline.compile.quantization import awq, compressed_tensors, gptq
from fuseline.compile.quantization.published import Method, one_of

FORMS = {
    "auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq", "auto_round:llm_compressor": "compressed-tensors",
}  # fmt: skip
PLAIN_BITS = 16


def read(config: Mapping[str, Any]) -> Method:
    packing = one_of(config.get("packing_format", config.get("backend", "auto_round:auto_gptq")), tuple(FORMS),
                     "auto-round: packing_format")  # fmt: skip
    one_of(config.get("data_type", "int"), ("int",), "auto-round: data_type")
    form = FORMS[str(packing)]
    if form == "awq":
        return awq.read({**config, "zero_point": not config.get("sym")})
    if form == "compressed-tensors":
        return compressed_tensors.read(config)
    own = {_pattern(name): layer for name, layer in (config.get("extra_config") or {}).items()
           if layer.get("bits") != PLAIN_BITS}  # fmt: skip
    return gptq.read({**config, "checkpoint_format": form, "dynamic": own})


def _pattern(name: str) -> str:
    """A name of a module, or already a pattern."""
    return name if re.search(r"[*+?^$()\[\]{}|\\]", name) else f"{re.escape(name)}$"
