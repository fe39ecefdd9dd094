"""A stream of tokens has the text that Transformers decodes, whatever came before it and wherever it is cut."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import BACKENDS, TEXTS, sentencepiece_bpe
from tokenizers import AddedToken, decoders

from fuseline.api.output.detokenizer import Detokenizer
from fuseline.api.prompt.clean_up import CleanUp, clean_up
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import TokenizerFiles

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def built(name: str, **facts: bool) -> TextTokenizer:
    backend = BACKENDS[name]()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<think>", special=False)])
    return TextTokenizer(TokenizerFiles(backend.to_str(), {}, **facts))


TOKENIZERS = {name: built(name) for name in BACKENDS} | {"cleaned": built("wordpiece", cleans_up=True)}
KINDS = [name for name in TOKENIZERS if name != "cleaned"]


def stream(tokenizer: TextTokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skips: bool = True) -> list[str]:
    """The text of each token, and what is left at the end."""
    made = Detokenizer(tokenizer, skips, prompt)
    return [*(made.feed(token) for token in ids), made.finish()]


def added_text(tokenizer: TextTokenizer, prompt: Sequence[int], ids: Sequence[int], skips: bool) -> str | None:
    """What Transformers' text of all ids has more than that of the prompt; None where that changes with them."""
    before, whole = tokenizer.decode(prompt, skips), tokenizer.decode([*prompt, *ids], skips)
    return whole[len(before) :] if whole.startswith(before) else None


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_text_at_every_split_is_that_of_transformers(name: str, skips: bool) -> None:
    tokenizer = TOKENIZERS[name]
    for text in [*TEXTS, "x <|im_end|> y<think> z <|im_start|>", " ".join(TEXTS)]:
        ids = tokenizer.encode(text, False)
        for split in range(len(ids) + 1):
            expected = added_text(tokenizer, ids[:split], ids[split:], skips)
            is_open = isinstance(tokenizer.pieces.inner(ids[split - 1]), bytes) if split else False
            if expected is not None and not (is_open and tokenizer.decode(ids[:split], skips).endswith("\ufffd")):
                assert "".join(stream(tokenizer, ids[split:], ids[:split], skips)) == expected, (text, split)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, tokenizer.vocab_size + 3)
    if tokenizer.pieces.has_runs:
        token |= st.integers(4, 259)  # bytes
    prompt, ids = data.draw(st.lists(token, max_size=8)), data.draw(st.lists(token, max_size=16))
    skips = data.draw(st.booleans())
    expected = added_text(tokenizer, prompt, ids, skips)
    if tokenizer.pieces.has_runs and _takes_back(tokenizer, [*prompt, *ids], skips):
        return
    if expected is not None and not tokenizer.decode(prompt, skips).endswith("\ufffd"):
        assert "".join(stream(tokenizer, ids, prompt, skips)) == expected


def _takes_back(tokenizer: TextTokenizer, ids: Sequence[int], skips: bool) -> bool:
    """A run of bytes begins as characters and goes on as none, so that Transformers shows none of them."""
    runs: list[bytes] = [b""]
    for token in ids:
        piece = tokenizer.pieces.inner(token)
        if isinstance(piece, bytes):
            runs[-1] += piece
        elif not (skips and token in tokenizer.special_ids) and token < tokenizer.vocab_size:
            runs.append(b"")
    for run in runs:
        try:
            run.decode()
        except UnicodeDecodeError as error:
            if error.start:
                return True
    return False


