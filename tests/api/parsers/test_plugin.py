"""Parsers from a file: loaded by name, with the reference server's interface, and never a danger to an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tool_outputs import Found, fold

from fuseline.api.config import ConfigError
from fuseline.api.parsers.parsing import Parsing
from fuseline.api.parsers.plugin import load_plugin
from fuseline.api.parsers.registry import Formats, tool_parser_names
from fuseline.api.prompt.prepared import AnswerOptions, ParseOptions

SOURCE = '''
from MODULES.abstract_tool_parser import ToolParser, ToolParserManager
from PROTOCOL import (
    DeltaFunctionCall, DeltaMessage, DeltaToolCall, ExtractedToolCallInformation, FunctionCall, ToolCall,
)


@ToolParserManager.register_module(["at", "call_at"])
class AtParser(ToolParser):
    """@name alone is a call."""

    def adjust_request(self, request):
        request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output, request):
        if "!" in model_output:
            raise ValueError(model_output)
        if not model_output.startswith("@"):
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        calls = [
            ToolCall(type="function", function=FunctionCall(name=name, arguments="{}"))
            for name in model_output.split("@")[1:]
        ]
        return ExtractedToolCallInformation(tools_called=True, tool_calls=calls, content=None)

    def extract_tool_calls_streaming(
        self, previous_text, current_text, delta_text, previous_token_ids, current_token_ids, delta_token_ids, request
    ):
        if "!" in delta_text:
            raise ValueError(delta_text)
        if not current_text.startswith("@"):
            return DeltaMessage(content=delta_text)
        if delta_text == "@":
            return None
        index = current_text.count("@") - 1
        return DeltaMessage(tool_calls=[
            DeltaToolCall(index=index, type="function", function=DeltaFunctionCall(name=delta_text, arguments="{}"))
        ])
'''
OWN = {"MODULES.abstract_tool_parser": "fuseline.api.parsers.plugin", "PROTOCOL": "fuseline.api.parsers.plugin"}
REFERENCE = {"MODULES": "vllm.entrypoints.openai.tool_parsers", "PROTOCOL": "vllm.entrypoints.openai.protocol"}


def written(folder: Path, names: dict[str, str], source: str = SOURCE) -> str:
    for name, module in names.items():
        source = source.replace(name, module)
    path = folder / "at.py"
    path.write_text(source)
    return str(path)


def answer(path: str, pieces: list[str], stream: bool, **more) -> Found:
    parsing = Parsing(Formats(plugin=load_plugin(path)["at"]), None)
    options = ParseOptions(choice="auto", tools=(("f", None),), **more)
    settings, skips = parsing.settings(AnswerOptions(parse=options, stream=stream))
    assert not skips, "adjust_request was heeded"
    parser = settings.plugin(0)
    return fold([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


@pytest.mark.parametrize("names", [OWN, REFERENCE], ids=["own", "reference"])
def test_a_plugin_parses_streams_and_whole_answers(names: dict[str, str], tmp_path: Path) -> None:
    path = written(tmp_path, names)
    assert {"at", "call_at", "hermes"} <= set(tool_parser_names(path))
    for stream in (False, True):
        assert answer(path, ["@", "f", "@", "g"], stream) == Found(calls=[("f", "{}"), ("g", "{}")])
        assert answer(path, ["@", "f", "@", "g"], stream, is_parallel=False) == Found(calls=[("f", "{}")])
        assert answer(path, ["no", " call"], stream) == Found("no call")


def test_a_plugin_that_raises_makes_content(tmp_path: Path) -> None:
    path = written(tmp_path, OWN)
    for stream in (False, True):
        assert answer(path, ["a ", "b!", " c"], stream) == Found("a b! c")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_this_name", "cannot be imported"),
        ("x = 1", "registers no parser"),
        ("(", "cannot be imported"),
    ],
)
def test_a_file_that_is_no_plugin_ends_the_start(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_plugin(written(tmp_path, {}, source))
    with pytest.raises(ConfigError, match="no such file"):
        load_plugin(str(tmp_path / "absent.py"))
