"""Op cases by name, and their arguments, for the Triton kernels."""

from __future__ import annotations

import torch
from declared import declared

from fuseline.compile.ops.library import Make

BY_NAME = declared("triton")


def make(dtype=torch.float32) -> Make:
    return Make(dtype, torch.Generator().manual_seed(3))
