"""Grammars that tools make of an answer: what they take and refuse, with the bundled tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from fuseline.api.config_resolve import resolve
from fuseline.api.errors import ApiError
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import read_tokenizer
from fuseline.api.prompt.tool_grammar import reasoning_end, tool_spec, with_grammar
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.protocol.chat import ChatRequest
from fuseline.engine.messages import SamplingParams

xgrammar = pytest.importorskip("xgrammar")
CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
    "additionalProperties": False, "$defs": {"city": {"type": "string"}},
}  # fmt: skip
COUNT = {**CITY, "$defs": {"city": {"type": "integer"}}}
"""Another meaning of the same name."""


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
    tokenizer = TextTokenizer(read_tokenizer(str(demo)))
    end = (tokenizer.token_id("</think>"),)
    for name, start, is_asked, expected in (
        ("deepseek_r1", "", False, end), ("deepseek_r1", "closed", True, ()), ("qwen3", "", False, ()),
        ("qwen3", "open", False, end), ("qwen3", "", True, end), ("granite", "open", True, ()), ("", "", True, ()),
    ):  # fmt: skip
        body = ChatRequest(messages=[], chat_template_kwargs={"enable_thinking": True} if is_asked else None)
        config = replace(resolve({"model": "demo"}), reasoning_parser=name)
        assert reasoning_end(body, start, config, tokenizer) == expected
    own = SamplingParams(grammar=tool_spec(ToolUse("named", (Tool("f", None),))))
    assert with_grammar(own, ToolUse(), end).grammar.starts_after == end
    assert with_grammar(SamplingParams(), ToolUse("named", (Tool("f", None),)), end).grammar.starts_after == end
    assert with_grammar(SamplingParams(), ToolUse(), end).grammar is None
