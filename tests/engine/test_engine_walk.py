"""Random walks over the engine with the fake model: whatever happens around a request, its tokens stay the same."""

from __future__ import annotations

import pytest
from engine_walk_cases import (
    LAYOUTS,
    ORDERS,
    Walk,
    actions,
    make_engine,
    take_actions,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=actions,
    num_blocks=st.integers(16, 30),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    partial=st.integers(1, 3),
    threshold=st.sampled_from([None, 20]),
    host=st.sampled_from([0, 5, 60]),
)
def test_tokens_do_not_depend_on_what_happens_around(
    layout, order, actions, num_blocks, policy, caching, partial, threshold, host
) -> None:
    windows = LAYOUTS[layout]
    engine = make_engine(
        windows, num_blocks, threshold, host, scheduling_policy=policy, enable_prefix_caching=caching,
        max_num_partial_prefills=partial, max_long_partial_prefills=max(1, partial - 1), order=order,
    )  # fmt: skip
    walk = Walk(engine)
    take_actions(walk, actions)
    walk.finish()
    walk.check_all(windows, threshold)
