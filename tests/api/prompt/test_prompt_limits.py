"""Admission: cheap bounds come before the work they save, and each of them is a flag."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from prompt_cases import CONTEXT, body, chat, preparer, settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fuseline.api.errors import ApiError
from fuseline.api.prompt.bodies import Bodies
from fuseline.api.prompt.encode import LONG_TEXT, TextTokenizer
from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.prepared import Prepared, Refused
from fuseline.api.prompt.token_bound import find_bound
from fuseline.api.served import load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**options: Any) -> Tokenizer:
    made = Tokenizer(
        BPE({c: k for k, c in enumerate([*ALPHABET, "ab", "abab"])}, [("a", "b"), ("ab", "ab")], **options)
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def with_bytes(**options: Any) -> Tokenizer:
    names = ["▁", "a", "<unk>", *BYTES]
    made = Tokenizer(BPE({name: k for k, name in enumerate(names)}, [], byte_fallback=True, **options))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def normalized(normalizer: Any) -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizer
    return made


def stripping() -> Tokenizer:
    from tokenizers import AddedToken

    made = byte_level()
    made.add_special_tokens([AddedToken("<end>", lstrip=True, rstrip=True)])
    return made


BOUNDED: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level, "byte fallback": with_bytes,
    "byte fallback of Llama": lambda: with_bytes(unk_token="<unk>", fuse_unk=True),
    "special tokens that take blanks": stripping,
    "NFC": lambda: normalized(normalizers.NFC()), "NFD": lambda: normalized(normalizers.NFD()),
    "NFKC": lambda: normalized(normalizers.NFKC()), "NFKD": lambda: normalized(normalizers.NFKD()),
    "lower case": lambda: normalized(normalizers.Lowercase()),
}  # fmt: skip
TEXTS = [
    "", "abab" * 50, "é中\u212a\U0001d400" * 20, " \n\t" * 40, "<end>" + " " * 400, "\u1112\u1161\u11ab" * 30,
    "α\u0313\u0300\u0345" * 10,
]  # fmt: skip


def random_text(seed: int) -> str:
    pick = random.Random(seed)
    return "".join(
        pick.choice(["ab", " ", "K", "\u212a", "é", "e\u0301", "<end>", "中", "\U0001d400"]) for _ in range(80)
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_a_text_is_never_fewer_tokens_than_said(name: str) -> None:
    tokenizer = BOUNDED[name]()
    bound = find_bound(tokenizer)
    assert bound is not None
    for text in [*TEXTS, *map(random_text, range(50))]:
        assert bound.fewest_tokens(text) <= len(tokenizer.encode(text).ids), text
    assert bound.fewest_tokens("abab" * 1000) >= 1000 / 13


def truncating() -> Tokenizer:
    made = byte_level()
    made.enable_truncation(5)
    return made


def dropping() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), made.pre_tokenizer])
    return made


UNBOUNDED: dict[str, Callable[[], Tokenizer]] = {
    "truncation": truncating, "dropped blanks": dropping, "strip": lambda: normalized(normalizers.Strip()),
    "removed pattern": lambda: normalized(normalizers.Replace("a", "")),
    "unknown words": lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    "dropped bytes": lambda: Tokenizer(BPE({"a": 0}, [])),
    "fused unknowns": lambda: Tokenizer(BPE({"<unk>": 0}, [], unk_token="<unk>", fuse_unk=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_text_can_vanish_nothing_is_said(name: str) -> None:
    assert find_bound(UNBOUNDED[name]()) is None


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Preparer:
    """Fails when a text is encoded that cannot fit."""
    encode = TextTokenizer.encode

    def checked(self: TextTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        assert len(text) < 200_000, "encoded in vain"
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(TextTokenizer, "encode", checked)
    flags = {"max_token_rules": 100, "max_num_prompts": 10, "max_messages": 10, "max_stop_strings": 2}
    return preparer(max_prompt_bytes=10**7, **flags)


TOO_MUCH: dict[str, tuple[str, bytes, str]] = {
    "a long text": ("completion", body(prompt="word " * 50_000), "maximum context length"),
    "one of many": ("completion", body(prompt=["Hi", "word " * 50_000]), "maximum context length"),
    "a long chat": ("chat", chat("word " * 50_000), "maximum context length"),
    "many ids": ("completion", body(prompt=[1] * (CONTEXT + 1)), "maximum context length"),
    "many ids and a text": ("completion", body(prompt=[1] * (CONTEXT + 1) + ["a"]), "maximum context length"),
    "many ids in one of many": ("completion", body(prompt=[[1], [1] * (CONTEXT + 1)]), "maximum context length"),
    "prompts": ("completion", body(prompt=["a"] * 11), "at most 10 prompts"),
    "prompts of ids": ("completion", body(prompt=[[1]] * 11), "at most 10 prompts"),
    "messages": ("chat", body(messages=[{"role": "user", "content": "x"}] * 11), "at most 10 messages"),
    "messages to tokenize": ("tokenize", body(messages=[{"role": "user", "content": "x"}] * 11), "at most 10 messages"),
    "stop strings": ("chat", chat(stop=["a"] * 3), "at most 2 stop strings"),
    "biases": ("chat", chat(logit_bias={str(k): 1 for k in range(101)}), "at most 100 entries"),
    "rules times prompts": ("completion", body(prompt=["a"] * 6, stop_token_ids=[1] * 20), "at most 100 entries"),
    "rules times choices": ("chat", chat(n=6, stop_token_ids=[1] * 20), "at most 100 entries"),
    "rules of two kinds": ("chat", chat(bad_words=["a"] * 60, allowed_token_ids=[1] * 60), "at most 100 entries"),
    "rendered text": ("chat", chat("a" * 10**7), "--max-prompt-bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_cannot_fit_is_refused_before_the_work(strict: Preparer, name: str) -> None:
    kind, raw, words = TOO_MUCH[name]
    reply = strict.prepare(kind, raw)
    assert isinstance(reply, Refused) and reply.status == 400 and words in reply.message and reply.param
    assert (reply.code == "context_length_exceeded") == (words == "maximum context length")


@pytest.mark.parametrize("field", ["role", "request_id"])
def test_what_every_chunk_repeats_is_short(field: str) -> None:
    message = {"role": "user", "content": "Hi"} | ({field: "x" * 300} if field == "role" else {})
    fields = {"messages": [message]} | ({field: "x" * 300} if field != "role" else {})
    reply = preparer().prepare("chat", body(**fields))
    assert isinstance(reply, Refused) and reply.status == 400 and field in reply.param


def test_echo_and_log_show_what_is_left_of_a_cut_prompt() -> None:
    reply = preparer().prepare("completion", body(prompt="word " * 50_000, truncate_prompt_tokens=5, echo=True))
    assert len(reply.prompts[0].echo) < 100
    reply = preparer().prepare("chat", chat("word " * 50_000, truncate_prompt_tokens=5))
    assert reply.text is None


def test_what_is_cut_may_be_longer_than_the_context() -> None:
    own = preparer()
    for kind, raw in (
        ("completion", body(prompt=[1] * 9000, truncate_prompt_tokens=5)),
        ("completion", body(prompt="word " * 50_000, truncate_prompt_tokens=5)),
        ("chat", chat("word " * 50_000, truncate_prompt_tokens=5)),
    ):
        reply = own.prepare(kind, raw)
        assert isinstance(reply, Prepared) and len(reply.prompts[0].ids) == 5


@pytest.mark.parametrize("name", ["chat_template", "tokenize"])
@pytest.mark.parametrize("kind", ["chat", "tokenize"])
def test_variables_that_would_change_the_rendering_itself_are_refused(name: str, kind: str) -> None:
    reply = preparer().prepare(kind, chat(chat_template_kwargs={name: "{{ 1 }}"}))
    assert isinstance(reply, Refused) and reply.status == 400 and reply.param == f"chat_template_kwargs.{name}"


ECHO = (
    "{{ messages[0].content }}{% if add_generation_prompt %}+{% endif %}"
    "{% if continue_final_message %}>{% endif %}{{ x }}"
)


def rendered(own: Preparer, **fields: Any) -> str | None:
    reply = own.prepare("chat", chat("Hi", **fields))
    return reply.text if isinstance(reply, Prepared) else reply.param


def test_switches_among_the_variables_count_as_the_fields() -> None:
    own = preparer(chat_template=ECHO, default_chat_template_kwargs={"x": "d"})
    assert rendered(own) == "Hi+d"
    assert rendered(own, add_generation_prompt=False) == "Hid"
    assert rendered(own, chat_template_kwargs={"add_generation_prompt": False, "x": "own"}) == "Hiown"
    assert rendered(own, continue_final_message=True) == "Hi"
    assert rendered(own, chat_template_kwargs={"continue_final_message": True}) == "Hi"
    assert rendered(own, chat_template_kwargs={"messages": [{"content": "no"}]}) == "Hi+d"
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert rendered(own, chat_template_kwargs=both) == "continue_final_message"
    wrong = {"add_generation_prompt": "yes"}
    assert rendered(own, chat_template_kwargs=wrong) == "chat_template_kwargs.add_generation_prompt"


def test_bodies_have_a_bound_each_and_one_together() -> None:
    bodies = Bodies(100)
    with bodies.hold() as one, pytest.raises(ApiError) as refused:
        one.add(60)
        one.add(60)
    assert refused.value.status == 413 and bodies.num_bytes == 0
    others = [bodies.hold() for _ in range(8)]
    for held in others:
        held.__enter__().add(100)
    with bodies.hold() as one, pytest.raises(ApiError) as refused:
        one.add(1)
    assert refused.value.status == 429 and refused.value.retry_after
    for held in others:
        held.__exit__(None, None, None)
    with bodies.hold() as one:
        one.add(100)


def test_the_bundled_tokenizer_has_a_bound() -> None:
    assert load_tokenizer(settings().config).bytes_per_token is not None


def test_long_texts_are_encoded_as_short_ones_are() -> None:
    tokenizer = load_tokenizer(settings().config)
    text = "".join(map(random_text, range(200)))
    assert len(text) > LONG_TEXT
    for adds in (False, True):
        assert tokenizer.encode(text, adds) == tokenizer._tokenizer.encode(text, add_special_tokens=adds).ids


def test_a_long_template_may_stand_on_the_command_line() -> None:
    own = preparer(chat_template="{{ messages[0].content }}" + "{# a long remark #}" * 300)
    assert rendered(own) == "Hi"
