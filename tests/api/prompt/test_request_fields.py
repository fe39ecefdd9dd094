"""Each field of a request: what it makes of the request, or the 400 that names it. No engine is needed for that."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from prompt_cases import CONTEXT, VOCAB, body, chat, preparer
from tokenizers import AddedToken

from fuseline.api.prompt.fim import find_fim
from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.prepared import BeamOptions, Prepared, Refused
from fuseline.engine.params import LogitsProcessor

KINDS = ("completion", "chat")


def raw(kind: str, **fields: Any) -> bytes:
    return body(**{"prompt": "Hi", "max_tokens": 4, **fields}) if kind == "completion" else chat(**fields)


def prepared(own: Preparer, kind: str, **fields: Any) -> Prepared:
    reply = own.prepare(kind, raw(kind, **fields))
    assert isinstance(reply, Prepared), reply
    return reply


def refused(own: Preparer, kind: str, **fields: Any) -> Refused:
    reply = own.prepare(kind, raw(kind, **fields))
    assert isinstance(reply, Refused) and reply.status == 400, reply
    return reply


@pytest.fixture(scope="module")
def own() -> Preparer:
    return preparer()


REFUSED: list[tuple[str, Any]] = [
    ("cache_salt", ""), ("vllm_xargs", {"a": 1}), ("kv_transfer_params", {"do_remote_decode": True}),
    ("mm_processor_kwargs", {"num_crops": 4}), ("logprob_token_ids", [5]), ("length_penalty", 2.0),
    ("length_penalty", 51), ("best_of", 129), ("truncation_side", "left"), ("truncation_side", "middle"),
    ("request_id", "x" * 257), ("priority", 3), ("logits_processors", ["a.b"]), ("min_tokens", 5),
]  # fmt: skip
OF_ONE_KIND: dict[str, list[tuple[str, Any]]] = {
    "completion": [("suffix", "x"), ("prompt_embeds", "AAAA"), ("prompt", ["a", 5]), ("prompt", [[1], "a"]),
                   ("prompt", [[1], []]), ("prompt", "")],
    "chat": [("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("modalities", ["text", "audio"]),
             ("audio", {"voice": "x"}), ("web_search_options", {"user_location": {}}), ("verbosity", "low")],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, field, value", [(kind, *case) for kind in KINDS for case in REFUSED + OF_ONE_KIND[kind]], ids=str
)
def test_what_cannot_be_heeded_is_refused_by_name(own: Preparer, kind: str, field: str, value: Any) -> None:
    reply = refused(own, kind, **{field: value})
    assert reply.param.split("[")[0] == field and field.split("_")[0] in reply.message.lower()


NEUTRAL: dict[str, Any] = {
    "vllm_xargs": {}, "kv_transfer_params": None, "mm_processor_kwargs": {}, "logprob_token_ids": [],
    "length_penalty": 1.0, "best_of": 1, "priority": 0, "logits_processors": [], "user": "u",
    "stream_options": None, "use_beam_search": False,
}  # fmt: skip
NEUTRAL_IN_CHAT: dict[str, Any] = {
    "functions": [], "function_call": "none", "modalities": ["text"], "verbosity": "medium", "store": True,
    "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "k",
    "prompt_cache_retention": "24h", "prediction": {"type": "content", "content": "x"}, "web_search_options": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_known_fields_that_ask_for_nothing_are_no_unknown_ones(kind: str) -> None:
    strict = preparer(strict_requests=True)
    fields = NEUTRAL | (NEUTRAL_IN_CHAT if kind == "chat" else {"suffix": "", "prompt_embeds": None})
    plain = prepared(strict, kind)
    assert prepared(strict, kind, **fields) == plain and plain.unknown == ()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_fields_are_told_of_or_refused(own: Preparer, kind: str) -> None:
    fields = {"zzz": 1, "aaa": 2, "stream": True, "stream_options": {"include_usage": True, "what": 1}}
    assert prepared(own, kind, **fields).unknown == ("aaa", "stream_options.what", "zzz")
    reply = refused(preparer(strict_requests=True), kind, **fields)
    assert reply.param == "aaa" and all(name in reply.message for name in ("aaa", "stream_options.what", "zzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_ids_name_all_of_them_and_the_size_of_the_vocabulary(own: Preparer, kind: str) -> None:
    for field, value in (
        ("logit_bias", {"5": 1, "4096": 1, "-1": 1}), ("allowed_token_ids", [5, 4096, -1, -1]),
        ("stop_token_ids", [4096, -1]), ("logprob_token_ids", [4096, -1]),
    ):  # fmt: skip
        shown = {"logprobs": True} if kind == "chat" else {"logprobs": 0}
        reply = refused(own, kind, **{field: value}, **shown)
        assert reply.param == field and "4096, -1 are out of vocabulary, which has 4096 tokens" in reply.message
    many = refused(own, kind, allowed_token_ids=list(range(VOCAB, VOCAB + 50)))
    assert str(VOCAB + 19) in many.message and str(VOCAB + 20) not in many.message
    keys = refused(own, kind, logit_bias={"a": 1, "1.5": 1, " 7": 1, "1_0": 1, "8": 1})
    assert keys.param == "logit_bias" and all(repr(key) in keys.message for key in ("a", "1.5", " 7", "1_0"))


def test_token_ids_of_prompts(own: Preparer) -> None:
    reply = refused(own, "completion", prompt=[[1], [2, 4096, 5000]])
    assert reply.param == "prompt" and "4096, 5000" in reply.message and "4096 tokens (0 to 4095)" in reply.message


def test_token_ids_to_decode(own: Preparer) -> None:
    reply = own.prepare("detokenize", body(tokens=[5, VOCAB, -3]))
    assert isinstance(reply, Refused) and reply.param == "tokens" and f"{VOCAB}, -3" in reply.message


def test_the_name_of_the_field_is_the_clients(own: Preparer) -> None:
    assert refused(own, "chat", max_tokens=CONTEXT).param == "max_tokens"
    both = refused(own, "chat", max_completion_tokens=CONTEXT, max_tokens=2)
    assert both.param == "max_completion_tokens"
    assert refused(own, "chat", max_completion_tokens=CONTEXT).param == "max_completion_tokens"
    assert refused(own, "chat", logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(own, "chat", content="word " * 50_000).param == "messages"
    assert refused(own, "completion", prompt="word " * 50_000).param == "prompt"
    assert refused(own, "completion", logprobs=21).param == "logprobs"
    assert refused(preparer(skip_tokenizer_init=True), "chat").param == "messages"


@pytest.mark.parametrize("most", [VOCAB, VOCAB + 5, -1])
def test_all_log_probabilities_where_the_flag_covers_the_vocabulary(most: int) -> None:
    own = preparer(max_logprobs=most)
    reply = prepared(own, "chat", logprobs=True, top_logprobs=-1)
    assert reply.params.logprobs == reply.answer.num_logprobs == VOCAB
    reply = prepared(own, "completion", logprobs=-1, prompt_logprobs=-1)
    assert reply.params.logprobs == reply.answer.num_logprobs == reply.params.prompt_logprobs == VOCAB
    assert prepared(own, "completion", logprobs=-1, echo=True).params.prompt_logprobs == VOCAB
    assert refused(preparer(max_logprobs=VOCAB - 1), "chat", logprobs=True, top_logprobs=-1).param == "top_logprobs"


@pytest.mark.parametrize("kind", KINDS)
def test_choices_that_are_generated_and_shown(own: Preparer, kind: str) -> None:
    reply = prepared(own, kind, n=2, best_of=5)
    assert (reply.params.n, reply.answer.n, reply.params.logprobs, reply.answer.num_logprobs) == (5, 2, 0, None)
    assert reply.num_sequences == 5
    beams = prepared(own, kind, n=3, use_beam_search=True, length_penalty=0.5, stream=True)
    assert (beams.params.n, beams.answer.n, beams.answer.beams) == (3, 3, BeamOptions(0.5))
    assert beams.answer.is_one_event == (kind == "completion")
    assert prepared(own, kind, n=2).answer.beams is None and prepared(own, kind, n=2, best_of=2).params.logprobs is None
    assert refused(own, kind, n=3, best_of=2).param == "best_of"
    assert refused(own, kind, n=2, best_of=3, use_beam_search=True).param == "best_of"
    logits = preparer(logprobs_mode="raw_logits")
    assert refused(logits, kind, best_of=2).param == "best_of"
    assert refused(logits, kind, use_beam_search=True).param == "use_beam_search"


@pytest.mark.parametrize("kind", KINDS)
def test_fields_for_the_engine_reach_it(kind: str) -> None:
    own = preparer(scheduling_policy="priority")
    answer = prepared(own, kind, priority=-3, cache_salt="s", request_id="r", return_token_ids=True).answer
    assert (answer.priority, answer.cache_salt, answer.request_id, answer.wants_ids) == (-3, "s", "r", True)


def test_streams_of_ranked_choices(own: Preparer) -> None:
    assert prepared(own, "completion", best_of=2, stream=True).answer.is_one_event
    assert refused(own, "chat", best_of=2, stream=True).param == "best_of"
    assert not prepared(own, "completion", stream=True).answer.is_one_event
    assert refused(own, "completion", use_beam_search=True, max_tokens=0, echo=True).param == "max_tokens"


def test_ids_in_place_of_the_best(own: Preparer) -> None:
    reply = prepared(own, "chat", logprobs=True, logprob_token_ids=[5, 9, 5])
    assert reply.params.logprob_token_ids == (5, 9) and reply.answer.num_logprobs == 3
    assert prepared(own, "completion", logprobs=0, logprob_token_ids=[5]).params.logprob_token_ids == (5,)
    assert "21" not in str(refused(own, "chat", logprobs=True, logprob_token_ids=list(range(21))).param)
    modes = preparer(logprobs_mode="processed_logprobs")
    assert refused(modes, "completion", logprobs=1, logprob_token_ids=[5]).param == "logprob_token_ids"


def test_which_end_is_cut(own: Preparer) -> None:
    ids = list(range(20, 30))
    for side, expected in (("left", ids[-3:]), ("right", ids[:3]), (None, ids[-3:])):
        reply = prepared(own, "completion", prompt=ids, truncate_prompt_tokens=3, truncation_side=side)
        assert reply.prompts[0].ids.tolist() == expected
    for keep in (10, 50, -1):
        reply = prepared(own, "completion", prompt=ids, truncate_prompt_tokens=keep, truncation_side="right")
        assert reply.prompts[0].ids.tolist() == ids


TEXT = "The sky is blue and the grass is green."


def test_echo_shows_what_was_kept(own: Preparer) -> None:
    tokenizer = own._tokenizer
    ids = tokenizer.encode(TEXT, True)
    for side in ("left", "right"):
        for keep in (1, 4, len(ids)):
            for prompt in (TEXT, ids):
                reply = prepared(
                    own, "completion", prompt=prompt, echo=True, truncate_prompt_tokens=keep, truncation_side=side
                )
                kept = reply.prompts[0].ids.tolist()
                assert reply.prompts[0].echo == tokenizer.decode(kept, False) and len(kept) == keep
    whole = prepared(own, "completion", prompt=TEXT, echo=True)
    assert whole.prompts[0].echo == TEXT


def test_echo_leaves_out_what_the_tokenizer_has_added(own: Preparer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = type(own._tokenizer).encode

    def around(self, text: str, adds: bool) -> list[int]:
        return [4090] * adds + encode(self, text, False) + [4091] * adds

    monkeypatch.setattr(type(own._tokenizer), "encode", around)
    plain = own._tokenizer.encode(TEXT, False)
    for side, expected in (("right", plain[:2]), ("left", plain[-2:])):
        reply = prepared(own, "completion", prompt=TEXT, echo=True, truncate_prompt_tokens=3, truncation_side=side)
        assert reply.prompts[0].echo == own._tokenizer.decode(expected, False)


def test_echo_without_a_tokenizer_is_that_of_token_ids() -> None:
    reply = prepared(preparer(skip_tokenizer_init=True), "completion", prompt=[5, 6], echo=True, logprobs=1)
    assert reply.prompts[0].echo == "" and reply.params.prompt_logprobs == 1


@pytest.mark.parametrize("kind", KINDS)
def test_processors_pass_the_gate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("gate_cases")
    made.keep, made.Keep, made.number = (lambda past, row: row), type("Keep", (), {}), 5
    monkeypatch.setitem(sys.modules, "gate_cases", made)
    gated = preparer(logits_processor_pattern=r"gate_cases\.")
    spec = {"qualname": "gate_cases.Keep", "args": [1], "kwargs": {"a": 2}}
    reply = prepared(gated, kind, logits_processors=["gate_cases.keep", spec])
    assert reply.params.logits_processors == (
        LogitsProcessor(qualname="gate_cases.keep"),
        LogitsProcessor(qualname="gate_cases.Keep", is_factory=True, args=(1,), kwargs={"a": 2}),
    )
    for value, words in (
        ("os.system", "not allowed"), ("xgate_cases.keep", "not allowed"), ("gate_cases.nobody", "resolved"),
        ("gate_cases.number", "resolved"), (5, "dotted name"), ({"name": "x"}, "dotted name"),
        ({"qualname": "gate_cases.Keep", "args": {}, "kwargs": [1]}, "args"),
    ):  # fmt: skip
        reply = refused(gated, kind, logits_processors=["gate_cases.keep", value])
        assert words in reply.message and reply.param == "logits_processors[1]"
    assert "--logits-processor-pattern" in refused(preparer(), kind, logits_processors=["gate_cases.keep"]).message


FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture
def filling() -> Preparer:
    """A server whose tokenizer has tokens for filling in the middle, within the model's vocabulary."""
    made = preparer()
    unused = [token for token in range(VOCAB) if made._tokenizer.token_name(token) == ""][:3]
    assert len(unused) < 3 or unused
    made._tokenizer._tokenizer.add_special_tokens([AddedToken(name) for name in FIM])
    made.limits.vocab = made._tokenizer._tokenizer.get_vocab_size()
    return made