@pytest.mark.parametrize("skips", [True, False])
def test_the_first_word_keeps_its_blank(skips: bool) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, ids = tokenizer.encode("the a", True), tokenizer.encode("Paris Paris", False)
    assert "".join(stream(tokenizer, ids, prompt, skips)) == " Paris Paris"
    begun = [*prompt, *tokenizer.encode("", True), tokenizer._tokenizer.token_to_id("</s>")]
    assert "".join(stream(tokenizer, ids, begun, skips)) == " Paris Paris"
    alone = stream(tokenizer, ids, tokenizer.encode("", True), skips)
    assert "".join(alone) == ("Paris Paris" if skips else " Paris Paris")


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("character", "é中🙂")
def test_a_character_comes_with_its_last_byte(name: str, character: str) -> None:
    tokenizer = TOKENIZERS[name]
    names = _byte_level_names(character) if name == "byte-level" else [f"<0x{b:02X}>" for b in character.encode()]
    ids = [tokenizer._tokenizer.token_to_id(name) for name in names]
    for split in range(len(ids)):
        shown = stream(tokenizer, ids[split:], [*tokenizer.encode("a", False), *ids[:split]])
        assert shown == [""] * (len(ids) - split - 1) + [character, ""]
        lost = stream(tokenizer, ids[:split])
        assert lost[:-1] == [""] * split and set(lost[-1]) <= {"\ufffd"}
    assert [tokenizer.token_bytes(token) for token in ids] == [bytes([b]) for b in character.encode()]


def _byte_level_names(character: str) -> list[str]:
    from tokenizers import pre_tokenizers

    ((name, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
    return list(name)


def test_bytes_that_are_no_character_are_shown_at_once() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (0xFF, 0xE4, 0xBD, 0xA0)]
    assert stream(tokenizer, ids) == ["\ufffd"] * 4 + [""]
    assert tokenizer.decode(ids, True) == "\ufffd" * 4


def test_pieces_of_all_tokens_are_the_bytes_of_the_text() -> None:
    for name in ("byte-level", "sentencepiece", "no strip"):
        tokenizer = TOKENIZERS[name]
        for text in TEXTS:
            ids = tokenizer.encode(text, False)
            joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
            assert joined.lstrip() == tokenizer.decode(ids, False).lstrip()


@pytest.mark.parametrize(
    ("steps", "is_free"),
    [
        ([decoders.ByteLevel(), decoders.Replace("a", "b")], False),
        ([decoders.Fuse(), decoders.Strip(" ", 0, 1)], False),
        ([decoders.CTC()], False),
        ([decoders.Strip("_", 1, 1), decoders.Fuse()], True),
        ([decoders.Replace("_", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)], True),
    ],
)
def test_decoders_whose_tokens_need_the_one_before(steps: list, is_free: bool) -> None:
    backend = sentencepiece_bpe()
    backend.decoder = decoders.Sequence(steps)
    tokenizer = TextTokenizer(TokenizerFiles(backend.to_str(), {}))
    assert (tokenizer.pieces._anchor is not None) == is_free
    ids = tokenizer.encode("the a Paris Paris", False)
    assert "".join(stream(tokenizer, ids)).strip() == tokenizer.decode(ids, True).strip()


@given(st.lists(st.sampled_from([" ", ".", "'", "n't", "s", " '", " ' ", "'re", "v", "e", "x", "?"]), max_size=30))
def test_blanks_before_punctuation_go_in_a_stream_as_in_a_text(parts: list[str]) -> None:
    made = CleanUp()
    assert "".join(map(made.feed, parts)) + made.finish() == clean_up("".join(parts))


def test_a_cleaned_stream_is_the_cleaned_text() -> None:
    tokenizer = TOKENIZERS["cleaned"]
    ids = tokenizer.encode("we 've , do n't . he ' s", False)
    whole = tokenizer.decode(ids, True)
    assert "".join(stream(tokenizer, ids)) == whole and not re.search(r" [.,]", whole)


def test_choices_go_on_from_the_same_prompt() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer._tokenizer.token_to_id(name) for name in _byte_level_names("中")]
    start = Detokenizer(tokenizer, True, ids[:1])
    first, second = start.fork(), start.fork()
    assert [first.feed(ids[1]), first.feed(ids[2])] == ["", "中"]
    assert second.finish() == "\ufffd"
