"""The order in which a scheduler finishes its requests."""

from __future__ import annotations

from engine_walk_cases import Walk


def finish_order(walk: Walk) -> list[str]:
    order: list[str] = []
    for _ in range(500):
        if not walk.engine.has_work:
            return order
        walk.step()
        done = [name for (name, _), outs in walk.outputs.items() if outs[-1].finish_reason and name not in order]
        order += sorted(done)
    raise AssertionError("the engine does not come to rest")
