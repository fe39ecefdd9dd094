"""Grammars that tools make of an answer: what they take and refuse, with the bundled tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import xgrammar

from fuseline.api.errors import ApiError
from fuseline.api.parsers.choice import HARMONY
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.parsers.reasoning import reasoning_formats
from fuseline.api.parsers.registry import Formats
from fuseline.api.prompt.auto_grammar import behind_reasoning
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import json_spec
from fuseline.api.prompt.tokenizer_files import read_tokenizer
from fuseline.api.prompt.tool_grammar import Answers, Thinking, reasoning_end, tool_spec, with_grammar
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.engine.params import SamplingParams

CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
    "additionalProperties": False, "$defs": {"city": {"type": "string"}},
}  # fmt: skip
COUNT = {**CITY, "$defs": {"city": {"type": "integer"}}}
"""Another meaning of the same name."""
NAMED = ToolUse("named", (Tool("f", None),))


@cache
def compiler():
    vocabulary = [bytes([k]) for k in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    return xgrammar.GrammarCompiler(info, max_threads=1)


def takes(use: ToolUse, text: str) -> bool:
    """Whether a whole answer is in the language."""
    matcher = xgrammar.GrammarMatcher(compiler().compile_grammar(tool_spec(use).text))
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(256)


def calls(*pairs: tuple[str, object]) -> str:
    return json.dumps([{"name": name, "parameters": arguments} for name, arguments in pairs])


def test_a_named_function_leaves_its_arguments() -> None:
    use = ToolUse("named", (Tool("f", CITY),))
    assert takes(use, '{"city": "Paris"}')
    for text in ("{}", '{"city": 1}', '{"city": "x", "y": 1}', "[]", "", 'Sure: {"city": "Paris"}'):
        assert not takes(use, text)
    for parameters in (None, {}, {"properties": {"a": {"type": "integer"}}}):
        use = ToolUse("named", (Tool("f", parameters),))
        assert takes(use, '{"a": 1}') and not takes(use, "[1]") and not takes(use, "null")


def test_required_leaves_a_list_of_calls() -> None:
    use = ToolUse("required", (Tool("f", CITY), Tool("g", None), Tool("h", COUNT)))
    for text in (calls(("f", {"city": "x"})), calls(("h", {"city": 1}), ("g", {}), ("f", {"city": "y"}))):
        assert takes(use, text), text
    refused = (
        "[]", "{}", "No.", calls(("f", {})), calls(("f", {"city": 1})), calls(("h", {"city": "x"})), calls(("k", {})),
        calls(("g", {})) + " ", '[{"name": "g"}]',
    )  # fmt: skip
    for text in refused:
        assert not takes(use, text), text


def test_one_call_where_parallel_ones_are_off() -> None:
    use = ToolUse("required", (Tool("g", None),), is_parallel=False)
    assert takes(use, calls(("g", {}))) and not takes(use, calls(("g", {}), ("g", {})))


def test_nothing_is_asked_of_other_choices() -> None:
    assert tool_spec(ToolUse("auto", (Tool("f", CITY),))) is tool_spec(ToolUse()) is None


def test_a_schema_that_no_grammar_holds_is_refused() -> None:
    for choice in ("named", "required"):
        with pytest.raises(ApiError) as caught:
            tool_spec(ToolUse(choice, (Tool("f", {"type": "object", "properties": {"a": {"type": "nothing"}}}),)))
        assert caught.value.status == 400 and caught.value.param.startswith("tools")


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer(read_tokenizer(str(Path(__file__).resolve().parents[3] / "csrc" / "pkg" / "demo")))


def held(params: SamplingParams, use: ToolUse, thinking: Thinking, tools: str = "", has_format: bool = False):
    """The grammar of an answer; `tools`: format of calls."""
    formats = Formats(tool_formats().get(tools, HARMONY if tools == HARMONY else None))
    return with_grammar(params, use, Answers(thinking, formats, tokenizer()), has_format).grammar


def test_grammars_begin_behind_the_reasoning() -> None:
    forms = reasoning_formats()
    end = (tokenizer().token_id("</think>"),)
    for name, start, expected in (
        ("deepseek_r1", "", end), ("deepseek_r1", "closed", ()), ("deepseek_r1", "open", end), ("qwen3", "open", end),
        ("qwen3", "closed", ()), ("qwen3", "", ()), ("granite", "open", ()), ("", "open", ()),
    ):  # fmt: skip
        assert reasoning_end(Thinking(forms.get(name), start), tokenizer()) == expected
    own, use = SamplingParams(grammar=tool_spec(NAMED)), ToolUse()
    assert held(own, use, Thinking(forms["deepseek_r1"])).starts_after == end
    assert held(SamplingParams(), NAMED, Thinking(forms["qwen3"], "open")).starts_after == end
    assert held(SamplingParams(), use, Thinking(forms["qwen3"])) is None
    assert held(own, use, Thinking()) == own.grammar
    assert held(own, use, Thinking(forms["qwen3"])) == own.grammar
    asked = held(own, use, Thinking(forms["qwen3"], is_asked=True))
    assert asked == behind_reasoning(own.grammar, forms["qwen3"], tokenizer())
    opened = held(own, use, Thinking(forms["granite"], "open"))  # its end is no token
    assert opened == behind_reasoning(own.grammar, forms["granite"], tokenizer(), is_open=True)


def test_reasoning_may_come_before_a_grammar() -> None:
    spec = behind_reasoning(tool_spec(NAMED), reasoning_formats()["qwen3"], tokenizer())
    grammar = compiler().compile_structural_tag(json.loads(spec.text))
    for text, is_taken in (
        ("{}", True), ("<think>a {} b</think>{}", True), ("<think></think>{}", True), ("<think>Hm.", False),
        ("Hm.</think>{}", False), ("<think>a</think>No.", False),
    ):  # fmt: skip
        matcher = xgrammar.GrammarMatcher(grammar)
        assert (all(map(matcher.accept_token, text.encode())) and matcher.accept_token(256)) is is_taken, text


def test_which_grammar_an_answer_has() -> None:
    strict, loose = ToolUse("auto", (Tool("f", CITY, True),)), ToolUse("auto", (Tool("f", CITY),))
    own, no_thoughts = SamplingParams(grammar=json_spec(CITY)), Thinking()
    assert held(SamplingParams(), loose, no_thoughts, "hermes") is None
    free = held(SamplingParams(), strict, no_thoughts, "hermes")
    assert free.is_free and free.kind == "structural_tag"
    either = held(own, loose, no_thoughts, "hermes", has_format=True)
    assert not either.is_free and either.kind == "structural_tag"
    assert held(own, strict, no_thoughts, "hermes", has_format=False) == own.grammar
    assert held(own, strict, no_thoughts, "", has_format=True) == own.grammar
    assert held(SamplingParams(), NAMED, no_thoughts, "hermes") == tool_spec(NAMED)
    assert "analysis" in held(SamplingParams(), NAMED, no_thoughts, HARMONY).text
