"""The text of a choice: where it stops, what is held back, and where each token stands in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import BACKENDS, byte_level_bpe
from tokenizers import AddedToken

from fuseline.api.output.events import Done, Event, Prompt, PromptInfo, TextDelta
from fuseline.api.output.generation import TextOptions, make_choices
from fuseline.api.output.logprobs import LogprobWriter, encode_pieces
from fuseline.api.output.openai_completion import CompletionWriter, Shape
from fuseline.api.output.stop import StopStrings
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import TokenizerFiles
from fuseline.engine.messages import EngineRequest, PositionLogprobs, TokenOutput
from fuseline.engine.params import GrammarSpec, SamplingParams


def built(name: str) -> TextTokenizer:
    backend = BACKENDS[name]()
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return TextTokenizer(TokenizerFiles(backend.to_str(), {}))


TOKENIZERS = {name: built(name) for name in ("byte-level", "sentencepiece", "wordpiece")}
BYTE_LEVEL, PIECES = TOKENIZERS["byte-level"], TOKENIZERS["sentencepiece"]


def run(
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    cuts: Sequence[int] = (),
    prompt: Sequence[int] = (),
    scores: bool = False,
    **options: Any,
) -> list[Sequence[Event]]:
    """Events of each output; the engine gives the tokens between two cuts at once."""
    min_tokens = options.get("min_tokens", 0)
    params = SamplingParams(max_tokens=max(len(ids), 1), min_tokens=min_tokens)
    request = EngineRequest(request_id="r", prompt_token_ids=tuple(prompt), params=params)
    (choice,) = make_choices(request, tokenizer, TextOptions(**options))
    borders = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    found = []
    for begin, end in zip(borders, borders[1:], strict=False):
        some = tuple(ids[begin:end])
        positions = tuple(PositionLogprobs(token, -1.0, 1, (token,), (-1.0,)) for token in some)
        is_last = end == len(ids)
        found.append(
            choice.take(
                TokenOutput(
                    request_id="r",
                    token_ids=some,
                    logprobs=positions if scores else (),
                    finish_reason="length" if is_last else None,
                )  # fmt: skip
            )
        )
    return found


def text_of(outputs: list[Sequence[Event]]) -> str:
    return "".join(event.text for events in outputs for event in events if isinstance(event, TextDelta))


def end_of(outputs: list[Sequence[Event]]) -> tuple[str, Any, int]:
    """(Finish reason, stop reason, tokens)."""
    events = [event for some in outputs for event in some]
    (done,) = (event for event in events if isinstance(event, Done))
    return done.finish_reason, done.stop_reason, sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))


def test_a_stop_string_is_found_with_the_token_that_completes_it() -> None:
    """Also where that is the first one, whose blank is that of a word inside a text."""
    prompt, ids = PIECES.encode("the a", True), PIECES.encode("Paris Paris is", False)
    first = next(k for k in range(len(ids) + 1) if PIECES.decode(ids[:k], True) == "Paris")
    for skipped in ((), (PIECES.token_id("</s>"),)):
        outputs = run(PIECES, ids, range(len(ids)), [*prompt, *skipped], stops=(" Paris",))
        assert text_of(outputs) == "" and end_of(outputs) == ("stop", " Paris", first)
        outputs = run(PIECES, ids, range(len(ids)), [*prompt, *skipped], stops=(" Paris",), include_stop=True)
        assert text_of(outputs) == " Paris" and end_of(outputs) == ("stop", " Paris", first)


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (("is", "Par"), "", "Par"),  # the token before completes it
        (("ris", "Par"), "", "Par"),
        (("Paris", "ris"), "", "Paris"),  # one token completes both: the first that is listed
        (("ris", "Paris"), "Pa", "ris"),
        (("s", "Paris"), "Pari", "s"),
    ],
)
def test_of_two_stops_that_one_token_completes_the_first_listed_wins(stops: tuple, text: str, found: str) -> None:
    pieces = ["Par", "is the"] if "Par" in stops else ["Paris the"]
    made = StopStrings(stops, False)
    shown = ""
    for piece in pieces:
        new, stop = made.feed(piece)
        shown += new
        if stop is not None:
            break
    assert (shown, stop) == (text, found)


@pytest.mark.parametrize("stops", [("ab",), ("ab", "longer than that"), ("xyz", "b", "ab")])
def test_text_before_min_tokens_is_not_searched(stops: tuple[str, ...]) -> None:
    made = StopStrings(stops, False)
    assert [made.feed(piece, False)[1] for piece in ("a", "b", " ab")] == [None] * 3
    assert made.feed("c")[1] is None
    assert made.feed("a")[1] is None and made.feed("b")[1] in stops


def test_a_stop_may_begin_before_min_tokens_and_end_after() -> None:
    made = StopStrings(("abc",), False)
    assert made.feed("xab", False) == ("x", None)
    assert made.feed("cd") == ("", "abc")


@settings(max_examples=200, deadline=None)
@given(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stops_at_every_split(text: str, stops: list[str], data: st.DataObject) -> None:
    """What is shown before the end is never taken back, and all of it is what a search of each prefix gives."""
    include = data.draw(st.booleans())
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    made, shown, found, seen = StopStrings(stops, include), "", None, ""
    for piece in pieces:
        new, found = made.feed(piece)
        shown, seen = shown + new, seen + piece
        if found is not None:
            break
    if found is None:
        assert shown + made.finish() == text and not any(stop in text for stop in stops)
        return
    before = seen[: len(seen) - len(piece)]
    assert not any(stop in before for stop in stops)
    assert found == next(stop for stop in stops if stop in seen)
    assert shown == seen[: seen.index(found) + (len(found) if include else 0)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ending", ["eos_token_ids", "masked_eos_token_ids", "stop_token_ids"])
def test_the_token_that_ends_a_grammar_is_no_text_of_it(ending: str, include: bool) -> None:
    """Also where EOS is to be ignored, special tokens are shown and the ending is asked for."""
    ids = (*BYTE_LEVEL.encode("a Paris", False), end := BYTE_LEVEL.token_id("<|im_end|>"))
    for grammar in (None, GrammarSpec(kind="ebnf", text='root ::= "a Paris"')):
        if grammar is None and ending == "masked_eos_token_ids":
            continue
        params = SamplingParams(**{ending: (end,)}, grammar=grammar)
        request = EngineRequest(request_id="r", prompt_token_ids=(0,), params=params)
        (choice,) = make_choices(request, BYTE_LEVEL, TextOptions(include_stop=include, skip_special_tokens=False))
        shown = text_of([choice.take(TokenOutput(request_id="r", token_ids=ids, finish_reason="stop"))])
        assert shown == "a Paris" + ("<|im_end|>" if include and grammar is None else "")


# Where tokens stand in the text.

TEXT = "é 中 🙂 the sky<|im_end|> Paris é 中"


def expected_offsets(tokenizer: TextTokenizer, ids: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """Whole characters of what comes before each token."""
    before = len(tokenizer.decode(prompt, True))
    shown = [tokenizer.decode([*prompt, *ids[:k]], True)[before:] for k in range(len(ids))]
    return [len(text.rstrip("\ufffd")) for text in shown]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stops", [(), ("never there",), ("sky",)], ids=["free", "held", "stopped"])
def test_offsets_are_those_in_the_text(name: str, stops: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS[name]
    ids, prompt = tokenizer.encode(TEXT, False), tokenizer.encode("the", False)
    expected = expected_offsets(tokenizer, ids, prompt)
    whole = run(tokenizer, ids, (), prompt, True, stops=stops)
    streamed = run(tokenizer, ids, range(len(ids)), prompt, True, stops=stops)
    for outputs in (whole, streamed):
        offsets = [at for events in outputs for e in events if isinstance(e, TextDelta) for at in e.offsets]
        assert offsets == expected[: len(offsets)] and (stops == ("sky",) or len(offsets) == len(ids))
    assert text_of(whole) == text_of(streamed)


@pytest.mark.parametrize("echo", [True, False])
async def test_streamed_log_probabilities_are_the_whole_ones(echo: bool) -> None:
    ids, prompt = BYTE_LEVEL.encode(TEXT, False), BYTE_LEVEL.encode("é the<|im_end|> 中", False)
    text = BYTE_LEVEL.decode(prompt, False)
    positions = (None, *(PositionLogprobs(token, -1.0, 1, (token,), (-1.0,)) for token in prompt[1:]))

    async def writer() -> tuple[CompletionWriter, Prompt]:
        shape = Shape("cmpl-1", 0, "m", LogprobWriter(BYTE_LEVEL, False), wants_logprobs=True, num_top=1)
        asked = Prompt(prompt, 0, text if echo else None)
        made = CompletionWriter(shape, [asked], 1)
        await made.open(asked, PromptInfo(0, positions if echo else None))
        return made, asked

    outputs = run(BYTE_LEVEL, ids, range(len(ids)), prompt, True, stops=("never there",))
    folding, asked = await writer()
    for events in outputs:
        folding.fold(asked, events)
    whole = json.loads(b"".join(await folding.whole()))["choices"][0]
    streaming, asked = await writer()
    chunks = []
    for events in outputs:
        is_long = streaming.is_long(asked, events)
        chunks += await streaming.long_chunks(asked, events) if is_long else streaming.chunks(asked, events)
    streamed = [json.loads(b"".join(encode_pieces(chunk)))["choices"][0] for chunk in chunks]
    assert "".join(chunk["text"] for chunk in streamed) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert [v for chunk in streamed if chunk["logprobs"] for v in chunk["logprobs"][key]] == values
    shown, tokens = whole["logprobs"]["text_offset"], whole["logprobs"]["tokens"]
    begun = [(at, token) for at, token in zip(shown, tokens, strict=True) if "\ufffd" not in token]
    hidden = [(at, token) for at, token in begun if token == "<|im_end|>" and at >= len(text) * echo]
    assert len(hidden) == 1 and all(
        whole["text"].startswith(token, at) for at, token in begun if (at, token) not in hidden
    )


def test_offsets_of_an_echo_pass_over_what_the_tokenizer_added() -> None:
    writer = LogprobWriter(PIECES, False)
    ids = PIECES.encode("the a Paris", True)
    offsets = list(writer.prompt_offsets(ids, "the a Paris"))
    texts = [PIECES.token_text(token) for token in ids]
    assert ids[0] == PIECES.token_id("<s>") and offsets[:2] == [0, 0]
    assert all("the a Paris".startswith(text, at) for at, text in list(zip(offsets, texts, strict=True))[2:])


# Tokens in log-probabilities.


def test_alternatives_never_collide_by_their_text() -> None:
    bytes_of = [PIECES.token_id(f"<0x{byte:02X}>") for byte in (0xE4, 0xBD, 0xA0, 0x61)]
    letter = PIECES.token_id("a")
    top = (*bytes_of, letter)
    position = PositionLogprobs(bytes_of[1], -2.0, 2, top, (-1.0, -2.0, -3.0, -4.0, -5.0))
    writer = LogprobWriter(PIECES, False)
    (alternatives,) = writer.completion([position], [bytes_of[1]], [0])["top_logprobs"]
    assert len(alternatives) == 5 and list(alternatives)[0] == "\ufffd" and alternatives["\ufffd"] == -2.0
    assert alternatives[f"token_id:{bytes_of[0]}"] == -1.0 and sorted(alternatives.values())[0] == -5.0
    (entry,) = writer.chat_tokens([position], 5)
    assert [part["bytes"] for part in entry["top_logprobs"]] == [[0xBD], [0xE4], [0xA0], [0x61], [0x61]]
    (named,) = LogprobWriter(PIECES, True).completion([position], [bytes_of[1]], [0])["top_logprobs"]
    assert set(named) == {f"token_id:{token}" for token in top}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_pieces_of_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, ids = tokenizer.encode("the", False), tokenizer.encode("a Paris, the sky", False)
    joined = "".join(map(tokenizer.token_text, ids))
    assert joined == text_of(run(tokenizer, ids, (), prompt))


def test_a_vocabulary_has_the_bytes_that_it_spells() -> None:
    made = TextTokenizer(TokenizerFiles(byte_level_bpe().to_str(), {}))
    for byte in range(256):
        ids = [token for token in range(made.vocab_size) if made.token_bytes(token) == bytes([byte])]
        assert len(ids) == 1