def test_a_suffix_where_the_tokenizer_has_tokens_for_it(filling: Preparer) -> None:
    tokenizer = filling._tokenizer
    begin, hole, end = map(tokenizer.token_id, FIM)
    prefix, suffix = (tokenizer.encode(text, False) for text in ("The sky", " is green."))
    expected = [begin, *prefix, hole, *suffix, end]
    reply = prepared(filling, "completion", prompt="The sky", suffix=" is green.", echo=True)
    assert reply.prompts[0].ids.tolist() == expected and reply.prompts[0].echo == "The sky"
    reply = prepared(filling, "completion", prompt=prefix, suffix=" is green.", echo=True)
    assert reply.prompts[0].ids.tolist() == expected and reply.prompts[0].echo == "The sky"
    cut = refused(filling, "completion", prompt="The sky", suffix="x", truncate_prompt_tokens=2)
    assert cut.param == "truncate_prompt_tokens"
    assert refused(filling, "completion", prompt="x", suffix="word " * 50_000).param == "suffix"


def test_formats_of_filling_in() -> None:
    tokens = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3, "[PREFIX]": 4, "[SUFFIX]": 5}
    assert find_fim(tokens.get).prompt([10], [20]) == [1, 10, 2, 20, 3]
    del tokens["<fim_middle>"]
    assert find_fim(tokens.get).prompt([10], [20]) == [5, 20, 4, 10]
    del tokens["[PREFIX]"]
    assert find_fim(tokens.get) is None


def test_a_temperature_next_to_zero_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    own = preparer()
    with caplog.at_level("WARNING", "fuseline"):
        for value in (0, 0.5, 0.001, 0.002):
            prepared(own, "completion", temperature=value)
    assert caplog.text.count("too close to 0") == 1
