"""Terminal output while the engine starts: a bar per phase, then one table."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

from fuseline.api.config import ServerConfig
from fuseline.engine.messages import EngineReady


class StartupProgress:
    """Callback of `EngineClient.start`: one tqdm bar for each phase, closed when it is complete or the next begins."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._phase = ""
        self._bar: tqdm | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._bar is None or phase != self._phase:
            self.close()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, file=self._out, ascii=" =", dynamic_ncols=True)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def startup_table(config: ServerConfig, ready: EngineReady, address: str = "") -> str:
    """The table printed once the engine is ready: model, level, memory, address."""
    rows = [
        ("model", f"{config.served_model_name[0]} ({ready.architecture})"),
        ("level", config.level_text),
        ("dtype", f"{ready.dtype}, KV cache {ready.kv_cache_dtype}"),
        ("context", f"{ready.max_model_len} tokens"),
        ("KV cache", f"{ready.num_blocks} blocks of {ready.block_size} = {ready.num_blocks * ready.block_size} tokens"),
    ]
    rows += [row for row in ready.table if row[0] not in dict(rows)]
    if address:
        rows.append(("address", f"{address} (web page), {address}/v1 (API)"))
    width = max(len(label) for label, _ in rows)
    line = "-" * min(100, max(width + 2 + len(value) for _, value in rows))
    return "\n".join([line, *(f"{label:<{width}}  {value}" for label, value in rows), line])
