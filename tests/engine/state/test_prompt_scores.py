"""Packed log-probabilities of a prompt read as the positions that were put in."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from fuseline.engine.messages import PositionLogprobs, PromptLogprobs
from fuseline.engine.state.prompt_scores import PromptScores


def chunk(begin: int, end: int, num_top: int) -> list[np.ndarray]:
    at = np.arange(begin, end)
    best = at[:, None] * 10 + np.arange(num_top)
    return [at + 7, -at / 4, at + 1, best, -best / 8]


def position(at: int, num_top: int) -> PositionLogprobs:
    best = [at * 10 + k for k in range(num_top)]
    return PositionLogprobs(at + 7, -at / 4, at + 1, tuple(best), tuple(-k / 8 for k in best))


@pytest.mark.parametrize("num_top", [0, 1, 3])
@pytest.mark.parametrize("borders", [[1, 9], [1, 2, 9], [1, 4, 7, 9]])
def test_positions_come_out_as_they_went_in(num_top: int, borders: list[int]) -> None:
    scores = PromptScores(9, num_top)
    for begin, end in zip(borders, borders[1:], strict=False):
        scores.add(begin, *chunk(begin, end, num_top))
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(scores.message()), type=PromptLogprobs)
    expected = [None, *(position(at, num_top) for at in range(1, 9))]
    assert list(packed) == packed[:] == expected and len(packed) == 9
    assert packed[-1] == expected[-1] and packed[2:5] == expected[2:5]
    with pytest.raises(IndexError):
        packed[9]


def test_a_prompt_that_is_computed_anew_replaces_what_was_known() -> None:
    scores = PromptScores(9, 2)
    for begin, end in ((1, 3), (3, 6), (1, 4), (4, 9)):
        scores.add(begin, *chunk(begin, end, 2))
    assert scores.message()[:] == [None, *(position(at, 2) for at in range(1, 9))]


def test_what_has_not_been_computed_is_none() -> None:
    scores = PromptScores(5, 2)
    assert scores.message()[:] == [None] * 5
    scores.add(1, *chunk(1, 3, 2))
    assert scores.message()[:] == [None, position(1, 2), position(2, 2), None, None]


def test_no_more_alternatives_than_the_vocabulary_has() -> None:
    scores = PromptScores(3, 20)
    scores.add(1, *chunk(1, 3, 4))
    assert scores.message()[1] == position(1, 4)
