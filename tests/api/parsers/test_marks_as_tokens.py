"""Marks that are special tokens stay in the text for their parser; other special tokens do not."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.config_resolve import resolve
from fuseline.api.output.detokenizer import Detokenizer
from fuseline.api.parsers.parsing import build_parsing
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.prepared import AnswerOptions, ParseOptions
from fuseline.api.prompt.tokenizer_files import TokenizerFiles

SPECIAL = ("<pad>", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|channel|>", "</think>", "[TOOL_CALLS]")


def tokenizer(*more: str) -> TextTokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, *more)])
    return TextTokenizer(TokenizerFiles(made.to_str(), {}))


def shown(words: list[str], config: ServerConfig, has_tools: bool = True, **fields) -> str:
    """Text that reaches the parser."""
    own = tokenizer()
    parsing = build_parsing(config, own, None)
    answer = AnswerOptions(parse=ParseOptions(choice="auto", tools=(("f", None),)) if has_tools else None, **fields)
    settings, skips = parsing.settings(answer)
    detokenizer = Detokenizer(own, skips, (), parsing.kept_ids if settings else frozenset())
    return "".join(detokenizer.feed(own.token_id(word)) for word in words) + detokenizer.finish()


def test_only_the_marks_of_the_parsers_stay() -> None:
    config = resolve({"model": "demo", "tool_call_parser": "internlm", "enable_auto_tool_choice": True})
    words = ["a", "<|action_start|>", "<|plugin|>", "b", "<|action_end|>", "<pad>", "<|channel|>"]
    assert shown(words, config) == "a<|action_start|><|plugin|>b<|action_end|>"
    assert shown(words, config, has_tools=False) == "ab"
    assert shown(words, config, skips_special=False) == "".join(words)


def test_marks_of_reasoning_and_harmony() -> None:
    words = ["<|channel|>", "a", "</think>", "<pad>"]
    assert shown(words, resolve({"model": "demo", "reasoning_parser": "qwen3"})) == "a</think>"
    assert shown(words, resolve({"model": "demo", "reasoning_parser": "openai_gptoss"})) == "<|channel|>a"


def test_marks_that_must_be_tokens() -> None:
    """A vocabulary without them cannot hold what the format announces."""
    for flags, missing in (({"reasoning_parser": "deepseek_r1"}, "<think>"), ({"tool_call_parser": "mistral"}, "")):
        config = resolve({"model": "demo", **flags})
        if missing:
            with pytest.raises(ConfigError, match=f"{json.dumps(missing)[1:-1]}"):
                build_parsing(config, tokenizer(), None)
        build_parsing(config, tokenizer("<think>"), None)


def test_the_template_names_the_format() -> None:
    config = resolve({"model": "demo", "tool_call_parser": "hf", "enable_auto_tool_choice": True})
    templates = {
        "answer with <tool_call>{...}</tool_call>": "hermes",
        "<tool_call>\n<function=name>\n<parameter=x>": "qwen3_coder",
        "<tool_call>{{ name }}\n<arg_key>k</arg_key>\n<arg_value>": "glm45",
        "<|tool_calls_section_begin|><|tool_call_begin|>x<|tool_call_argument_begin|>": "kimi_k2",
    }
    for template, name in templates.items():
        assert name in build_parsing(config, tokenizer(), template).formats.tools.names
    with pytest.raises(ConfigError, match="no known format"):
        build_parsing(config, tokenizer(), "{{ messages }}")
