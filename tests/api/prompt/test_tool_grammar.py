"""Grammars that tools make of an answer: what they take and refuse, with the bundled tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import xgrammar

from fuseline.api.errors import ApiError
from fuseline.api.parsers.reasoning import reasoning_formats
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import read_tokenizer
from fuseline.api.prompt.tool_grammar import (
    Thinking,
    behind_optional_reasoning,
    reasoning_end,
    tool_spec,
    with_grammar,
)
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.engine.messages import SamplingParams

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


def test_grammars_begin_behind_the_reasoning() -> None:
    demo = Path(__file__).resolve().parents[3] / "csrc" / "pkg" / "demo"
    tokenizer, forms = TextTokenizer(read_tokenizer(str(demo))), reasoning_formats()
    end = (tokenizer.token_id("</think>"),)
    for name, start, expected in (
        ("deepseek_r1", "", end), ("deepseek_r1", "closed", ()), ("deepseek_r1", "open", end), ("qwen3", "open", end),
        ("qwen3", "closed", ()), ("qwen3", "", ()), ("granite", "open", ()), ("", "open", ()),
    ):  # fmt: skip
        assert reasoning_end(Thinking(forms.get(name), start), tokenizer) == expected
    own, use = SamplingParams(grammar=tool_spec(NAMED)), ToolUse()
    assert with_grammar(own, use, Thinking(forms["deepseek_r1"]), tokenizer).grammar.starts_after == end
    opened = with_grammar(SamplingParams(), NAMED, Thinking(forms["qwen3"], "open"), tokenizer).grammar
    assert opened.starts_after == end
    assert with_grammar(SamplingParams(), use, Thinking(forms["qwen3"]), tokenizer).grammar is None
    assert with_grammar(own, use, Thinking(), tokenizer).grammar == own.grammar
    assert with_grammar(own, use, Thinking(forms["qwen3"]), tokenizer).grammar == own.grammar
    asked = with_grammar(own, use, Thinking(forms["qwen3"], is_asked=True), tokenizer).grammar
    assert asked == behind_optional_reasoning(own.grammar, forms["qwen3"])


def test_reasoning_may_come_before_a_grammar() -> None:
    spec = behind_optional_reasoning(tool_spec(NAMED), reasoning_formats()["qwen3"])
    grammar = compiler().compile_structural_tag(json.loads(spec.text))
    for text, is_taken in (
        ("{}", True), ("<think>a {} b</think>{}", True), ("<think></think>{}", True), ("<think>Hm.", False),
        ("Hm.</think>{}", False), ("<think>a</think>No.", False),
    ):  # fmt: skip
        matcher = xgrammar.GrammarMatcher(grammar)
        assert (all(map(matcher.accept_token, text.encode())) and matcher.accept_token(256)) is is_taken, text
