"""Tools of `fuseline run`: the functions of the user's file, called with what the model asks for."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fuseline.api.config import ConfigError

MAX_ROUNDS = 8
"""Answers to one question that may call tools."""
Message = dict[str, Any]
Stream = Callable[[list[Message]], Iterator[dict[str, Any]]]
"""Streams the deltas of the answer to a conversation."""


class Tools:
    """The public functions that a Python file defines, by name. Raises ConfigError for a file that cannot be used."""

    def __init__(self, path: str) -> None:
        from transformers.utils import get_json_schema

        self._functions = _functions_of(path)
        try:
            self.schemas = [get_json_schema(function) for function in self._functions.values()]
        except Exception as error:  # DocstringParsingException, TypeHintParsingException and their kin
            reason = " ".join(str(error).split())
            raise ConfigError(f"--tools {path}: a tool needs type hints and a docstring with Args: {reason}") from error

    def call(self, name: str, arguments: str) -> str:
        """The result as text; of a call that fails the reason, for the model to read."""
        function = self._functions.get(name)
        if function is None:
            return f"error: there is no tool {name!r}"
        try:
            values = json.loads(arguments or "{}")
            bound = inspect.signature(function).bind(**values)
            found = function(*bound.args, **bound.kwargs)
        except Exception as error:  # the user's own code
            return f"error: {type(error).__name__}: {error}"
        return found if isinstance(found, str) else json.dumps(found, default=str)


def _functions_of(path: str) -> dict[str, Callable[..., object]]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"--tools {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise ConfigError(f"--tools {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise ConfigError(f"--tools {path} defines no function whose name does not begin with _")
    return found


def answer_with_tools(stream: Stream, tools: Tools, show: Callable[[str], None]) -> Callable:
    """Streams the text of an answer; tools that it calls are run and their results sent back until it calls none.

    `show` is told of each call in one line.
    """

    def answer(messages: list[Message]) -> Iterator[str]:
        turns = list(messages)
        for _ in range(MAX_ROUNDS):
            calls: dict[int, dict[str, Any]] = {}
            text = ""
            for delta in stream(turns):
                content = delta.get("content") or ""
                text += content
                yield content
                gather(calls, delta.get("tool_calls") or ())
            if not calls:
                return
            turns.append({"role": "assistant", "content": text or None, "tool_calls": list(calls.values())})
            turns += [_result(tools, call, show) for call in calls.values()]
        raise ValueError(f"the model called tools {MAX_ROUNDS} times in a row")

    return answer


def gather(calls: dict[int, dict[str, Any]], deltas: Iterable[dict[str, Any]]) -> None:
    """Add the deltas of a stream's tool calls to the calls by index."""
    for delta in deltas:
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = calls.setdefault(delta.get("index", 0), empty)
        function = delta.get("function") or {}
        call["id"] = delta.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _result(tools: Tools, call: dict[str, Any], show: Callable[[str], None]) -> Message:
    function = call["function"]
    found = tools.call(function["name"], function["arguments"])
    show(f"[{function['name']}({function['arguments']}) -> {found[:200]}]")
    return {"role": "tool", "tool_call_id": call["id"], "content": found}
