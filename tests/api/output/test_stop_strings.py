"""Stop strings: which one wins, what is searched, what is let through (SPEC 6.9, 7.4)."""

from __future__ import annotations

import random

import pytest

from fuseline.api.output.stop import StopStrings


def run(pieces: list[str], stops: list[str], include: bool = False, num_unchecked: int = 0) -> tuple[str, str | None]:
    """Text shown of the pieces, of which the first are not checked, and the stop that ended it."""
    strings, shown = StopStrings(stops, include), ""
    for k, piece in enumerate(pieces):
        text, stop = strings.feed(piece, k >= num_unchecked)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + strings.finish(), None


@pytest.mark.parametrize(
    "pieces, stops, shown, stop",
    [
        (["ab cd ef"], ["ef", "cd"], "ab cd ", "ef"),
        (["ab cd ef"], ["cd", "ef"], "ab ", "cd"),
        (["a", "b", "c"], ["bc", "abc"], "a", "bc"),
        (["a", "b", "c"], ["abc", "bc"], "", "abc"),
        (["a", "b", "c"], ["x", "c", "bc"], "ab", "c"),
    ],
)
def test_of_stops_that_one_token_completes_the_first_listed_wins(pieces, stops, shown, stop) -> None:
    assert run(pieces, stops) == (shown, stop)
    assert run(pieces, stops, include=True) == (shown + stop, stop)


def test_what_came_before_min_tokens_is_not_searched() -> None:
    long = "z" * 40  # keeps the whole text in sight
    assert run(["one ", "END ", "two ", "three"], ["END", long], num_unchecked=2) == ("one END two three", None)
    assert run(["one E", "ND"], ["END", long], num_unchecked=1) == ("one ", "END"), "completed by a checked token"
    assert run(["END", "END"], ["END", long], num_unchecked=1) == ("END", "END")


@pytest.mark.parametrize("include", [False, True])
def test_any_cut_of_the_text_gives_what_the_whole_gives(include: bool) -> None:
    pick = random.Random(5)
    for _ in range(300):
        text = "".join(pick.choice("abc") for _ in range(20))
        stop = "".join(pick.choice("abc") for _ in range(pick.randint(1, 4)))
        pieces, at = [], 0
        while at < len(text):
            size = pick.randint(1, 3)
            pieces.append(text[at : at + size])
            at += size
        end = text.find(stop)
        expected = (text, None) if end < 0 else (text[: end + len(stop) * include], stop)
        assert run(pieces, [stop], include) == expected
