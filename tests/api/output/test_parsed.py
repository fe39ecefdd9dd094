"""Tokens, log-probabilities and endings on their way through the parsers."""

from __future__ import annotations

from fuseline.api.output.events import Done, Event, ReasoningDelta, TextDelta, ToolCallDelta
from fuseline.api.output.parsed import Parsed
from fuseline.api.parsers.choice import ParseSettings
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.parsers.reasoning import reasoning_formats
from fuseline.engine.messages import PositionLogprobs

HERMES, QWEN = tool_formats()["hermes"], reasoning_formats()["qwen3"]
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def run(text: str, reason: str = "stop", index: int = 0, **settings) -> list[list[Event]]:
    """Events that each letter makes, a token each."""
    found: list[list[Event]] = []
    stage = Parsed(ParseSettings(**{"choice": "auto", "format": HERMES, **settings}), index + 1, found.append)
    for k, letter in enumerate(text):
        position = PositionLogprobs(k, -0.5, 1, (), ())
        events: list[Event] = [TextDelta(index, letter, [k], [position])]
        if k == len(text) - 1:
            events.append(Done(index, reason))
        stage.feed(events)
    return found


def test_every_token_travels_once_and_in_order() -> None:
    for text in (
        "Hello <tool",
        "Hm. " + CALL,
        CALL + " dropped",
        "<think>a</think>b" + CALL,
        "<tool_call>none",
        "<think>",
    ):
        for settings in ({}, {"reasoning": QWEN}, {"reasoning": QWEN, "shows_reasoning": False}, {"choice": "none"}):
            events = [event for batch in run(text, index=1, **settings) for event in batch]
            carried = [event for event in events if not isinstance(event, Done)]
            assert [token for event in carried for token in event.token_ids] == list(range(len(text)))
            assert [p.token_id for event in carried for p in event.logprobs] == list(range(len(text)))
            assert isinstance(events[-1], Done) and {event.index for event in events} == {1}


def test_marks_alone_make_no_chunk() -> None:
    batches = run("<think>a</think>b", reasoning=QWEN)
    assert [[type(event) for event in batch] for batch in batches] == [[ReasoningDelta], [TextDelta, Done]]


def test_finish_reasons() -> None:
    def reason(text: str, **settings) -> str:
        return run(text, **settings)[-1][-1].finish_reason

    assert reason(CALL) == "tool_calls" and reason("Hello") == "stop"
    assert reason(CALL[:-20], reason="length") == reason("Hello", reason="length") == "length"
    assert reason('{"a": 1}', choice="named", named="f") == "stop"
    assert reason('[{"name": "f", "parameters": {}}]', choice="required") == "tool_calls"
    assert reason(CALL, choice="none") == "stop"


def test_reasoning_is_left_out_and_counted() -> None:
    events = [event for batch in run("<think>abc</think>d", reasoning=QWEN, shows_reasoning=False) for event in batch]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["d"]
    assert not any(isinstance(event, ReasoningDelta) for event in events) and events[-1].num_reasoning >= 3


def test_a_named_function_takes_all_text_as_arguments() -> None:
    batches = run('{"a": "<tool_call>"}', choice="named", named="f")
    deltas = [event for batch in batches for event in batch if isinstance(event, ToolCallDelta)]
    assert "".join(event.arguments for event in deltas) == '{"a": "<tool_call>"}'
    assert [(event.name, event.id is None) for event in deltas] == [("f", False)] + [(None, True)] * (len(deltas) - 1)
