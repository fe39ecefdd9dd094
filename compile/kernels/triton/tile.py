"""The tile of a product that a Triton program computes at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`rows` times `columns` outputs, `depth` inputs a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """Arguments of a launch."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} {self.num_warps}w {self.num_stages}s"
