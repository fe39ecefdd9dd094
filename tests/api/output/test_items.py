"""Items of an answer: each token's log-probability is in the item whose text it made, also of a token without text."""

from __future__ import annotations

from fuseline.api.output.events import Done, ReasoningDelta, TextDelta
from fuseline.api.output.items import Items
from fuseline.engine.messages import PositionLogprobs


def delta(kind: type, text: str, *tokens: int) -> TextDelta | ReasoningDelta:
    return kind(0, text, list(tokens), [PositionLogprobs(token, -0.5, 1, (), ()) for token in tokens])


def test_tokens_without_text_go_with_the_text_that_follows() -> None:
    """The first bytes of a character, what may begin a stop string, a mark that is hidden."""
    items, told = Items(), []
    events = [
        delta(ReasoningDelta, "Hm", 1), delta(TextDelta, "", 2), delta(TextDelta, "", 3), delta(TextDelta, "🎉", 4),
        delta(TextDelta, "!", 5, 6), delta(TextDelta, "", 7), Done(0, "stop"),
    ]  # fmt: skip
    for event in events:
        told += [
            (item.kind, [p.token_id for p in items.logprobs]) for step, item, _ in items.take(event) if step == "more"
        ]
    assert told == [("reasoning", [1]), ("text", [2, 3, 4]), ("text", [5, 6])]
    assert [[p.token_id for p in item.logprobs] for item in items.all] == [[1], [2, 3, 4, 5, 6]]
    assert items.num_tokens == 7
