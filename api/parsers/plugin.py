"""Tool parsers from a Python file of the operator (--tool-parser-plugin), with the interface of the reference server.

from fuseline.api.parsers.plugin import ExtractedToolCallInformation, ToolParser, ToolParserManager

@ToolParserManager.register_module("mine")
class MyParser(ToolParser):
    def extract_tool_calls(self, model_output, request): ...
    def extract_tool_calls_streaming(self, previous_text, current_text, delta_text, previous_token_ids,
                                     current_token_ids, delta_token_ids, request): ...
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fuseline.api.config import ConfigError
from fuseline.api.output.events import Part, TextDelta, ToolCallDelta
from fuseline.api.parsers.calls import hex_id

LOG = logging.getLogger("fuseline.parsers")
MAX_TEXT = 2**20
"""Characters of an answer that a plugin may see again with every token."""


@dataclass
class FunctionCall:
    name: str
    arguments: str
    """JSON text."""


@dataclass
class ToolCall:
    function: FunctionCall
    id: str = ""
    type: str = "function"


@dataclass
class ExtractedToolCallInformation:
    tools_called: bool
    tool_calls: list[ToolCall] = field(default_factory=list)
    content: str | None = None


@dataclass
class DeltaFunctionCall:
    name: str | None = None
    arguments: str | None = None


@dataclass
class DeltaToolCall:
    index: int
    function: DeltaFunctionCall | None = None
    id: str | None = None
    type: str | None = None


@dataclass
class DeltaMessage:
    content: str | None = None
    tool_calls: list[DeltaToolCall] = field(default_factory=list)


@dataclass
class ParserRequest:
    """The request as a plugin sees it. `skip_special_tokens` may be set by `adjust_request`."""

    tools: list[dict[str, Any]]
    tool_choice: Any = "auto"
    skip_special_tokens: bool = True
    stream: bool = False


class ToolParser:
    """Base of a plugin's parsers. One is made for each choice."""

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        self.model_tokenizer = tokenizer
        self.prev_tool_call_arr: list[dict[str, Any]] = []
        self.current_tool_id = -1
        self.current_tool_name_sent = False
        self.streamed_args_for_tool: list[str] = []

    @property
    def vocab(self) -> dict[str, int]:
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request: ParserRequest) -> ParserRequest:
        return request

    def extract_tool_calls(self, model_output: str, request: ParserRequest) -> ExtractedToolCallInformation:
        raise NotImplementedError

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, delta_text: str, previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int], delta_token_ids: Sequence[int], request: ParserRequest,
    ) -> DeltaMessage | None:  # fmt: skip
        raise NotImplementedError


class ToolParserManager:
    """Names a file's parsers; they are found in the file by that name."""

    @staticmethod
    def register_module(
        name: str | Sequence[str] | None = None, force: bool = True, module: type[ToolParser] | None = None
    ) -> Any:
        names = [name] if isinstance(name, str) else list(name or ())

        def mark(kind: type[ToolParser]) -> type[ToolParser]:
            kind.registered_names = tuple(names or [kind.__name__])
            return kind

        return mark if module is None else mark(module)


REFERENCE_MODULES = (
    "vllm", "vllm.entrypoints", "vllm.entrypoints.openai", "vllm.entrypoints.openai.protocol",
    "vllm.entrypoints.openai.tool_parsers", "vllm.entrypoints.openai.tool_parsers.abstract_tool_parser",
    "vllm.tool_parsers", "vllm.tool_parsers.abstract_tool_parser", "vllm.logger", "vllm.transformers_utils",
    "vllm.transformers_utils.tokenizer", "vllm.tokenizers",
)  # fmt: skip
"""Modules that a plugin for the reference server may import."""


@contextmanager
def _reference_modules() -> Iterator[None]:
    """Lets the reference server's module names lead here while a plugin is imported, where it is not installed."""
    if importlib.util.find_spec("vllm") is not None:
        yield
        return
    stand_in = {name: ModuleType(name) for name in REFERENCE_MODULES}
    own = {**globals(), "ChatCompletionRequest": ParserRequest, "init_logger": logging.getLogger, "AnyTokenizer": Any}
    for module in stand_in.values():
        vars(module).update({name: value for name, value in own.items() if not name.startswith("_")})
    sys.modules.update(stand_in)
    try:
        yield
    finally:
        for name in stand_in:
            sys.modules.pop(name, None)


@cache
def load_plugin(path: str) -> dict[str, type[ToolParser]]:
    """The parsers of a file by name. Raises ConfigError where it cannot be imported or names none."""
    flag = f"--tool-parser-plugin {path}"
    if not Path(path).is_file():
        raise ConfigError(f"{flag}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"fuseline_plugin_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{flag}: give a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        with _reference_modules():
            spec.loader.exec_module(module)
    except Exception as error:  # whatever the operator's file does
        raise ConfigError(f"{flag} cannot be imported: {type(error).__name__}: {error}") from error
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and "registered_names" in vars(kind)]
    found = {name: kind for kind in kinds for name in kind.registered_names}
    if not found:
        raise ConfigError(f"{flag} registers no parser (@ToolParserManager.register_module)")
    return found


class PluginParser:
    """Runs a plugin's parser on one choice. What it raises makes the text content."""

    is_thinking = False

    def __init__(self, index: int, parser: ToolParser, request: ParserRequest, is_parallel: bool) -> None:
        self._index, self._parser, self._request, self._is_parallel = index, parser, request, is_parallel
        self._text = ""
        self._has_failed = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Part]:
        before, self._text = self._text, self._text + text
        if not self._request.stream or not text:
            return []
        if self._has_failed or len(self._text) > MAX_TEXT:
            return [TextDelta(self._index, text)]
        call = self._parser.extract_tool_calls_streaming
        delta = self._guarded(lambda: call(before, self._text, text, [], [], [], self._request))
        if self._has_failed:
            return [TextDelta(self._index, text)]
        return self._parts(delta) if delta is not None else []

    def finish(self) -> list[Part]:
        if self._request.stream:
            return []
        found = self._guarded(lambda: self._parser.extract_tool_calls(self._text, self._request))
        if found is None or not found.tools_called:
            return [TextDelta(self._index, self._text)] if self._text else []
        parts: list[Part] = [TextDelta(self._index, found.content)] if found.content else []
        for k, call in enumerate(found.tool_calls[: None if self._is_parallel else 1]):
            id = call.id or hex_id(k, "")
            parts.append(ToolCallDelta(self._index, k, call.function.arguments, id, call.function.name))
            self.num_calls += 1
        return parts

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception:
            LOG.exception("a tool parser of --tool-parser-plugin failed; its text is content")
            self._has_failed = True
            return None

    def _parts(self, delta: Any) -> list[Part]:
        parts: list[Part] = [TextDelta(self._index, delta.content)] if delta.content else []
        for call in delta.tool_calls or ():
            if call.index and not self._is_parallel:
                continue
            function = call.function or DeltaFunctionCall()
            is_new = function.name is not None and call.index >= self.num_calls
            self.num_calls = max(self.num_calls, call.index + 1) if is_new else self.num_calls
            id = (call.id or hex_id(call.index, "")) if is_new else None
            name = function.name if is_new else None
            parts.append(ToolCallDelta(self._index, call.index, function.arguments or "", id, name))
        return parts
