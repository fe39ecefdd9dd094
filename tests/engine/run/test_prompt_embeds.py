"""Positions that are fed by embeddings in place of their tokens."""

from __future__ import annotations

import numpy as np
import pytest
from engine_walk_cases import LAYOUTS, ORDERS, Walk, actions, make_engine, take_actions
from fake_model import HIDDEN_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseline.engine.messages import PromptEmbeds

PROMPT = list(range(1, 15))
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)


def span(start: int, count: int, first: int) -> PromptEmbeds:
    """Embeddings that the fake model tells apart by `first`."""
    rows = np.zeros((count, HIDDEN_SIZE), np.float32)
    rows[:, 0] = np.arange(first, first + count)
    return PromptEmbeds(start, count, rows.tobytes())


@EACH_ORDER
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=actions,
    prompts=st.lists(
        st.tuples(st.integers(2, 30), st.integers(0, 10), st.integers(1, 12), st.integers(0, 2), st.integers(1, 3)),
        max_size=6,
    ),
    num_blocks=st.integers(16, 30),
    host=st.sampled_from([0, 60]),
)
def test_rows_with_embeddings_among_others(layout, order, actions, prompts, num_blocks, host) -> None:
    """In chunks, with cached prefixes, preempted, beside requests of tokens alone."""
    windows = LAYOUTS[layout]
    walk = Walk(make_engine(windows, num_blocks, None, host, order=order))
    for length, start, count, first, n in prompts:
        start = min(start, length - 1)
        embeds = [span(start, min(count, length - start), first)]
        walk.submit([7] * length, max_tokens=6, n=n, temperature=0.0 if n == 2 else 1.0, embeds=embeds)
        walk.step()
    take_actions(walk, actions)
    walk.finish()
    walk.check_all(windows)


@EACH_ORDER
def test_equal_tokens_with_other_embeddings_share_no_block(order) -> None:
    walk = Walk(make_engine(order=order))
    cached = []
    for embeds in (
        [],
        [span(5, 3, 0)],
        [span(5, 3, 0)],
        [span(5, 3, 1)],
        [span(6, 3, 0)],
        [span(5, 3, 0), span(8, 1, 0)],
    ):
        name = walk.submit(PROMPT, max_tokens=2, embeds=embeds)
        walk.finish()
        cached.append(walk.outputs[name, 0][0].num_cached_tokens)
    assert cached == [0, 4, 12, 4, 4, 8]
    walk.check_all((0,))


@pytest.mark.parametrize(
    "embeds",
    [span(12, 3, 0), span(-1, 2, 0), PromptEmbeds(0, 2, b"1234"), PromptEmbeds(0, 0, b"")],
    ids=["beyond", "before", "size", "none"],
)
def test_bad_embeddings_fail_their_request(embeds) -> None:
    walk = Walk(make_engine())
    name = walk.submit(PROMPT, embeds=[embeds])
    walk.finish()
    output = walk.outputs[name, 0][0]
    assert output.is_bad_request and f"embeddings at {embeds.start} must be float32" in output.error
