"""Kernels for GPUs as the registry has them, for the tests that are generated from it."""

from __future__ import annotations

from fuseline.compile.kernels.registry import Implementation, implementations


def declared(maker: str) -> dict[str, Implementation]:
    """By op, the first kernel of a maker ("cuda", "triton") that runs on every GPU; others have tests of their own."""
    found: dict[str, Implementation] = {}
    for op, each in implementations("cuda").items():
        for one in each:
            if one.label.startswith(f"{maker}.") and not one.isas:
                found.setdefault(op, one)
    return found


def without_library() -> dict[str, list[Implementation]]:
    """Kernels that need nothing but Triton and torch, by label: one run, declared for some arguments each."""
    found: dict[str, list[Implementation]] = {}
    for each in implementations("cuda").values():
        for one in each:
            if one.library is None:
                found.setdefault(one.label, []).append(one)
    return found
